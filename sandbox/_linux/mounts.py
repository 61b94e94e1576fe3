"""Mounts by file descriptor: clone a tree, set its attributes, attach it. No policy.

The new mount API takes descriptors, so that what was checked is what gets mounted, and sets attributes on a
whole tree in one call, submounts included (the old remount reaches only the top mount).
Source: open_tree(2), mount_setattr(2) (Linux 5.12), move_mount(2), mount(2).
"""

from __future__ import annotations

import ctypes
import os

from sandbox._linux import syscalls
from sandbox._linux.bare import suppress

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

ATTR_RDONLY = 0x01
ATTR_NOSUID = 0x02
ATTR_NODEV = 0x04
ATTR_NOEXEC = 0x08
ATTR_IDMAP = 0x00100000

# Below a root the kernel answers EAGAIN to a path with ".." in it whenever something was renamed or mounted meanwhile,
# anywhere on the machine, since it cannot tell whether that mattered (openat2(2)). It is asked again.
_RACES_MAX = 1000
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 0x04
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd")]


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


def _check(name: str, what: str, result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name} {what}: {os.strerror(code)}")


def mount(source: str, target: str, fstype: str, flags: int = 0, options: str = "") -> None:
    """mount(2) with `options` as its data string."""
    result = _libc.mount(source.encode(), os.fsencode(target), fstype.encode(), flags, os.fsencode(options))
    _check("mount", target, result)


def make_private(target: str = "/") -> None:
    """Stop mounts at and below `target` from travelling between this mount namespace and others."""
    _check("mount", f"private {target}", _libc.mount(None, os.fsencode(target), None, MS_REC | MS_PRIVATE, None))


def unmount_detached(target: str) -> None:
    """Detach a mount now; it goes away when its last user does."""
    _check("umount2", target, _libc.umount2(os.fsencode(target), MNT_DETACH))


def detach_all(directory: str) -> None:
    """Detach every mount at or below `directory`, the last one first. Raises OSError when one of them stays."""
    with open("/proc/self/mountinfo", "rb") as file:
        points = [os.fsdecode(_unescaped(line.split()[4])) for line in file]
    for point in reversed(points):
        if point == directory or point.startswith(f"{directory}/"):
            unmount_detached(point)


def _unescaped(text: bytes) -> bytes:
    """A path of /proc/self/mountinfo: blanks, backslashes and the like are written as three octal digits (proc(5))."""
    first, *others = text.split(b"\\")
    return first + b"".join(bytes([int(part[:3], 8)]) + part[3:] for part in others)


def open_path(path: str, resolve: int = RESOLVE_NO_SYMLINKS, directory: int = -1, *, follow: bool = False) -> int:
    """An O_PATH descriptor of `path`, refusing symbolic links anywhere in it (ELOOP).

    Another `resolve` may allow links on the way; `follow` allows one at the end too. Source: openat2(2), Linux 5.6.
    """
    # With O_NOFOLLOW a link at the end is no error even to RESOLVE_NO_SYMLINKS: it would be opened itself.
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow or resolve & RESOLVE_NO_SYMLINKS else os.O_NOFOLLOW)
    how = _OpenHow(flags=flags, mode=0, resolve=resolve)
    at = directory if directory >= 0 else syscalls.AT_FDCWD
    arguments = (at, os.fsencode(path), ctypes.byref(how), ctypes.sizeof(how))
    for _ in range(_RACES_MAX):
        with suppress(BlockingIOError):
            return syscalls.call(f"openat2 {path}", syscalls.NR_OPENAT2, *arguments)
    return syscalls.call(f"openat2 {path}", syscalls.NR_OPENAT2, *arguments)


def clone_tree(fd: int, *, recursive: bool = True) -> int:
    """A detached copy of the mount tree at `fd`. Recursion is needed wherever a submount is locked (EINVAL)."""
    flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    return syscalls.call("open_tree", syscalls.NR_OPEN_TREE, fd, b"", flags)


def set_attributes(fd: int, attributes: int, *, userns_fd: int = -1, recursive: bool = True) -> None:
    """Set mount attributes on the (detached) tree `fd`; with `userns_fd`, map its owners through that namespace."""
    attr = _MountAttr(attr_set=attributes, userns_fd=max(userns_fd, 0))
    if userns_fd >= 0:
        attr.attr_set |= ATTR_IDMAP
    flags = syscalls.AT_EMPTY_PATH | (syscalls.AT_RECURSIVE if recursive else 0)
    syscalls.call("mount_setattr", syscalls.NR_MOUNT_SETATTR, fd, b"", flags, ctypes.byref(attr), ctypes.sizeof(attr))


def attach(fd: int, target: str) -> None:
    """Attach a detached tree at `target`, an existing file or directory."""
    syscalls.call(
        f"move_mount {target}",
        syscalls.NR_MOVE_MOUNT,
        fd,
        b"",
        syscalls.AT_FDCWD,
        os.fsencode(target),
        MOVE_MOUNT_F_EMPTY_PATH,
    )


def attach_at(fd: int, target_fd: int) -> None:
    """As `attach`, onto the very file or directory that `target_fd` holds."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | 0x40  # MOVE_MOUNT_T_EMPTY_PATH
    syscalls.call("move_mount", syscalls.NR_MOVE_MOUNT, fd, b"", target_fd, b"", flags)


def bind(source: str, target: str, attributes: int) -> None:
    """Bind `source` (no symbolic links in it) at `target` with `attributes` on the whole tree."""
    path_fd = open_path(source)
    try:
        tree = clone_tree(path_fd)
    finally:
        os.close(path_fd)
    try:
        if attributes:
            set_attributes(tree, attributes)
        attach(tree, target)
    finally:
        os.close(tree)


def remount_read_only(target: str, *, more_flags: int = 0) -> None:
    """Make the mount at `target` read-only, keeping nosuid and nodev (a user namespace may not drop them)."""
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | more_flags
    _check("mount", f"read-only {target}", _libc.mount(None, os.fsencode(target), None, flags, None))
