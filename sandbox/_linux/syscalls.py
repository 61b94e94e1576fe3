"""System calls that Python's os module lacks, by number through libc's syscall(2). No policy.

Every function raises OSError whose text names the system call. Numbers above 423 are shared by all architectures;
the few older ones differ and stand in `_OLDER`. Source: the kernel's syscall tables, and the man page of each call.
"""

from __future__ import annotations

import ctypes
import os

# PyDLL keeps the GIL during the call. clone3 returns twice: a child that had to take the GIL back could wait for ever.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_long = ctypes.c_long

# Name -> number on x86_64, on aarch64.
_OLDER = {
    "capset": (126, 91),
    "chdir": (80, 49),
    "dup3": (292, 24),
    "fchownat": (260, 54),
    "ioctl": (16, 29),
    "keyctl": (250, 219),
    "madvise": (28, 233),
    "mkdirat": (258, 34),
    "mount": (165, 40),
    "openat": (257, 56),
    "pivot_root": (155, 41),
    "pread64": (17, 67),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "recvmsg": (47, 212),
    "sched_setattr": (314, 274),
    "setdomainname": (171, 162),
    "sethostname": (170, 161),
    "setns": (308, 268),
    "setresgid": (119, 149),
    "setresuid": (117, 147),
    "socket": (41, 198),
    "umask": (95, 166),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "write": (1, 64),
}
_COLUMNS = {"x86_64": 0, "aarch64": 1}
NR_PIDFD_SEND_SIGNAL = 424
NR_OPEN_TREE = 428
NR_MOVE_MOUNT = 429
NR_CLONE3 = 435
NR_CLOSE_RANGE = 436
NR_OPENAT2 = 437
NR_PROCESS_MADVISE = 440
NR_MOUNT_SETATTR = 442

CLONE_NEWTIME = 0x00000080
CLONE_PIDFD = 0x00001000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000
ALL_NAMESPACES = (
    CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
)

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
CLOSE_RANGE_CLOEXEC = 4


_MACHINE = os.uname().machine


def number(name: str) -> int:
    """The number of an older system call on this machine. Raises OSError (ENOSYS) on an unknown architecture."""
    column = _COLUMNS.get(_MACHINE)
    if column is None:
        raise OSError(38, f"{name}: unknown architecture {_MACHINE}")
    return _OLDER[name][column]


def call(name: str, nr: int, *args: object) -> int:
    """Make one system call. Integers are passed as C longs; bytes and ctypes objects as pointers."""
    converted = [_long(arg) if type(arg) is int else arg for arg in args]
    result: int = _libc.syscall(_long(nr), *converted)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    """Leave namespaces shared with the parent. Source: unshare(2)."""
    call("unshare", number("unshare"), flags)


def setns(fd: int, flags: int) -> None:
    """Join the namespace that `fd` names. Source: setns(2)."""
    call("setns", number("setns"), fd, flags)


def pivot_root_here() -> None:
    """Make the current directory the root and stack the old root below it. Source: pivot_root(2), "." notes."""
    call("pivot_root", number("pivot_root"), b".", b".")


def close_range(first: int, last: int, flags: int = 0) -> None:
    """Close descriptors `first` to `last`, both included. Source: close_range(2), Linux 5.9."""
    call("close_range", NR_CLOSE_RANGE, first, last, flags)


def pidfd_kill(pidfd: int, signal_nr: int) -> None:
    """Signal the very process that `pidfd` was opened for, never one that reuses its number."""
    call("pidfd_send_signal", NR_PIDFD_SEND_SIGNAL, pidfd, signal_nr, 0, 0)


def fork() -> int:
    """fork(3) with glibc's handlers; Python's own wait in the child for `after_fork_in_child`, which has to follow.

    Only for single-threaded processes: until then locks are as they were.
    """
    ctypes.pythonapi.PyOS_BeforeFork()
    pid: int = _libc.fork()
    if pid == 0:
        return 0
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"fork: {os.strerror(code)}")
    return pid


def after_fork_in_child() -> None:
    """What Python does in each child: locks made anew, `random` seeded, threads forgotten."""
    ctypes.pythonapi.PyOS_AfterFork_Child()


class _CloneArgs(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    ]


def clone(flags: int, cgroup_fd: int = -1, pid: int = 0) -> tuple[int, int]:
    """Fork with clone3(2) flags; returns (pid, pidfd) in the parent and (0, -1) in the child.

    With `cgroup_fd` (a cgroup v2 directory) the child is born inside that group: there is no window without limits.
    With `pid` it gets that number in the pid namespace (CAP_SYS_ADMIN over it; EEXIST when taken).
    Only for single-threaded processes: Python's own fork hooks run, glibc's atfork handlers do not.
    """
    pidfd = ctypes.c_int(-1)
    wanted = ctypes.c_int(pid)
    args = _CloneArgs(
        flags=flags | CLONE_PIDFD | (CLONE_INTO_CGROUP if cgroup_fd >= 0 else 0),
        pidfd=ctypes.addressof(pidfd),
        exit_signal=17,
        set_tid=ctypes.addressof(wanted) if pid else 0,
        set_tid_size=1 if pid else 0,
        cgroup=max(cgroup_fd, 0),
    )
    ctypes.pythonapi.PyOS_BeforeFork()
    try:
        pid = call("clone3", NR_CLONE3, ctypes.byref(args), ctypes.sizeof(args))
    except OSError:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        raise
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid, pidfd.value
