"""The step `deny`: cover what the manifest denies, and every socket, pipe or device that lies in a granted tree.

Paths are looked up inside the new root, as the jail will see them, so that a link leads where it will lead there and
never back to the host's tree. A cover holds for a name as long as the name stays where it is: what is covered in a
tree that the jail may write gets its parent directories pinned, else the jail would rename one of them and the next
call would find the same file under a path that nobody denied.
Does not defend against: what the host itself puts in place while the call runs. A file that is replaced by renaming
another over it loses its cover, and a socket that is made later has none (unix(7), mount_namespaces(7)).
"""

from __future__ import annotations

import errno
import os
import stat

from sandbox._jail import inside
from sandbox._linux import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

DIRECTORY = "/run/sandbox/denied-directory"
FILE = "/run/sandbox/denied-file"
_ATTRIBUTES = mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV | mounts.ATTR_NOEXEC


def make_covers(launch: Launch) -> None:
    """What covers the rest: empty, and nobody inside may open it (EACCES)."""
    os.mkdir(launch.root + DIRECTORY, 0o000)
    os.close(os.open(launch.root + FILE, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o000))


def deny(launch: Launch, args: dict[str, Any]) -> None:
    """Find everything first, pin second, cover last: a pin is a copy of the tree and would uncover what lies below."""
    finder = _Finder(launch, args)
    for path in args["paths"]:
        finder.note(path)
    for tree in args["trees"]:
        finder.walk(tree)
    try:
        _pin(finder, [*finder.found, *args["pinned"]], args["writable"])
        for path, identity in finder.found.items():
            _cover(finder, path, identity)
    finally:
        os.close(finder.root)


class _Finder:
    """`found`: what to cover, real path inside to (device, inode)."""

    def __init__(self, launch: Launch, args: dict[str, Any]) -> None:
        self.found: dict[str, tuple[int, int]] = {}
        self.root = inside.open_root(launch.root)
        self._prefix = launch.root
        self._trees = args["trees"]
        self._patterns = args["patterns"]
        self._entries_left = int(args["entries_max"])

    def note(self, path: str, *, only_granted: bool = False) -> None:
        """Remember what `path` leads to. `only_granted`: links planted in a tree must not cover the system view."""
        fd = inside.open_place(self.root, path, follow=True)
        if fd is None:
            return
        try:
            real = os.readlink(f"/proc/self/fd/{fd}").removeprefix(self._prefix)
            info = os.fstat(fd)
        finally:
            os.close(fd)
        if not only_granted or any(real.startswith(f"{tree.rstrip('/')}/") for tree in self._trees):
            self.found[real] = (info.st_dev, info.st_ino)

    def walk(self, tree: str) -> None:
        """Note what is denied or is no plain file, and every directory into which we cannot look."""
        pending = [tree]
        while pending:
            directory = pending.pop()
            try:
                entries = self._list(directory)
            except PermissionError:
                self.note(directory)
                continue
            self._entries_left -= len(entries)
            if self._entries_left < 0:
                raise OSError(errno.E2BIG, f"{tree}: too many entries to check for denied paths and sockets")
            for name, kind in entries:
                path = f"{directory.rstrip('/')}/{name}"
                if _is_denied(path, tree, self._patterns):
                    self.note(path, only_granted=True)
                elif kind == "special":
                    self.note(path)
                elif kind == "directory":
                    pending.append(path)

    def _list(self, directory: str) -> list[tuple[str, str]]:
        path_fd = inside.open_place(self.root, directory, follow=False)
        if path_fd is None:
            return []
        try:
            fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            return []
        finally:
            os.close(path_fd)
        try:
            with os.scandir(fd) as entries:
                return [(entry.name, _kind(entry)) for entry in entries]
        finally:
            os.close(fd)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_dir(follow_symlinks=False):
        return "directory"
    return "plain" if entry.is_symlink() or entry.is_file(follow_symlinks=False) else "special"


def _pin(finder: _Finder, paths: list[str], writable: list[str]) -> None:
    """Mount every directory between a writable tree and one of `paths` onto itself: a mount point has its name for
    good (rename(2), EBUSY)."""
    pins: set[str] = set()
    for path in paths:
        for tree in writable:
            if path.startswith(f"{tree}/"):
                parts = path[len(tree) + 1 :].split("/")[:-1]
                pins.update(f"{tree}/{'/'.join(parts[: count + 1])}" for count in range(len(parts)))
    for path in sorted(pins, key=lambda pin: pin.count("/")):
        fd = inside.open_place(finder.root, path, follow=False)
        if fd is None:
            continue
        try:
            tree_fd = mounts.clone_tree(fd)
            try:
                mounts.attach_at(tree_fd, fd)
            finally:
                os.close(tree_fd)
        finally:
            os.close(fd)


def _cover(finder: _Finder, path: str, identity: tuple[int, int]) -> None:
    fd = inside.open_place(finder.root, path, follow=False)
    if fd is None:
        return  # gone since it was found
    try:
        info = os.fstat(fd)
        if (info.st_dev, info.st_ino) != identity:
            raise OSError(errno.ESTALE, f"{path}: replaced while it was being covered")
        source = inside.open_place(finder.root, DIRECTORY if stat.S_ISDIR(info.st_mode) else FILE, follow=False)
        assert source is not None
        try:
            tree_fd = mounts.clone_tree(source)
        finally:
            os.close(source)
        try:
            mounts.set_attributes(tree_fd, _ATTRIBUTES)
            mounts.attach_at(tree_fd, fd)
        finally:
            os.close(tree_fd)
    finally:
        os.close(fd)


def _is_denied(path: str, tree: str, patterns: list[str]) -> bool:
    """Whether a glob names `path`: `**/NAME` anywhere below a grant, or an absolute pattern; `*` spans no slash."""
    for pattern in patterns:
        full = pattern if pattern.startswith("/") else f"{tree.rstrip('/')}/{pattern}"
        if _glob_matches(path.split("/"), full.split("/")):
            return True
    return False


def _glob_matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_glob_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    # Regular expressions take longer to load than all the rest of a zygote; most jails deny nothing by pattern.
    from fnmatch import fnmatchcase

    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _glob_matches(parts[1:], pattern[1:])
