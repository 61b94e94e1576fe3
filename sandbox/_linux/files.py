"""Files beneath a directory that hostile programs wrote: open, look, rename, without ever following a link. No policy.

Everything starts from a descriptor. A path is resolved by openat2(2) in the kernel, so there is no moment between
check and use; what was opened is asked for its type through the descriptor. Names are str in the file system
encoding with surrogateescape, as the os module gives them.
Source: openat2(2) (Linux 5.6), renameat2(2), open(2) on O_PATH, proc(5) on /proc/self/fd, xattr(7).
Does not defend against: a host owner who moves directories about meanwhile (the descriptors stay with what they held).
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from sandbox._linux import syscalls

RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_INSIDE = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS

RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

# Paths are handed to the kernel whole; one component fewer than PATH_MAX leaves room for a name to be added.
PATH_BYTES_MAX = 4096 - 256

_RENAMEAT2 = {"x86_64": 316, "aarch64": 276}
# The kernel answers EAGAIN when a rename elsewhere made it impossible to prove that ".." stayed beneath.
_EAGAIN_TRIES = 64
SECURITY_CAPABILITY = "security.capability"


class _OpenHow(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("flags", "mode", "resolve")]


def open_beneath(dir_fd: int, path: str, flags: int, mode: int = 0, *, resolve: int = RESOLVE_INSIDE) -> int:
    """Open `path` below `dir_fd`: no link anywhere in it, no way out (ELOOP, EXDEV). "" and "." are `dir_fd` itself."""
    how = _OpenHow(flags=flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode=mode, resolve=resolve)
    encoded = os.fsencode(path or ".")
    for attempt in range(_EAGAIN_TRIES):
        try:
            return syscalls.call("openat2", syscalls.NR_OPENAT2, dir_fd, encoded, ctypes.byref(how), ctypes.sizeof(how))
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EINTR) or attempt == _EAGAIN_TRIES - 1:
                raise
    raise AssertionError("unreachable")


def open_directory(dir_fd: int, path: str = "", *, resolve: int = RESOLVE_INSIDE) -> int:
    """A readable descriptor of the directory `path` below `dir_fd`."""
    return open_beneath(dir_fd, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK, resolve=resolve)


def open_regular(dir_fd: int, path: str, *, resolve: int = RESOLVE_INSIDE) -> int:
    """Open a regular file for reading; OSError on a link (ELOOP) and any other type (EINVAL), which is never opened.

    A fifo would block the opener and a device acts on being opened, so the type is asked through O_PATH, which
    opens nothing, and that very file is then opened through /proc/self/fd.
    """
    path_fd = open_beneath(dir_fd, path, os.O_PATH, resolve=resolve)
    try:
        mode = os.fstat(path_fd).st_mode
        if not stat.S_ISREG(mode):
            # With O_PATH and O_NOFOLLOW even RESOLVE_NO_SYMLINKS opens a link itself when it comes last.
            raise OSError(errno.ELOOP if stat.S_ISLNK(mode) else errno.EINVAL, "openat2: not a regular file")
        return reopen(path_fd, os.O_RDONLY | os.O_NONBLOCK)
    finally:
        os.close(path_fd)


def proc_path(fd: int) -> str:
    """A path that means exactly what `fd` holds. For calls that take no descriptor, or refuse an O_PATH one."""
    return f"/proc/self/fd/{fd}"


def reopen(path_fd: int, flags: int) -> int:
    """Open what an O_PATH descriptor holds, whatever its name means by now."""
    return os.open(proc_path(path_fd), flags | os.O_CLOEXEC | os.O_NOCTTY)


def rename_noreplace(old_dir_fd: int, old: str, new_dir_fd: int, new: str) -> None:
    """Rename; OSError (EEXIST) when `new` exists, as whatever type."""
    _renameat2(old_dir_fd, old, new_dir_fd, new, RENAME_NOREPLACE)


def rename_exchange(old_dir_fd: int, old: str, new_dir_fd: int, new: str) -> None:
    """Swap two names in one step. OSError (EINVAL) where the file system cannot."""
    _renameat2(old_dir_fd, old, new_dir_fd, new, RENAME_EXCHANGE)


def _renameat2(old_dir_fd: int, old: str, new_dir_fd: int, new: str, flags: int) -> None:
    nr = _RENAMEAT2.get(os.uname().machine)
    if nr is None:
        raise OSError(errno.ENOSYS, f"renameat2: unknown architecture {os.uname().machine}")
    syscalls.call("renameat2", nr, old_dir_fd, os.fsencode(old), new_dir_fd, os.fsencode(new), flags)


def lstat_at(dir_fd: int, name: str) -> os.stat_result | None:
    """What `name` in `dir_fd` is, links themselves included; None when it is not there."""
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError):
        return None


def get_xattr(fd: int, name: str) -> bytes | None:
    """An extended attribute by descriptor (O_PATH too), or None where there is none or the file system has none."""
    try:
        return os.getxattr(proc_path(fd), name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES):
            return None
        raise


def drop_privilege_bits(path_fd: int) -> tuple[str, ...]:
    """Take set-uid, set-gid and file capabilities from what `path_fd` (O_PATH) holds; returns what was taken.

    Raises OSError (EPERM) when a capability cannot be taken away: the file belongs to somebody else.
    """
    dropped: list[str] = []
    status = os.fstat(path_fd)
    bits = status.st_mode & (stat.S_ISUID | stat.S_ISGID)
    if bits:
        os.chmod(proc_path(path_fd), stat.S_IMODE(status.st_mode) & ~bits)
        dropped += [name for name, bit in (("set-uid", stat.S_ISUID), ("set-gid", stat.S_ISGID)) if bits & bit]
    if stat.S_ISREG(status.st_mode) and get_xattr(path_fd, SECURITY_CAPABILITY) is not None:
        _drop_file_capability(path_fd)
        dropped.append("file-capability")
    return tuple(dropped)


def _drop_file_capability(path_fd: int) -> None:
    try:
        os.removexattr(proc_path(path_fd), SECURITY_CAPABILITY)
        return
    except PermissionError:
        pass  # An owner without CAP_SETFCAP may not remove it, but any truncate takes it away: notify_change().
    status = os.fstat(path_fd)
    if not status.st_mode & stat.S_IWUSR:
        os.chmod(proc_path(path_fd), stat.S_IMODE(status.st_mode) | stat.S_IWUSR)
    fd = reopen(path_fd, os.O_WRONLY | os.O_NONBLOCK)
    try:
        os.ftruncate(fd, status.st_size)
    finally:
        os.close(fd)
    if not status.st_mode & stat.S_IWUSR:
        os.chmod(proc_path(path_fd), stat.S_IMODE(status.st_mode))
    if get_xattr(path_fd, SECURITY_CAPABILITY) is not None:
        raise OSError(errno.EPERM, "ftruncate: the file capability stayed")
