"""Whether a path on the host is as a changeset saw it, or already as the changeset wants it."""

from __future__ import annotations

import hashlib
import os
import stat

from sandbox._linux import files
from sandbox.workspace.changeset import Before, Change
from sandbox.workspace.scan import entry_type


class Comparison:
    """Compares names in open directories. With `strict`, a file's ctime counts too.

    `umask` limits the modes of what a commit makes, and so what counts as applied.
    """

    def __init__(self, *, strict: bool, umask: int) -> None:
        self.strict = strict
        self._umask = umask

    def is_as_before(self, before: Before, dir_fd: int, name: str) -> bool:
        """Whether `name` is what the host had when the call ended. A directory is the same by its inode alone."""
        target = files.lstat_at(dir_fd, name)
        if target is None or entry_type(target) != before.type:
            return False
        if before.type == "dir":
            return target.st_ino == before.ino
        seen = (target.st_size, target.st_mtime_ns, target.st_ino)
        same = seen == (before.size, before.mtime_ns, before.ino)
        if same and (not self.strict or target.st_ctime_ns == before.ctime_ns):
            return True
        return bool(before.sha256) and target.st_size == before.size and _digest(dir_fd, name) == before.sha256

    def is_applied(self, change: Change, dir_fd: int) -> bool:
        """Whether the change is there already: committed before an interruption, or made by the host itself."""
        name = name_of(change)
        target = files.lstat_at(dir_fd, name)
        if change.kind == "deleted" or target is None:
            return change.kind == "deleted" and target is None
        if change.kind == "mode":
            return stat.S_IMODE(target.st_mode) & 0o777 == self.mode_for(change)
        if change.type == "symlink":
            return stat.S_ISLNK(target.st_mode) and os.readlink(name, dir_fd=dir_fd) == change.target
        if change.type == "dir":
            return stat.S_ISDIR(target.st_mode)
        is_file = stat.S_ISREG(target.st_mode) and target.st_size == change.size
        return is_file and _digest(dir_fd, name) == change.sha256

    def mode_for(self, change: Change) -> int:
        """The call's mode, as far as our umask or the file's earlier mode allow it; never a privilege bit."""
        had = change.before.mode if change.before is not None and change.before.type == change.type else 0
        return change.mode & (had | ~self._umask) & 0o777


def name_of(change: Change) -> str:
    return change.path.rpartition("/")[2]


def current_umask() -> int:
    """This process's umask, without the moment of changing it that os.umask needs. Source: proc(5), Linux 4.7."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077


def _digest(dir_fd: int, name: str) -> str:
    try:
        fd = files.open_regular(dir_fd, name)
    except OSError:
        return ""  # not readable, or no regular file: then it is not the one we know
    with open(fd, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
