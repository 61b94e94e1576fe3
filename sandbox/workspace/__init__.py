"""Workspaces: what a call may leave in a directory, and how it gets from there to the host.

`scan` and `sweep` guard a host directory mounted read-write; `collect` brings files out as bounded data; a
`Changeset` holds what a call changed in an overlay until somebody commits or discards it. Everything works on
directory descriptors while nothing of the call runs any more, and takes the whole tree for hostile: links, devices,
names, depths and sizes. Standard library only.
"""

from __future__ import annotations

from sandbox.workspace.capture import Overlay, StoreLimits, capture
from sandbox.workspace.changeset import Before, Change, Changeset, list_changesets
from sandbox.workspace.collect import Collected, CollectLimits, collect, collect_into
from sandbox.workspace.commit import CommitResult
from sandbox.workspace.names import printable
from sandbox.workspace.protected import RULES, check_allow, is_protected, is_protected_dir
from sandbox.workspace.scan import MAX_ENTRIES, EntryState, Scan, scan
from sandbox.workspace.sweep import Changes, SweepResult, sweep

__all__ = [
    "MAX_ENTRIES",
    "RULES",
    "Before",
    "Change",
    "Changes",
    "Changeset",
    "CollectLimits",
    "Collected",
    "CommitResult",
    "EntryState",
    "Overlay",
    "Scan",
    "StoreLimits",
    "SweepResult",
    "capture",
    "check_allow",
    "collect",
    "collect_into",
    "is_protected",
    "is_protected_dir",
    "list_changesets",
    "printable",
    "scan",
    "sweep",
]
