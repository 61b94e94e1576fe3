"""seccomp(2): install a filter, and ask what this kernel's seccomp can do. Knows nothing of policies.

Source: seccomp(2), seccomp_unotify(2), <linux/seccomp.h>.
"""

from __future__ import annotations

import ctypes
import errno
import os

from sandbox._linux.batch import Batch

_NUMBERS = {"x86_64": 317, "aarch64": 277}

_MACHINE = os.uname().machine

SET_MODE_FILTER = 1
GET_ACTION_AVAIL = 2
GET_NOTIF_SIZES = 3

FLAG_TSYNC = 1 << 0
FLAG_LOG = 1 << 1
FLAG_SPEC_ALLOW = 1 << 2
FLAG_NEW_LISTENER = 1 << 3
FLAG_TSYNC_ESRCH = 1 << 4
FLAG_WAIT_KILLABLE_RECV = 1 << 5

ACTIONS = {
    "kill_process": 0x80000000,
    "kill_thread": 0x00000000,
    "trap": 0x00030000,
    "errno": 0x00050000,
    "user_notif": 0x7FC00000,
    "trace": 0x7FF00000,
    "log": 0x7FFC0000,
    "allow": 0x7FFF0000,
}
_FLAGS = {
    "tsync": FLAG_TSYNC,
    "log": FLAG_LOG,
    "spec_allow": FLAG_SPEC_ALLOW,
    "new_listener": FLAG_NEW_LISTENER,
    "tsync_esrch": FLAG_TSYNC_ESRCH,
    # Valid only together with a listener.
    "wait_killable_recv": FLAG_WAIT_KILLABLE_RECV | FLAG_NEW_LISTENER,
}
_INSTRUCTION_BYTES = 8
_MAX_INSTRUCTIONS = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def install(
    program: bytes, *, notify: bool = False, tsync: bool = False, log: bool = False, spec_allow: bool = False
) -> int | None:
    """Put `program` (an array of struct sock_filter) over the calling thread and all that it starts, for good.

    `notify`: return a listener fd (close-on-exec) for user notifications, else None. `tsync`: over every thread of the
    process. `log`: refused calls go to the kernel's audit log. `spec_allow`: leave the processor's speculative store
    bypass as it is. Precondition: no_new_privs is set, or CAP_SYS_ADMIN held in the own user namespace.
    Raises OSError: EACCES without the precondition, EINVAL for a broken program or an unknown flag, ESRCH when a
    thread cannot be brought along, EBUSY when a listener is there already, ENOMEM for too many filters.
    """
    count = _count(program)
    flags = (
        FLAG_NEW_LISTENER * notify
        # With a listener the return value is its fd, so a thread that cannot follow is reported as ESRCH.
        | (FLAG_TSYNC | FLAG_TSYNC_ESRCH) * tsync
        | FLAG_LOG * log
        | FLAG_SPEC_ALLOW * spec_allow
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    prog = _Program(count, ctypes.cast(instructions, ctypes.c_void_p))
    result = _call("seccomp SET_MODE_FILTER", SET_MODE_FILTER, flags, ctypes.byref(prog))
    return result if notify else None


def add_install(batch: Batch, program: bytes) -> None:
    """The call that installs `program` as `install` does, without any flag."""
    count = _count(program)
    prog = _Program(count, batch.address(program))
    number = _number("seccomp SET_MODE_FILTER")
    batch.add("seccomp SET_MODE_FILTER", number, SET_MODE_FILTER, 0, batch.address(prog))


def _count(program: bytes) -> int:
    count, rest = divmod(len(program), _INSTRUCTION_BYTES)
    if rest or not 0 < count <= _MAX_INSTRUCTIONS:
        raise OSError(errno.EINVAL, f"seccomp SET_MODE_FILTER: {len(program)} bytes are no BPF program")
    return count


def probe() -> dict[str, object]:
    """What this kernel offers, without changing anything: `filter`, `actions`, `flags`.

    `filter` is false where seccomp(2) is missing or refused by a filter around us; `error` then names the errno.
    """
    facts: dict[str, object] = {"filter": False, "actions": [], "flags": [], "error": ""}
    try:
        # The kernel checks the flags first and only then reads the program: EFAULT for a null one means "known".
        facts["flags"] = [name for name, flag in _FLAGS.items() if _takes(SET_MODE_FILTER, flag, None)]
        facts["actions"] = [
            name for name, value in ACTIONS.items() if _takes(GET_ACTION_AVAIL, 0, ctypes.byref(ctypes.c_uint32(value)))
        ]
        facts["filter"] = _takes(SET_MODE_FILTER, 0, None)
    except OSError as error:
        facts["error"] = errno.errorcode.get(error.errno or 0, str(error.errno))
    return facts


def _takes(operation: int, flags: int, argument: object) -> bool:
    """Whether the kernel knows an operation, flag or action. Raises OSError when it would not even say."""
    try:
        _call("seccomp", operation, flags, argument)
    except OSError as error:
        if error.errno == errno.EFAULT:
            return True
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _number(name: str) -> int:
    number = _NUMBERS.get(_MACHINE)
    if number is None:
        raise OSError(errno.ENOSYS, f"{name}: unknown architecture {_MACHINE}")
    return number


def _call(name: str, operation: int, flags: int, argument: object) -> int:
    result: int = _libc.syscall(ctypes.c_long(_number(name)), ctypes.c_uint(operation), ctypes.c_uint(flags), argument)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


class _Version(ctypes.Structure):
    """struct scmp_version"""

    _fields_ = [(name, ctypes.c_uint) for name in ("major", "minor", "micro")]


def libseccomp_version() -> str:
    """The version of the installed libseccomp, such as "2.5.4". Raises OSError where there is none."""
    try:
        library = ctypes.CDLL("libseccomp.so.2")
        library.seccomp_version.restype = ctypes.POINTER(_Version)
        version = library.seccomp_version().contents
    except AttributeError as error:
        raise OSError(errno.ENOSYS, "libseccomp.so.2 has no seccomp_version") from error
    return f"{version.major}.{version.minor}.{version.micro}"
