"""A world of its own for network tests: every address is local to it, and nothing leads out.

The test's body runs in a child, in fresh network and mount namespaces (and, for an ordinary user, a user namespace)
where one local route makes all addresses local. Stand-in servers there own outside addresses; the sandbox's supervisor
and gateway are started inside as well. No packet can reach a real host: there is no interface but `lo`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sandbox._linux import mounts, netlink, process, syscalls

# Outside addresses that stand-ins own here. They are real hosts' elsewhere, which is the point.
WEB = "93.184.216.34"
WEB_V6 = "2606:2800:220:1:248:1893:25c8:1946"
OTHER = "151.101.1.69"
LIFETIME_S = 150


class WorldFailed(AssertionError):
    """The body failed inside; the text is its traceback."""


def run_in_world(body: Callable[[], Any], hosts: Mapping[str, str] | None = None, lifetime_s: int = LIFETIME_S) -> Any:
    """Run `body` in a world where `hosts` (name to address) resolve; returns its answer (JSON data)."""
    read_fd, write_fd = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="toolcall-sandbox-world-") as directory:
        os.chmod(directory, 0o755)
        pid = os.fork()
        if pid == 0:
            os.close(read_fd)
            signal.alarm(lifetime_s)
            _enter(body, write_fd, hosts or {}, Path(directory))
        os.close(write_fd)
        with open(read_fd, "rb") as file:
            text = file.read()
        _, status = os.waitpid(pid, 0)
    if not text:
        raise WorldFailed(f"the world ended with status {status}")
    answer = json.loads(text)
    if "failed" in answer:
        raise WorldFailed(answer["failed"])
    return answer["answer"]


def _enter(body: Callable[[], Any], write_fd: int, hosts: Mapping[str, str], directory: Path) -> None:
    code = 1
    try:
        process.die_with_parent()
        _make(hosts, directory)
        answer: dict[str, Any] = {"answer": body()}
        code = 0
    except BaseException:  # noqa: BLE001 - shown by the process outside, which fails with it
        answer = {"failed": traceback.format_exc()}
    os.write(write_fd, json.dumps(answer).encode())
    os._exit(code)


def _make(hosts: Mapping[str, str], directory: Path) -> None:
    if os.geteuid() == 0:
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
    else:
        uid, gid = os.geteuid(), os.getegid()
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    mounts.make_private()
    process.loopback_up()
    with netlink.open_socket(netlink.NETLINK_ROUTE) as sock:
        netlink.request(sock, netlink.add_local_default_route("127.0.0.1"), 1, "route")
        netlink.request(sock, netlink.add_local_default_route("::1"), 1, "route")
    lines = [
        "127.0.0.1 localhost",
        *(f"{address} {name}" for name, addresses in hosts.items() for address in addresses.split()),
    ]
    for name, text in (
        ("hosts", "\n".join(lines) + "\n"),
        ("resolv.conf", "nameserver 127.0.0.54\nsearch corp.test\noptions timeout:1\n"),
    ):
        (directory / name).write_text(text)
        mounts.bind(str(directory / name), os.path.realpath(f"/etc/{name}"), 0)
    os.environ["SANDBOX_STATE"] = str(directory / "state")
