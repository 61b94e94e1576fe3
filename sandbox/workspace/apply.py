"""The steps of a commit: put one file, link, directory or mode in place, or take one away.

Each works in an open parent directory and changes its path in one step. What is replaced or deleted first gets a
name of our own, is looked at there, and goes back when it is not what the changeset saw.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable

from sandbox._linux import files
from sandbox.workspace.changeset import Change, Changeset
from sandbox.workspace.collect import CHUNK_BYTES, write_all
from sandbox.workspace.compare import Comparison, name_of
from sandbox.workspace.scan import entry_type


class Conflict(Exception):
    """The host's path is not what the changeset saw. `hard` ones are links and mounts, which force does not pass."""

    def __init__(self, reason: str, *, hard: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.hard = hard


_Step = Callable[[Change, int, str], None]


class Applier:
    """Applies single changes. A step gets the change, its open parent and a name nobody else uses there."""

    def __init__(self, changeset: Changeset, comparison: Comparison, *, force: bool) -> None:
        self._changeset = changeset
        self._comparison = comparison
        self._force = force

    def apply(self, change: Change, parent_fd: int, temporary: str) -> None:
        """Raises Conflict, or OSError; the path is then as it was."""
        step = {"deleted": self._remove, "mode": self._set_mode}.get(change.kind) or self._step_for_type(change)
        step(change, parent_fd, temporary)

    def _step_for_type(self, change: Change) -> _Step:
        return {"dir": self._put_directory, "symlink": self._put_link}.get(change.type, self._put_file)

    def _put_file(self, change: Change, parent_fd: int, temporary: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=parent_fd)
        try:
            self._fill(fd, change)
            target = files.lstat_at(parent_fd, name_of(change))
            if target is not None and os.geteuid() == 0:
                os.fchown(fd, target.st_uid, target.st_gid)
            os.fchmod(fd, self._comparison.mode_for(change))
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        finally:
            os.close(fd)
        self._move_into_place(change, parent_fd, temporary)

    def _fill(self, fd: int, change: Change) -> None:
        digest = hashlib.sha256()
        with open(self._changeset.content_path(change), "rb") as stored:
            while chunk := stored.read(CHUNK_BYTES):
                digest.update(chunk)
                write_all(fd, chunk)
        if digest.hexdigest() != change.sha256:
            raise Conflict("the stored contents are damaged", hard=True)

    def _put_link(self, change: Change, parent_fd: int, temporary: str) -> None:
        os.symlink(change.target, temporary, dir_fd=parent_fd)
        self._move_into_place(change, parent_fd, temporary)

    def _put_directory(self, change: Change, parent_fd: int, temporary: str) -> None:
        if files.lstat_at(parent_fd, name_of(change)) is not None:
            self._remove(change, parent_fd, temporary)
        # Our own next steps have to get in, so the owner always may; modes without u+rwx are not kept.
        os.mkdir(name_of(change), self._comparison.mode_for(change) | stat.S_IRWXU, dir_fd=parent_fd)

    def _set_mode(self, change: Change, parent_fd: int, _temporary: str) -> None:
        path_fd = files.open_beneath(parent_fd, name_of(change), os.O_PATH)
        try:
            if entry_type(os.fstat(path_fd)) != change.type:
                raise Conflict("changed while committing", hard=True)
            os.chmod(files.proc_path(path_fd), self._comparison.mode_for(change))
        finally:
            os.close(path_fd)

    def _move_into_place(self, change: Change, parent_fd: int, temporary: str) -> None:
        """Rename onto the final name; what stood there comes out under `temporary`, is looked at, and goes."""
        name = name_of(change)
        try:
            if change.before is not None and change.before.type == "dir":
                self._remove_directory(name, parent_fd)
            try:
                files.rename_noreplace(parent_fd, temporary, parent_fd, name)
                return
            except FileExistsError:
                if change.before is None and not self._force:
                    raise Conflict("appeared while committing") from None
            files.rename_exchange(parent_fd, temporary, parent_fd, name)
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        if not self._may_go(change, parent_fd, temporary):
            files.rename_exchange(parent_fd, temporary, parent_fd, name)
            os.unlink(temporary, dir_fd=parent_fd)
            raise Conflict("changed while committing")
        os.unlink(temporary, dir_fd=parent_fd)

    def _remove(self, change: Change, parent_fd: int, temporary: str) -> None:
        name = name_of(change)
        if change.before is not None and change.before.type == "dir":
            self._remove_directory(name, parent_fd)
            return
        files.rename_noreplace(parent_fd, name, parent_fd, temporary)
        if not self._may_go(change, parent_fd, temporary):
            files.rename_noreplace(parent_fd, temporary, parent_fd, name)
            raise Conflict("changed while committing")
        os.unlink(temporary, dir_fd=parent_fd)

    def _remove_directory(self, name: str, parent_fd: int) -> None:
        try:
            os.rmdir(name, dir_fd=parent_fd)
        except FileNotFoundError:
            pass  # an interrupted commit came this far
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise Conflict("holds files that stay: protected ones, or ones that were not there") from error

    def _may_go(self, change: Change, parent_fd: int, temporary: str) -> bool:
        status = files.lstat_at(parent_fd, temporary)
        if status is None or stat.S_ISDIR(status.st_mode):
            return False  # a directory nobody listed is never deleted, forced or not
        if self._force:
            return True
        return change.before is not None and self._comparison.is_as_before(change.before, parent_fd, temporary)
