"""The text of the files that a jail's /etc holds of its own: one user, no name servers, no host's accounts."""

from __future__ import annotations


def files(hostname: str, home: str, nameserver: str, uid: int = 1000) -> dict[str, str]:
    """File name to content. `nameserver`: any address will do where the gateway answers, none answers elsewhere.

    `uid`: the one user's, as seen inside.
    """
    return {
        "passwd": f"root:x:0:0:root:/nonexistent:/usr/sbin/nologin\nuser:x:{uid}:{uid}:user:{home}:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
        "group": f"root:x:0:\nuser:x:{uid}:\ntty:x:5:\nnogroup:x:65534:\n",
        "hosts": f"127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost\n",
        "hostname": f"{hostname}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nnetworks: files\n"
        "protocols: files\nservices: files\n",
        "resolv.conf": f"nameserver {nameserver}\noptions timeout:2 attempts:2\n",
        "shells": "/bin/sh\n/bin/bash\n",
        # The machine's own id would tell one host from another, across calls and tenants.
        "machine-id": "00000000000000000000000000000000\n",
    }
