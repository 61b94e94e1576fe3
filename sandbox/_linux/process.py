"""Privileges and lifetime of the calling process: capabilities, securebits, no_new_privs, keyring, death signal.

Source: capabilities(7), prctl(2), keyctl(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from sandbox._linux import syscalls
from sandbox._linux.bare import signal, socket
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_DROP = 24
PR_SET_SECUREBITS = 28
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4
# NOROOT, NO_SETUID_FIXUP, KEEP_CAPS off, NO_CAP_AMBIENT_RAISE, each with its lock bit.
SECUREBITS_LOCKED = 0x01 | 0x02 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80
CAPABILITY_VERSION_3 = 0x20080522
KEYCTL_JOIN_SESSION_KEYRING = 1
_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(name: str, option: int, first: int = 0, second: int = 0) -> int:
    """prctl(2); `name` is for the error text."""
    result: int = _libc.prctl(option, first, second, 0, 0)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl {name}: {os.strerror(code)}")
    return result


class _SignalAction(ctypes.Structure):
    """struct sigaction of the C library."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


_SA_NOCLDSTOP = 1
_libc.sigaction.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def hear_only_of_ends() -> None:
    """No SIGCHLD for children that stop or go on, only for those that end. Until SIGCHLD's handler is set again."""
    action = _SignalAction()
    _sigaction(None, ctypes.byref(action))
    action.flags |= _SA_NOCLDSTOP
    _sigaction(ctypes.byref(action), None)


def _sigaction(new: object, old: object) -> None:
    if _libc.sigaction(signal.SIGCHLD, new, old) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"sigaction SIGCHLD: {os.strerror(code)}")


def die_with_parent() -> None:
    """Ask for SIGKILL when the thread that forked us ends. Cleared by a change of uid, so set it after that."""
    prctl("PR_SET_PDEATHSIG", PR_SET_PDEATHSIG, signal.SIGKILL)


def set_not_dumpable() -> None:
    """Close our /proc entries (mem, fd, environ) to other processes of our uid."""
    set_dumpable(dumpable=False)


def set_dumpable(*, dumpable: bool) -> None:
    """Whether other processes of our uid may look into us through /proc and ptrace."""
    prctl("PR_SET_DUMPABLE", PR_SET_DUMPABLE, int(dumpable))


def last_cap() -> int:
    """The highest capability number of this kernel."""
    with open("/proc/sys/kernel/cap_last_cap", "rb") as file:
        return int(file.read())


def drop_all_caps(highest: int) -> None:
    """Give up every Linux capability in all five sets, for good."""
    batch = Batch()
    add_drop_all_caps(batch, highest)
    batch.run()


def add_drop_all_caps(batch: Batch, highest: int) -> None:
    """The calls of `drop_all_caps`.

    The bounding set goes first (it needs CAP_SETPCAP), then securebits, ambient, and the rest in one capset.
    """
    for cap in range(highest + 1):
        batch.prctl("PR_CAPBSET_DROP", PR_CAPBSET_DROP, cap)
    batch.prctl("PR_CAP_AMBIENT", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    batch.prctl("PR_SET_SECUREBITS", PR_SET_SECUREBITS, SECUREBITS_LOCKED)
    header = batch.address(struct.pack("=Ii", CAPABILITY_VERSION_3, 0))
    batch.add("capset", syscalls.number("capset"), header, batch.address(bytes(24)))


def raise_ambient(caps: list[int]) -> None:
    """Keep exactly these capabilities of the own user namespace across the next exec.

    An exec by a uid other than 0 keeps only ambient ones, which have to be permitted and inheritable first.
    """
    low = high = 0
    for cap in caps:
        low, high = (low | 1 << cap, high) if cap < 32 else (low, high | 1 << (cap - 32))
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    data = struct.pack("=6I", low, low, low, high, high, high)
    syscalls.call("capset", syscalls.number("capset"), header, data)
    for cap in caps:
        prctl("PR_CAP_AMBIENT", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap)


def set_no_new_privs() -> None:
    """From here on, no exec gains privileges (set-uid, file capabilities)."""
    prctl("PR_SET_NO_NEW_PRIVS", PR_SET_NO_NEW_PRIVS, 1)


def add_new_session_keyring(batch: Batch, missing: Callable[[], object]) -> None:
    """Leave the inherited session keyring, which no namespace separates; `missing` where the kernel has no keyrings."""
    # ENOSYS: no keyrings in this kernel, nothing to leave. EPERM comes from a filter around us which refuses
    # keyctl altogether: the jail is refused it as well, by that same filter.
    instead = dict.fromkeys((errno.ENOSYS, errno.EPERM), missing)
    batch.add("keyctl", syscalls.number("keyctl"), KEYCTL_JOIN_SESSION_KEYRING, 0, instead=instead)


def loopback_up() -> None:
    """Bring `lo` up in the current network namespace."""
    batch = Batch()
    fd = add_loopback_up(batch)
    batch.run()
    os.close(fd.value)


def add_loopback_up(batch: Batch) -> ctypes.c_long:
    """The calls of `loopback_up`; returns where the socket's descriptor will be, which stays open.

    Source: netdevice(7).
    """
    fd = ctypes.c_long(-1)
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    batch.add("socket", syscalls.number("socket"), int(socket.AF_INET), int(kind), 0, into=fd)
    request = batch.address(struct.pack("16sh14x", b"lo", _IFF_UP))
    batch.add("ioctl SIOCSIFFLAGS lo", syscalls.number("ioctl"), fd, _SIOCSIFFLAGS, request)
    return fd


def add_host_name(batch: Batch, name: str) -> None:
    """sethostname(2) in the current UTS namespace, and an empty NIS domain name."""
    text = name.encode()
    batch.add("sethostname", syscalls.number("sethostname"), batch.address(text), len(text))
    batch.add("setdomainname", syscalls.number("setdomainname"), batch.address(b"(none)"), 6)


def add_limit(batch: Batch, name: str, resource_nr: int, value: int) -> None:
    """setrlimit(2), both the soft and the hard one."""
    pair = batch.address(struct.pack("=QQ", value, value))
    batch.add(f"prlimit {name}", syscalls.number("prlimit64"), 0, resource_nr, pair, 0)


def start_time(pid: int) -> int:
    """The start time of `pid` in clock ticks since boot: with the pid it names a process for ever on this boot."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rsplit(b")", 1)[1].split()[19])
