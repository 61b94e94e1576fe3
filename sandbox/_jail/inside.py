"""Paths as the jail will see them: looked up below the new root, so that no link leads back into the host's tree.

Another jail may be writing to a granted directory while this view is built, so nothing here looks at a path twice: it
is opened once, and what is mounted is mounted on that very descriptor. Source: openat2(2), RESOLVE_IN_ROOT.
"""

from __future__ import annotations

import errno
import os

from sandbox._linux import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox._jail.launch import Launch

_WAY = mounts.RESOLVE_IN_ROOT | mounts.RESOLVE_NO_MAGICLINKS
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


def open_root(root: str) -> int:
    return os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def open_place(root_fd: int, path: str, *, follow: bool) -> int | None:
    """An O_PATH descriptor of what `path` means inside; None where it means nothing.

    Without `follow` it means nothing when a link is anywhere in it.
    """
    resolve = _WAY if follow else _WAY | mounts.RESOLVE_NO_SYMLINKS
    try:
        return mounts.open_path(path, resolve, root_fd, follow=follow)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def make_place(launch: Launch, path: str, *, directory: bool) -> int:
    """An O_PATH descriptor of the place to mount on, made where it is missing.

    Only on file systems of our own: OSError (ESTALE) where it would be made in a tree of the host's.
    """
    root_fd = open_root(launch.root)
    ours = {os.stat(own).st_dev for own in (launch.root, f"{launch.mnt}/scratch")}
    try:
        return _make(root_fd, path, ours, directory=directory)
    finally:
        os.close(root_fd)


def _make(root_fd: int, path: str, ours: set[int], *, directory: bool) -> int:
    found = open_place(root_fd, path, follow=False)
    if found is not None:
        return found
    parent, _, name = path.rpartition("/")
    parent_fd = _make(root_fd, parent or "/", ours, directory=True)
    try:
        if os.fstat(parent_fd).st_dev not in ours:
            raise OSError(errno.ESTALE, f"{path}: gone since it was resolved")
        if directory:
            os.mkdir(name, dir_fd=parent_fd)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=parent_fd))
    finally:
        os.close(parent_fd)
    made = open_place(root_fd, path, follow=False)
    if made is None:
        raise OSError(errno.ESTALE, f"{path}: not the place that was made")
    return made
