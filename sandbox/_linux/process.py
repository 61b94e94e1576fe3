"""Privileges and lifetime of the calling process: capabilities, securebits, no_new_privs, keyring, death signal.

Source: capabilities(7), prctl(2), keyctl(2), user_namespaces(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct

from sandbox._linux import syscalls

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
    """Give up every Linux capability in all five sets, for good.

    The bounding set goes first (it needs CAP_SETPCAP), then securebits, ambient, and the rest in one capset.
    """
    for cap in range(highest + 1):
        prctl("PR_CAPBSET_DROP", PR_CAPBSET_DROP, cap)
    prctl("PR_CAP_AMBIENT", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    prctl("PR_SET_SECUREBITS", PR_SET_SECUREBITS, SECUREBITS_LOCKED)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    syscalls.call("capset", syscalls.number("capset"), header, bytes(24))


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


def join_new_session_keyring() -> bool:
    """Leave the inherited session keyring, which no namespace separates. False where the kernel has no keyrings."""
    try:
        syscalls.call("keyctl", syscalls.number("keyctl"), KEYCTL_JOIN_SESSION_KEYRING, 0)
    except OSError as error:
        # ENOSYS: no keyrings in this kernel, nothing to leave. EPERM comes from a filter around us which refuses
        # keyctl altogether: the jail is refused it as well, by that same filter.
        if error.errno in (errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


def loopback_up() -> None:
    """Bring `lo` up in the current network namespace. Source: netdevice(7)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        request = struct.pack("16sh14x", b"lo", _IFF_UP)
        try:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, request)
        except OSError as error:
            raise OSError(error.errno, f"ioctl SIOCSIFFLAGS lo: {error.strerror}") from error


def set_host_name(name: str) -> None:
    """sethostname(2) in the current UTS namespace, and an empty NIS domain name."""
    socket.sethostname(name)
    if _libc.setdomainname(b"(none)", 6) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setdomainname: {os.strerror(code)}")


def start_time(pid: int) -> int:
    """The start time of `pid` in clock ticks since boot: with the pid it names a process for ever on this boot."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rsplit(b")", 1)[1].split()[19])
