"""Landlock: a process forbids itself, and all that it starts, what no rule grants. Knows nothing of manifests.

What it does not see: connecting to path sockets, descriptors opened before, chdir, stat and other metadata calls, and
any protocol but TCP; namespaces and mounts are the first wall, this is the second. UDP, chmod, chown and setxattr have
no right of their own. Source: landlock(7), <linux/landlock.h>, Documentation/userspace-api/landlock.rst.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# The same numbers on every architecture.
_NR_CREATE_RULESET, _NR_ADD_RULE, _NR_RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2
HIGHEST_ABI = 7

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15

NET_BIND_TCP = 1 << 0
NET_CONNECT_TCP = 1 << 1

SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
SCOPE_SIGNAL = 1 << 1

# Rights that an ABI adds: file system, network, scope. 7 adds only flags about logging.
_ADDED = {
    1: ((1 << 13) - 1, 0, 0),
    2: (REFER, 0, 0),
    3: (TRUNCATE, 0, 0),
    4: (0, NET_BIND_TCP | NET_CONNECT_TCP, 0),
    5: (IOCTL_DEV, 0, 0),
    6: (0, 0, SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL),
    7: (0, 0, 0),
}
# What a rule may grant. Device nodes are in none of them: nobody gets to make those.
ACCESS = {
    "read": READ_FILE | READ_DIR,
    "exec": EXECUTE,
    "write": (
        WRITE_FILE
        | TRUNCATE
        | REMOVE_DIR
        | REMOVE_FILE
        | MAKE_DIR
        | MAKE_REG
        | MAKE_SOCK
        | MAKE_FIFO
        | MAKE_SYM
        # Without it no file moves or gets linked from one directory to another, not even below one grant.
        | REFER
    ),
    "ioctl": IOCTL_DEV,
}
# The kernel refuses the others (EINVAL) in a rule for something that is no directory.
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _RulesetAttr(ctypes.Structure):
    """struct landlock_ruleset_attr; older kernels take a prefix, and a longer one when the rest is zero."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("handled_access_fs", "handled_access_net", "scoped")]


class _PathBeneathAttr(ctypes.Structure):
    """struct landlock_path_beneath_attr"""

    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


class _NetPortAttr(ctypes.Structure):
    """struct landlock_net_port_attr"""

    _fields_ = [("allowed_access", ctypes.c_uint64), ("port", ctypes.c_uint64)]


def rights(abi: int) -> tuple[int, int, int]:
    """All rights that exist up to `abi`: file system, network, scope."""
    levels = [_ADDED[level] for level in range(1, min(abi, HIGHEST_ABI) + 1)]
    filesystem = network = scope = 0
    for added in levels:
        filesystem, network, scope = filesystem | added[0], network | added[1], scope | added[2]
    return filesystem, network, scope


def abi_version() -> int:
    """The kernel's Landlock ABI; 0 where it is not built in, switched off at boot, or refused by a filter around us."""
    try:
        return _call("landlock_create_ruleset", _NR_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
            return 0
        raise


def restrict(
    rules: Iterable[tuple[str | int, Iterable[str]]],
    abi: int,
    *,
    scoped: bool = True,
    missing_ok: bool = False,
    bind_ports: Iterable[int] | None = None,
    connect_ports: Iterable[int] | None = None,
) -> None:
    """Forbid the calling thread, and all that it starts, every file access that no rule grants.

    A rule is (path or descriptor, names from `ACCESS`) and holds for everything below. Paths are opened here, with
    O_PATH, and may be links. Every right of `abi` is handled; what the kernel lacks beyond it stays open. `scoped`:
    from ABI 6 no signal and no abstract socket reaches a process outside. With port lists (ABI 4) TCP is refused but
    for these ports; None leaves it alone. Precondition: no_new_privs is set, or CAP_SYS_ADMIN held.
    `missing_ok`: a rule for a path that is not there grants nothing.
    Raises OSError that names the call and the path: ENOENT for a path that is not there, EPERM without the
    precondition, E2BIG after 16 layers, EINVAL when `abi` is above the kernel's. Nothing is restricted then.
    """
    fd = ruleset(rules, abi, scoped=scoped, missing_ok=missing_ok, bind_ports=bind_ports, connect_ports=connect_ports)
    try:
        _call("landlock_restrict_self", _NR_RESTRICT_SELF, fd, 0)
    finally:
        os.close(fd)


def ruleset(
    rules: Iterable[tuple[str | int, Iterable[str]]],
    abi: int,
    *,
    scoped: bool = True,
    missing_ok: bool = False,
    bind_ports: Iterable[int] | None = None,
    connect_ports: Iterable[int] | None = None,
) -> int:
    """A descriptor of the rules, which hold for nobody yet; arguments and errors as for `restrict`."""
    filesystem, network, scope = rights(abi)
    ports = {NET_BIND_TCP: bind_ports, NET_CONNECT_TCP: connect_ports}
    handled_network = sum(right for right, numbers in ports.items() if numbers is not None)
    if handled_network & ~network:
        raise OSError(errno.EOPNOTSUPP, f"landlock: TCP rules need ABI 4, this is {abi}")
    attr = _RulesetAttr(filesystem, handled_network, scope if scoped else 0)
    fd = _call("landlock_create_ruleset", _NR_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)
    try:
        for target, access in rules:
            allowed = 0
            for name in access:
                allowed |= ACCESS[name] & filesystem
            _add_path(fd, target, allowed, missing_ok=missing_ok)
        for right, numbers in ports.items():
            for port in numbers or ():
                _add(fd, _RULE_NET_PORT, _NetPortAttr(right, port), f"TCP port {port}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def add_restrict(batch: Batch, rules: Iterable[tuple[str, Iterable[str]]], abi: int) -> None:
    """The calls of `restrict` with `missing_ok`, for paths of the kind that they have now; leaves descriptors open."""
    filesystem, _, scope = rights(abi)
    fd = ctypes.c_long(-1)
    attr = _RulesetAttr(filesystem, 0, scope)
    size = ctypes.sizeof(attr)
    batch.add("landlock_create_ruleset", _NR_CREATE_RULESET, batch.address(attr), size, 0, into=fd)
    for path, access in rules:
        allowed = 0
        for name in access:
            allowed |= ACCESS[name] & filesystem
        if os.path.exists(path) and not os.path.isdir(path):
            allowed &= _FILE_RIGHTS
        if not allowed:
            continue  # such as "ioctl" before ABI 5: the kernel refuses an empty rule (ENOMSG)
        rule = _PathBeneathAttr(allowed, -1)
        path_fd = ctypes.c_int.from_buffer(rule, _PathBeneathAttr.parent_fd.offset)
        batch.open(path, os.O_PATH, into=path_fd, instead={errno.ENOENT: None})
        # A rule for a path that is not there has the descriptor -1 (EBADF): it grants nothing.
        args = (fd, _RULE_PATH_BENEATH, batch.address(rule), 0)
        batch.add(f"landlock_add_rule {path}", _NR_ADD_RULE, *args, instead={errno.EBADF: None})
    batch.add("landlock_restrict_self", _NR_RESTRICT_SELF, fd, 0)


def _add_path(ruleset: int, target: str | int, allowed: int, *, missing_ok: bool) -> None:
    if not allowed:
        return  # such as "ioctl" before ABI 5: the kernel refuses an empty rule (ENOMSG)
    if isinstance(target, int):
        fd, name = target, f"descriptor {target}"
    else:
        name = target
        try:
            fd = os.open(target, os.O_PATH | os.O_CLOEXEC)
        except OSError as error:
            if missing_ok and error.errno == errno.ENOENT:
                return
            raise OSError(error.errno, f"open {target} for landlock_add_rule: {error.strerror}") from error
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            allowed &= _FILE_RIGHTS
        if allowed:
            _add(ruleset, _RULE_PATH_BENEATH, _PathBeneathAttr(allowed, fd), name)
    finally:
        if fd != target:
            os.close(fd)


def _add(ruleset: int, kind: int, attr: ctypes.Structure, name: str) -> None:
    _call(f"landlock_add_rule {name}", _NR_ADD_RULE, ruleset, kind, ctypes.byref(attr), 0)


def _call(name: str, number: int, *args: object) -> int:
    converted = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
