"""What a call's workspace needs from the supervisor: a look before launch, and gathering when nothing runs any more.

All of it works on descriptors and takes what the call left behind for hostile. Runs in a thread: trees may be large.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Mapping
from pathlib import Path

from sandbox.errors import LaunchError, SandboxError
from sandbox.plan import LaunchPlan

# Most calls have a private workspace in which they leave nothing: what looks through trees is loaded when it is needed.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from sandbox.workspace import Scan

LISTED_MAX = 2000
_SET_ASIDE = {
    "": "a protected path may not be left in a writable workspace; set aside",
    "special-file": "fifos, sockets and devices may not be left in a writable workspace; removed",
    "too-deep": "a tree too deep to be looked through may not be left in a writable workspace; set aside",
    "privilege-bits": "its set-uid, set-gid or capability bits could not be taken away; set aside",
}


class Left:
    """What a call left: the record's `files` group, collected files by path, and where its changes are kept."""

    __slots__ = ("changes", "collected", "decisions", "files")

    def __init__(self) -> None:
        self.files: dict[str, Any] | None = None
        self.collected: Mapping[str, bytes] = {}
        self.changes = ""
        self.decisions: list[dict[str, Any]] = []


class Work:
    """One call's workspace. `before` may change the plan; `after` looks at what is there when the jail is gone."""

    def __init__(self, ask: dict[str, Any], plan: LaunchPlan, state: Path, record_id: str) -> None:
        self._patterns = tuple(ask["call"]["collect"])
        self._allow = tuple(ask["policy"]["manifest"]["filesystem"]["allow_protected"])
        self._step = next((step.args for step in plan.steps if step.name == "workspace"), {})
        self._plan = plan
        self._state = state
        self._record_id = record_id
        self._root_fd = -1
        self._scan: Scan | None = None
        self._started_ns = time.time_ns()

    @property
    def mode(self) -> str:
        return str(self._step.get("mode", "private"))

    @property
    def is_quick(self) -> bool:
        """Whether `after` has at most LISTED_MAX names to look at: a thread would cost more than it saves."""
        return self.mode == "private" and not self._patterns

    def before(self) -> LaunchPlan:
        """The plan to launch. A writable host directory is looked through first, and what is protected in it named.

        Raises LaunchError when the directory is no longer the one that was resolved, WorkspaceError when it holds
        more than can be watched.
        """
        if self.mode not in ("rw", "cow"):
            return self._plan
        path = self._step["host_path"]
        try:
            self._root_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise LaunchError(f"{path}: {error.strerror}", step="workspace", errno=error.errno) from error
        info = os.fstat(self._root_fd)
        if (info.st_dev, info.st_ino) != (self._step["dev"], self._step["ino"]):
            raise LaunchError(f"{path}: replaced since it was resolved", step="workspace")
        if self.mode == "cow":
            return self._plan
        from sandbox.workspace import scan

        self._scan = scan(self._root_fd, allow=self._allow, apart=_covered(self._plan))
        return self._plan.with_step_args("workspace", protected=self._scan.protected)

    def after(self, jail_fds: Mapping[str, int], *, own_user_namespace: bool) -> Left:
        """Gather. `own_user_namespace`: the overlay was mounted by an ordinary user."""
        left = Left()
        if self.mode == "rw" and self._scan is not None:
            self._sweep(left)
        elif self.mode == "cow" and "upper" in jail_fds:
            self._capture(left, jail_fds["upper"], userxattr=own_user_namespace)
        elif self.mode == "private" and "workspace" in jail_fds:
            left.files = _listed(jail_fds["workspace"])
        if self._patterns and "workspace" in jail_fds:
            from sandbox.workspace import collect
            from sandbox.workspace.names import to_json

            collected = collect(jail_fds["workspace"], self._patterns)
            left.collected = collected.files
            skipped = [{"path": to_json(path), "reason": reason} for path, reason in collected.skipped]
            left.files = {**(left.files or {}), "collected": sorted(map(to_json, collected.files)), "skipped": skipped}
        return left

    def _sweep(self, left: Left) -> None:
        from sandbox.workspace import sweep
        from sandbox.workspace.names import to_json

        assert self._scan is not None
        quarantine = self._state / "quarantine" / self._record_id
        quarantine.mkdir(mode=0o700, parents=True)
        fd = os.open(quarantine, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            result = sweep(self._root_fd, self._scan, self._allow, fd)
        finally:
            os.close(fd)
        if not any(quarantine.iterdir()):
            quarantine.rmdir()
        changes, swept = result.changes, result.to_json()
        written = [*map(to_json, changes.added.paths), *map(to_json, changes.modified.paths)]
        left.files = {
            "written": written,
            "deleted": list(map(to_json, changes.deleted.paths)),
            **{name: swept[name] for name in ("stripped", "unswept")},
            "links_outside": swept["links_outside"]["paths"],
        }
        if result.quarantined_more:
            left.files["quarantined_more"] = result.quarantined_more
        for taken in swept["quarantined"]:
            left.decisions.append(
                {
                    "kind": "workspace",
                    "subject": taken["path"],
                    "decision": "deny",
                    "rule": taken["rule"],
                    "reason": _SET_ASIDE.get(taken["rule"], _SET_ASIDE[""]),
                }
            )

    def _capture(self, left: Left, upper_fd: int, *, userxattr: bool) -> None:
        from sandbox.workspace import Changeset, Overlay
        from sandbox.workspace.names import to_json

        path = self._step["host_path"]
        overlay = Overlay(upper_fd, self._root_fd, path, userxattr=userxattr, started_ns=self._started_ns)
        changes = Changeset.from_upper(overlay, self._state / "changes", record_id=self._record_id)
        left.files = {
            "written": [to_json(change.path) for change in (*changes.added, *changes.modified)],
            "deleted": [to_json(change.path) for change in changes.deleted],
        }
        left.changes = str(changes.directory) if changes.directory else ""

    def close(self) -> None:
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1


def _covered(plan: LaunchPlan) -> frozenset[tuple[int, int]]:
    """The directories that are denied as a whole: the call cannot reach them, and the records may be among them."""
    found = set()
    for path in next((step.args["paths"] for step in plan.steps if step.name == "deny"), ()):
        with contextlib.suppress(OSError):
            info = os.lstat(path)
            if stat.S_ISDIR(info.st_mode):
                found.add((info.st_dev, info.st_ino))
    return frozenset(found)


def _listed(fd: int) -> dict[str, Any]:
    """The files in a private workspace, which is gone after the call."""
    if not os.listdir(fd):
        return {"written": []}
    from sandbox.workspace import scan
    from sandbox.workspace.names import to_json

    try:
        found = scan(fd, max_entries=LISTED_MAX)
    except SandboxError:
        return {"written": [], "note": f"more than {LISTED_MAX} entries"}
    names = [path for path in found.paths() if (entry := found.entry(path)) and stat.S_ISREG(entry.mode)]
    return {"written": [to_json(path) for path in sorted(names)]}
