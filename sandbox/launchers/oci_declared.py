"""What stands in the way of an OCI runtime here, beyond its being installed. Pure.

What a container of theirs holds is what the host has, as for the native jail: view, limits, gateway and filter are the
same, and the kernel's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from sandbox.host import Control, HostFacts

RUNSC_GAPS: Final = {
    "terminal": "gVisor's terminals are its own; a terminal inside is for runtimes that share this kernel",
    "write": "gVisor makes files as another uid first, which an idmapped directory refuses; use 'cow' or a private one",
    "egress": "gVisor's network stack is its own, and a socket made in it cannot be handed to the gateway outside",
    "gpu": "gVisor's kernel has no driver for it",
}
_SECOND_UID = "it wants a root of its own in the container beside the tool's uid, and only root can map two"
# Sentry, gofer and runsc itself: some 60 on two cores, more on more.
RUNSC_TASKS: Final = 256
_SENTRY = f"gVisor's own threads count with the tool's, so {RUNSC_TASKS} more are allowed than were asked for"
_UNIFIED = "runc manages a cgroup of its own, below the call's, and the v1 trees hold none that we could lend it"


def obstacle(runtime: str, facts: HostFacts) -> tuple[str, str]:
    """(why this runtime cannot make containers here, what would help); both empty where it can."""
    if runtime in ("runc", "runsc") and facts.uid != 0:
        return _SECOND_UID, "use crun, or run as root"
    if runtime == "runc" and facts.cgroup_kind not in ("v2", "hybrid"):
        return _UNIFIED, "use crun"
    return "", ""


def adjusted(runtime: str, rows: Mapping[str, Control]) -> Mapping[str, Control]:
    """The rows with a runtime that has a kernel of its own: the tool's tasks are that kernel's."""
    if runtime != "runsc":
        return rows
    changed = dict(rows)
    if rows["pids"].level == "full":
        changed["pids"] = replace(rows["pids"], level="partial", reason=_SENTRY)
    changed["landlock"] = Control("none", "", "none", "this kernel's Landlock means nothing to gVisor's")
    changed["syscalls"] = Control("full", "gVisor's own kernel, in which what the policy refuses is refused by name")
    return changed
