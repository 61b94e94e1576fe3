"""Apply a changeset to the host's directory.

The directory may be hostile too: another tool may be writing to it. Every parent is opened below the root without
following any link and held as a descriptor; new files are written beside their place and renamed into it; what is
replaced or deleted is first moved aside and looked at, and put back when it is not what the changeset saw. So each
path changes in one step, and never through a link.
An interrupted commit is finished by committing again: the journal says what had begun, and every step can be repeated.
Does not defend against: power loss (nothing is synced), and owners, ACLs and xattrs of replaced files, which are not
kept (as root the owner is).
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace.apply import Applier, Conflict
from sandbox.workspace.changeset import Change, Changeset
from sandbox.workspace.compare import Comparison, current_umask, name_of
from sandbox.workspace.journal import JOURNAL, Journal
from sandbox.workspace.names import ancestors, parent_of, printable, to_json
from sandbox.workspace.protected import check_allow, is_allowed

_RESOLVE = files.RESOLVE_INSIDE | files.RESOLVE_NO_XDEV
_SHOWN = 5


@dataclass(slots=True)
class CommitResult:
    """`protected` (path, rule) were left out; `failed` (path, reason) changed or went away while committing."""

    applied: list[str] = field(default_factory=list)
    protected: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything that the call changed is now in the host's directory."""
        return not (self.protected or self.failed or self.skipped)

    def to_json(self) -> dict[str, Any]:
        pairs = {"protected": self.protected, "failed": self.failed, "skipped": self.skipped}
        return {
            "applied": [to_json(path) for path in self.applied],
            **{name: [[to_json(path), why] for path, why in items] for name, items in pairs.items()},
            "complete": self.complete,
        }


def commit(changeset: Changeset, *, allow_protected: tuple[str, ...], force: bool) -> CommitResult:
    """Apply everything that is still pending and not protected; forget the changeset when nothing is left of it.

    All paths are checked before the first one changes: a conflict raises WorkspaceError with nothing applied. With
    `force` the host's version is overwritten, but a link on the way is refused all the same.
    """
    try:
        check_allow(allow_protected)
    except ValueError as error:
        raise WorkspaceError(f"allow_protected: {error}") from error
    if changeset.directory is None:
        return CommitResult(skipped=list(changeset.skipped))
    with _locked(changeset) as journal:
        root_fd = _open_root(changeset, force=force)
        try:
            committer = _Committer(changeset, root_fd, journal, force=force)
            committer.run(allow_protected)
        finally:
            os.close(root_fd)
        if not committer.result.protected and not committer.result.failed:
            changeset.discard()
    return committer.result


@contextmanager
def _locked(changeset: Changeset) -> Iterator[Journal]:
    """The journal, locked: two commits of one changeset would undo each other's steps."""
    assert changeset.directory is not None
    try:
        fd = os.open(changeset.directory / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except FileNotFoundError as error:
        raise WorkspaceError(f"the changeset {changeset.record_id} is gone: committed or discarded") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkspaceError(f"the changeset {changeset.record_id} is being committed already") from error
        yield Journal(fd, changeset.directory)
    finally:
        os.close(fd)


def _open_root(changeset: Changeset, *, force: bool) -> int:
    try:
        fd = os.open(changeset.lower_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise WorkspaceError(
            f"the workspace {printable(changeset.lower_path)} cannot be opened: {error.strerror}",
            hint="the changeset is kept; put the directory back, or discard the changeset",
        ) from error
    if os.fstat(fd).st_ino != changeset.lower_ino and not force:
        os.close(fd)
        raise WorkspaceError(
            f"{printable(changeset.lower_path)} is another directory than the one the call worked on",
            hint="commit with force if it is the right one all the same",
        )
    return fd


class _Committer:
    def __init__(self, changeset: Changeset, root_fd: int, journal: Journal, *, force: bool) -> None:
        self.result = CommitResult(skipped=list(changeset.skipped))
        self._changes = changeset.changes
        self._root_fd = root_fd
        self._journal = journal
        self._force = force
        # Our own steps change the ctime of files with several links, so it counts only before the first of them.
        self._comparison = Comparison(strict=not journal.begun, umask=current_umask())
        self._applier = Applier(changeset, self._comparison, force=force)
        self._paths = {change.path for change in changeset.changes}

    def run(self, allow: tuple[str, ...]) -> None:
        todo: list[tuple[int, Change]] = []
        for number, change in enumerate(self._changes):
            if number in self._journal.done:
                continue
            if change.protected and not is_allowed(change.protected, change.path, allow):
                self.result.protected.append((change.path, change.protected))
            else:
                todo.append((number, change))
        todo = _without_hollow_directories(todo, [path for path, _ in self.result.protected])
        self._check_all(todo)
        self._comparison.strict = False
        for number, change in ordered(todo):
            reason = self._apply(number, change)
            if reason:
                self.result.failed.append((change.path, reason))
            else:
                self._journal.finished(number)
                self.result.applied.append(change.path)

    def _check_all(self, todo: Sequence[tuple[int, Change]]) -> None:
        new_dirs = {c.path for _, c in todo if c.type == "dir" and c.kind in ("added", "modified")}
        conflicts = []
        for number, change in todo:
            try:
                self._check(number, change, new_dirs)
            except Conflict as conflict:
                if conflict.hard or not self._force:
                    conflicts.append((change.path, conflict.reason))
        if conflicts:
            shown = "; ".join(f"{printable(path)}: {reason}" for path, reason in conflicts[:_SHOWN])
            more = f" and {len(conflicts) - _SHOWN} more" if len(conflicts) > _SHOWN else ""
            raise WorkspaceError(
                f"nothing was committed, the workspace is not as the call left it: {shown}{more}",
                conflicts=tuple(conflicts),
                hint="look at the paths named; commit with force overwrites them, but never goes through a link",
            )

    def _check(self, number: int, change: Change, new_dirs: set[str]) -> None:
        if change.stale:
            raise Conflict("changed on the host while the call ran")
        try:
            parent_fd = self._open_parent(change.path)
        except (FileNotFoundError, Conflict) as error:
            if any(path in new_dirs for path in ancestors(change.path)):
                return  # the directory is still to come; its own check says whether it may
            if isinstance(error, Conflict):
                raise
            if change.kind == "deleted":
                return
            raise Conflict("its directory is gone", hard=True) from error
        try:
            self._check_target(number, change, parent_fd)
        finally:
            os.close(parent_fd)

    def _check_target(self, number: int, change: Change, parent_fd: int) -> None:
        """Raise Conflict unless what stands at the path is what the call saw there, or what we would put there."""
        name = name_of(change)
        if files.lstat_at(parent_fd, name) is None:
            if change.kind in ("modified", "mode") and number not in self._journal.begun:
                raise Conflict("is gone")
        elif self._comparison.is_applied(change, parent_fd):
            return
        elif change.before is None:
            raise Conflict("exists already")
        elif not self._comparison.is_as_before(change.before, parent_fd, name):
            raise Conflict("changed since the call")
        elif change.before.type == "dir" and (change.kind == "deleted" or change.type != "dir"):
            self._check_only_ours(change, parent_fd)

    def _check_only_ours(self, change: Change, parent_fd: int) -> None:
        fd = files.open_directory(parent_fd, name_of(change), resolve=_RESOLVE)
        try:
            with os.scandir(fd) as items:
                if any(f"{change.path}/{item.name}" not in self._paths for item in items):
                    raise Conflict("holds files that were not there")
        finally:
            os.close(fd)

    def _apply(self, number: int, change: Change) -> str:
        """Apply one change; returns why it could not be."""
        try:
            parent_fd = self._open_parent(change.path)
        except FileNotFoundError:
            return "" if change.kind == "deleted" else "its directory is gone"
        except Conflict as conflict:
            return conflict.reason
        try:
            self._journal.remove_leftovers(number, parent_fd)
            if not self._comparison.is_applied(change, parent_fd):
                if not self._force:
                    self._check_target(number, change, parent_fd)
                self._journal.starts(number)
                self._applier.apply(change, parent_fd, self._journal.temporary(number))
        except Conflict as conflict:
            return conflict.reason
        except OSError as error:
            return os.strerror(error.errno or errno.EIO)
        finally:
            os.close(parent_fd)
        return ""

    def _open_parent(self, path: str) -> int:
        try:
            return files.open_beneath(self._root_fd, parent_of(path), os.O_PATH | os.O_DIRECTORY, resolve=_RESOLVE)
        except OSError as error:
            reason = _PARENT_REASONS.get(error.errno or 0)
            if reason is None:
                raise
            raise Conflict(reason, hard=True) from error


_PARENT_REASONS = {
    errno.ELOOP: "a directory on the way is a link",
    errno.ENOTDIR: "a directory on the way is a link or a file",
    errno.EXDEV: "lies in another mount",
}


def ordered(todo: Iterable[tuple[int, Change]]) -> list[tuple[int, Change]]:
    """The order in which nothing is missing: directories before what goes in, deletions after, modes last.

    What lies below a directory that becomes a file is deleted first of all.
    """
    items = list(todo)
    replaced = {c.path for _, c in items if c.before is not None and c.before.type == "dir" and c.type != "dir"}

    def rank(item: tuple[int, Change]) -> tuple[int, int, str]:
        change = item[1]
        depth = change.path.count("/")
        if change.kind == "deleted":
            return (0 if any(path in replaced for path in ancestors(change.path)) else 3, -depth, change.path)
        if change.type == "dir":
            return (4, -depth, change.path) if change.kind == "mode" else (1, depth, change.path)
        return (2, depth, change.path)

    return sorted(items, key=rank)


def _without_hollow_directories(todo: list[tuple[int, Change]], withheld: Iterable[str]) -> list[tuple[int, Change]]:
    """Leave out new directories that only what is withheld would go into: they wait for it."""
    waiting = {above for path in withheld for above in ancestors(path)}
    used = {above for _, change in todo if change.type != "dir" for above in ancestors(change.path)}
    return [
        (number, change)
        for number, change in todo
        if not (change.type == "dir" and change.kind == "added" and change.path in waiting - used)
    ]
