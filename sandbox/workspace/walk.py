"""Walk a hostile tree by descriptors, in bounded memory, and remove one.

A walk holds one descriptor at a time and keeps names, not whole paths, of what is still to be visited: a tree of a
million directories costs the length of its names. Directories deeper than `DEPTH_MAX`, or whose path does not fit
into PATH_MAX, are not entered; they come out with `too_deep` set, and whoever walks decides what becomes of them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from sandbox._linux import files
from sandbox.workspace.names import join

# Time per directory grows with its depth, and a tool can move a wide tree down for the price of one rename.
DEPTH_MAX = 256

# Pending directories are linked to their parents, so that siblings share everything but the last name.
_Node = tuple["_Node | None", str]


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in an open directory, with what `lstat` says of it."""

    path: str
    name: str
    status: os.stat_result
    too_deep: bool = False

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A directory that could not be entered, and why: an errno's name."""

    path: str
    reason: str


class Directory:
    """One open directory of a walk; `fd` is valid until the walk goes on.

    The walk enters the subdirectories that `entries` came across, apart from those named to `do_not_enter`.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.fd = fd
        self._found: list[str] = []
        self._skipped: set[str] = set()

    def entries(self) -> Iterator[Entry]:
        at_bottom = self.path.count("/") + 2 > DEPTH_MAX
        with os.scandir(self.fd) as names:
            for item in names:
                status = files.lstat_at(self.fd, item.name)
                if status is None:
                    continue
                path = join(self.path, item.name)
                is_dir = stat.S_ISDIR(status.st_mode)
                too_deep = is_dir and (at_bottom or len(os.fsencode(path)) > files.PATH_BYTES_MAX)
                if is_dir and not too_deep:
                    self._found.append(item.name)
                yield Entry(path, item.name, status, too_deep)

    def stay_out(self, entry: Entry, apart: Container[tuple[int, int]]) -> bool:
        """Whether `entry` is a directory of those in `apart`, (device, inode), which the walk then does not enter."""
        if not apart or not entry.is_dir or (entry.status.st_dev, entry.status.st_ino) not in apart:
            return False
        self.do_not_enter(entry.name)
        return True

    def do_not_enter(self, name: str) -> None:
        self._skipped.add(name)

    def to_enter(self) -> Iterator[str]:
        return (name for name in self._found if name not in self._skipped)


def walk(
    root_fd: int, *, resolve: int = files.RESOLVE_INSIDE, unlock: Callable[[str], bool] | None = None
) -> Iterator[Directory | Unreadable]:
    """Each directory below `root_fd`, parents first, the root as "".

    A directory that forbids its owner to read it is opened up (u+rwx) where `unlock` says that its path may be.
    """
    pending: list[_Node] = [(None, "")]
    while pending:
        node = pending.pop()
        path = _path_of(node)
        try:
            fd = _open(root_fd, path, resolve, unlock)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Unreadable(path, errno.errorcode.get(error.errno or 0, "EIO"))
            continue
        try:
            directory = Directory(path, fd)
            yield directory
            pending.extend((node, name) for name in directory.to_enter())
        finally:
            os.close(fd)


def _path_of(node: _Node) -> str:
    parts: list[str] = []
    current: _Node | None = node
    while current is not None:
        parts.append(current[1])
        current = current[0]
    return "/".join(reversed(parts)).lstrip("/")


def _open(root_fd: int, path: str, resolve: int, unlock: Callable[[str], bool] | None) -> int:
    try:
        return files.open_directory(root_fd, path, resolve=resolve)
    except PermissionError:
        if unlock is None or not unlock(path):
            raise
    path_fd = files.open_beneath(root_fd, path, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
    try:
        open_up(path_fd)
        return files.reopen(path_fd, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(path_fd)


def open_up(path_fd: int) -> None:
    """Let the owner read and enter a directory again. Raises PermissionError when it is not ours."""
    mode = stat.S_IMODE(os.fstat(path_fd).st_mode)
    if mode & stat.S_IRWXU != stat.S_IRWXU:
        os.chmod(files.proc_path(path_fd), mode | stat.S_IRWXU)


def remove(dir_fd: int, name: str) -> None:
    """Remove `name` from `dir_fd` whatever it is and however deep; a link is removed, not followed.

    A directory is emptied by moving the contents of its subdirectories up into it, so no depth needs a long path, a
    recursion or more than three descriptors, and each name is moved once.
    """
    status = files.lstat_at(dir_fd, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=dir_fd)
        return
    fd = _open_to_empty(dir_fd, name)
    try:
        while _empty_one_level(fd):
            pass
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=dir_fd)


def _open_to_empty(dir_fd: int, name: str) -> int:
    path_fd = files.open_beneath(dir_fd, name, os.O_PATH | os.O_DIRECTORY)
    try:
        open_up(path_fd)
        return files.reopen(path_fd, os.O_RDONLY | os.O_DIRECTORY)
    finally:
        os.close(path_fd)


def _empty_one_level(fd: int) -> bool:
    """Unlink what is no directory, replace each directory by its contents. Returns whether anything is left."""
    with os.scandir(fd) as items:
        names = [item.name for item in items]
    for name in names:
        status = files.lstat_at(fd, name)
        if status is None:
            continue
        if not stat.S_ISDIR(status.st_mode):
            os.unlink(name, dir_fd=fd)
            continue
        sub_fd = _open_to_empty(fd, name)
        try:
            _lift_contents(sub_fd, fd)
        finally:
            os.close(sub_fd)
        os.rmdir(name, dir_fd=fd)
    return bool(names)


def _lift_contents(sub_fd: int, fd: int) -> None:
    with os.scandir(sub_fd) as items:
        names = [item.name for item in items]
    for name in names:
        status = files.lstat_at(sub_fd, name)
        if status is None:
            continue
        if stat.S_ISDIR(status.st_mode):
            os.close(_open_to_empty(sub_fd, name))  # a directory that we may not write cannot change its parent
            files.rename_noreplace(sub_fd, name, fd, f".removing-{os.urandom(8).hex()}")
        else:
            os.unlink(name, dir_fd=sub_fd)


def remove_path(path: str) -> None:
    """Remove a file or a whole directory of ours. Raises OSError."""
    parent, name = os.path.split(path)
    parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        remove(parent_fd, name)
    finally:
        os.close(parent_fd)
