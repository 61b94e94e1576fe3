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
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace.changeset import JOURNAL, Before, Change, read_journal
from sandbox.workspace.collect import CHUNK_BYTES, write_all
from sandbox.workspace.names import parent_of, printable, to_json
from sandbox.workspace.protected import check_allow, is_allowed
from sandbox.workspace.scan import entry_type

if TYPE_CHECKING:
    from sandbox.workspace.changeset import Changeset

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


class _Conflict(Exception):
    """The host's path is not what the changeset saw. `hard` ones are links and mounts, which force does not pass."""

    def __init__(self, reason: str, *, hard: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hard = hard


def commit(changeset: Changeset, *, allow_protected: tuple[str, ...], force: bool) -> CommitResult:
    """Apply everything that is still pending and not protected; forget the changeset when nothing is left of it.

    All paths are checked before the first one changes: a conflict raises WorkspaceError with nothing applied. With
    `force` the host's version is overwritten, but a link on the way is refused all the same.
    """
    try:
        check_allow(allow_protected)
    except ValueError as error:
        raise WorkspaceError(str(error)) from error
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
        self._changeset = changeset
        self._root_fd = root_fd
        self._journal = journal
        self._force = force
        # Our own steps change the ctime of files with several links, so it counts only before the first of them.
        self._strict = not journal.begun
        self._umask = _umask()
        self._paths = {change.path for change in changeset.changes}

    def run(self, allow: tuple[str, ...]) -> None:
        todo: list[tuple[int, Change]] = []
        for number, change in enumerate(self._changeset.changes):
            if number in self._journal.done:
                continue
            if change.protected and not is_allowed(change.protected, change.path, allow):
                self.result.protected.append((change.path, change.protected))
            else:
                todo.append((number, change))
        self._check_all(todo)
        self._strict = False
        for number, change in ordered(todo):
            self._apply(number, change)

    def _check_all(self, todo: Sequence[tuple[int, Change]]) -> None:
        new_dirs = {c.path for _, c in todo if c.type == "dir" and c.kind in ("added", "modified")}
        conflicts = []
        for number, change in todo:
            try:
                self._check(number, change, new_dirs)
            except _Conflict as conflict:
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
            raise _Conflict("changed on the host while the call ran")
        try:
            parent_fd = self._open_parent(change.path)
        except (FileNotFoundError, _Conflict) as error:
            if any(path in new_dirs for path in _ancestors(change.path)):
                return  # the directory is still to come; its own check says whether it may
            if isinstance(error, _Conflict):
                raise
            if change.kind == "deleted":
                return
            raise _Conflict("its directory is gone", hard=True) from error
        try:
            self._check_target(number, change, parent_fd)
        finally:
            os.close(parent_fd)

    def _check_target(self, number: int, change: Change, parent_fd: int) -> None:
        """Raise _Conflict unless what stands at the path is what the call saw there, or what we would put there."""
        target = files.lstat_at(parent_fd, _name(change))
        if target is None:
            if change.kind in ("modified", "mode") and number not in self._journal.begun:
                raise _Conflict("is gone")
            return
        if change.before is None:
            if not (change.type == "dir" and stat.S_ISDIR(target.st_mode)) and not self._is_applied(change, parent_fd):
                raise _Conflict("exists already")
            return
        if not self._is_as_before(change.before, target, parent_fd, _name(change)):
            if change.kind == "deleted" or not self._is_applied(change, parent_fd):
                raise _Conflict("changed since the call")
        elif change.kind == "deleted" and change.type == "dir":
            self._check_only_ours(change, parent_fd)

    def _check_only_ours(self, change: Change, parent_fd: int) -> None:
        fd = files.open_directory(parent_fd, _name(change), resolve=_RESOLVE)
        try:
            with os.scandir(fd) as items:
                if any(f"{change.path}/{item.name}" not in self._paths for item in items):
                    raise _Conflict("holds files that were not there")
        finally:
            os.close(fd)

    def _is_as_before(self, before: Before, target: os.stat_result, parent_fd: int, name: str) -> bool:
        if entry_type(target) != before.type:
            return False
        if before.type == "dir":
            return target.st_ino == before.ino
        seen = (target.st_size, target.st_mtime_ns, target.st_ino)
        same = seen == (before.size, before.mtime_ns, before.ino)
        if same and (not self._strict or target.st_ctime_ns == before.ctime_ns):
            return True
        return bool(before.sha256) and target.st_size == before.size and _digest(parent_fd, name) == before.sha256

    def _is_applied(self, change: Change, parent_fd: int) -> bool:
        name = _name(change)
        target = files.lstat_at(parent_fd, name)
        if change.kind == "deleted" or target is None:
            return target is None
        if change.kind == "mode":
            return stat.S_IMODE(target.st_mode) & 0o777 == self._mode_for(change)
        if change.type == "symlink":
            return stat.S_ISLNK(target.st_mode) and os.readlink(name, dir_fd=parent_fd) == change.target
        if change.type == "dir":
            return stat.S_ISDIR(target.st_mode)
        is_file = stat.S_ISREG(target.st_mode) and target.st_size == change.size
        return is_file and _digest(parent_fd, name) == change.sha256

    def _apply(self, number: int, change: Change) -> None:
        try:
            parent_fd = self._open_parent(change.path)
        except FileNotFoundError:
            if change.kind != "deleted":
                self.result.failed.append((change.path, "its directory is gone"))
                return
            self._journal.finished(number)
            self.result.applied.append(change.path)
            return
        except _Conflict as conflict:
            self.result.failed.append((change.path, conflict.reason))
            return
        try:
            self._journal.remove_leftovers(number, parent_fd)
            if not self._is_applied(change, parent_fd):
                if not self._force:
                    self._check_target(number, change, parent_fd)
                self._journal.starts(number)
                self._step_for(change)(change, parent_fd, self._journal.temporary(number))
            self._journal.finished(number)
            self.result.applied.append(change.path)
        except _Conflict as conflict:
            self.result.failed.append((change.path, conflict.reason))
        except OSError as error:
            self.result.failed.append((change.path, os.strerror(error.errno or errno.EIO)))
        finally:
            os.close(parent_fd)

    def _step_for(self, change: Change) -> Callable[[Change, int, str], None]:
        if change.kind == "deleted":
            return self._delete
        if change.kind == "mode":
            return self._set_mode
        steps = {"dir": self._put_directory, "symlink": self._put_link, "file": self._put_file}
        return steps[change.type]

    def _put_file(self, change: Change, parent_fd: int, temporary: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=parent_fd)
        try:
            self._fill(fd, change)
            target = files.lstat_at(parent_fd, _name(change))
            if target is not None and os.geteuid() == 0:
                os.fchown(fd, target.st_uid, target.st_gid)
            os.fchmod(fd, self._mode_for(change))
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        finally:
            os.close(fd)
        self._move_into_place(change, parent_fd, temporary)

    def _put_link(self, change: Change, parent_fd: int, temporary: str) -> None:
        os.symlink(change.target, temporary, dir_fd=parent_fd)
        self._move_into_place(change, parent_fd, temporary)

    def _put_directory(self, change: Change, parent_fd: int, temporary: str) -> None:
        target = files.lstat_at(parent_fd, _name(change))
        if target is not None:
            self._remove(change, parent_fd, temporary)
        # Whatever the mode, our own next steps have to get in; files in a directory without u+rwx are rare enough.
        os.mkdir(_name(change), self._mode_for(change) | stat.S_IRWXU, dir_fd=parent_fd)

    def _delete(self, change: Change, parent_fd: int, temporary: str) -> None:
        self._remove(change, parent_fd, temporary)

    def _set_mode(self, change: Change, parent_fd: int, _temporary: str) -> None:
        path_fd = files.open_beneath(parent_fd, _name(change), os.O_PATH, resolve=_RESOLVE)
        try:
            if entry_type(os.fstat(path_fd)) != change.type:
                raise _Conflict("changed while committing", hard=True)
            os.chmod(files.proc_path(path_fd), self._mode_for(change))
        finally:
            os.close(path_fd)

    def _move_into_place(self, change: Change, parent_fd: int, temporary: str) -> None:
        """Rename onto the final name; what stood there comes out under `temporary`, is looked at, and goes."""
        name = _name(change)
        try:
            if change.before is not None and change.before.type == "dir":
                self._remove(change, parent_fd, temporary + "-old")
            try:
                files.rename_noreplace(parent_fd, temporary, parent_fd, name)
                return
            except FileExistsError:
                if change.before is None and not self._force:
                    raise _Conflict("appeared while committing") from None
            files.rename_exchange(parent_fd, temporary, parent_fd, name)
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        if not self._may_go(change, parent_fd, temporary):
            files.rename_exchange(parent_fd, temporary, parent_fd, name)
            os.unlink(temporary, dir_fd=parent_fd)
            raise _Conflict("changed while committing")
        os.unlink(temporary, dir_fd=parent_fd)

    def _remove(self, change: Change, parent_fd: int, temporary: str) -> None:
        """Delete what stands at the path: moved aside first, so that it is looked at where nobody can swap it."""
        name = _name(change)
        if change.before is not None and change.before.type == "dir":
            try:
                os.rmdir(name, dir_fd=parent_fd)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise _Conflict("holds files that stay: protected ones, or ones that were not there") from error
            return
        files.rename_noreplace(parent_fd, name, parent_fd, temporary)
        if not self._may_go(change, parent_fd, temporary):
            files.rename_noreplace(parent_fd, temporary, parent_fd, name)
            raise _Conflict("changed while committing")
        os.unlink(temporary, dir_fd=parent_fd)

    def _may_go(self, change: Change, parent_fd: int, temporary: str) -> bool:
        status = files.lstat_at(parent_fd, temporary)
        if status is None or stat.S_ISDIR(status.st_mode):
            return False  # a directory nobody listed is never deleted, forced or not
        if self._force:
            return True
        return change.before is not None and self._is_as_before(change.before, status, parent_fd, temporary)

    def _fill(self, fd: int, change: Change) -> None:
        digest = hashlib.sha256()
        with open(self._changeset.content_path(change), "rb") as stored:
            while chunk := stored.read(CHUNK_BYTES):
                digest.update(chunk)
                write_all(fd, chunk)
        if digest.hexdigest() != change.sha256:
            raise _Conflict("the stored contents are damaged", hard=True)

    def _mode_for(self, change: Change) -> int:
        """The call's mode, as far as our umask or the file's earlier mode allow it."""
        had = change.before.mode if change.before is not None and change.before.type == change.type else 0
        return change.mode & (had | ~self._umask) & 0o777

    def _open_parent(self, path: str) -> int:
        try:
            return files.open_beneath(self._root_fd, parent_of(path), os.O_PATH | os.O_DIRECTORY, resolve=_RESOLVE)
        except OSError as error:
            reason = _PARENT_REASONS.get(error.errno or 0)
            if reason is None:
                raise
            raise _Conflict(reason, hard=True) from error


_PARENT_REASONS = {
    errno.ELOOP: "a directory on the way is a link",
    errno.ENOTDIR: "a directory on the way is no directory",
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
            return (0 if any(path in replaced for path in _ancestors(change.path)) else 3, -depth, change.path)
        if change.type == "dir":
            return (4, -depth, change.path) if change.kind == "mode" else (1, depth, change.path)
        return (2, depth, change.path)

    return sorted(items, key=rank)


class Journal:
    """What this and earlier commits of the changeset have begun and finished; the open file is the lock."""

    def __init__(self, fd: int, directory: Path) -> None:
        self._fd = fd
        self.done, self.begun, self._runs = read_journal(directory)
        self._run = secrets.token_hex(8)
        self._write(f"run {self._run}")

    def starts(self, number: int) -> None:
        self._write(f"begin {number}")

    def finished(self, number: int) -> None:
        self._write(f"done {number}")

    def temporary(self, number: int) -> str:
        return f".sandbox-commit-{self._run}-{number}"

    def remove_leftovers(self, number: int, parent_fd: int) -> None:
        """Unlink what an interrupted commit left beside the path. The names are random, so nobody else's match."""
        for run in self._runs if number in self.begun else ():
            for ending in ("", "-old"):
                try:
                    os.unlink(f".sandbox-commit-{run}-{number}{ending}", dir_fd=parent_fd)
                except FileNotFoundError:
                    pass  # the usual case: it was finished, or had not come that far

    def _write(self, line: str) -> None:
        # A torn last line of an interrupted commit must not swallow this one.
        write_all(self._fd, f"\n{line}\n".encode() if line.startswith("run") else f"{line}\n".encode())


def _ancestors(path: str) -> Iterator[str]:
    while path := parent_of(path):
        yield path


def _name(change: Change) -> str:
    return change.path.rpartition("/")[2]


def _digest(dir_fd: int, name: str) -> str:
    try:
        fd = files.open_regular(dir_fd, name)
    except OSError:
        return ""  # not readable, or no regular file: then it is not the one we know
    with open(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    """This process's umask, without the moment of changing it that os.umask needs. Source: proc(5), Linux 4.7."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077
