"""What stands in the way of an OCI runtime here, beyond its being installed. Pure.

What a container of theirs holds is what the host has, as for the native jail: view, limits, gateway and filter are the
same, and the kernel's.
"""

from __future__ import annotations

from sandbox.host import HostFacts

_SECOND_UID = "runc wants a root of its own in the container beside the tool's uid, and only root can map two"
_UNIFIED = "runc manages a cgroup of its own, below the call's, and the v1 trees hold none that we could lend it"


def obstacle(runtime: str, facts: HostFacts) -> tuple[str, str]:
    """(why this runtime cannot make containers here, what would help); both empty where it can."""
    if runtime == "runc" and facts.uid != 0:
        return _SECOND_UID, "use crun, or run as root"
    if runtime == "runc" and facts.cgroup_kind not in ("v2", "hybrid"):
        return _UNIFIED, "use crun"
    return "", ""
