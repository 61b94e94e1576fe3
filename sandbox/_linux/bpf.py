"""Programs that decide which device nodes the processes of a cgroup may open or make, attached through bpf(2).

The kernel asks such a program (type CGROUP_DEVICE) at each open and mknod of a device node, by the node's number and
not by its path; what it refuses gets EPERM. Assembled here, without a compiler. It works on any version 2 tree, also
one without controllers, and takes CAP_BPF or CAP_SYS_ADMIN in the initial user namespace.
Not defended against: descriptors that were opened before the process came under the program, or that are passed in.
Source: bpf(2), struct bpf_cgroup_dev_ctx in linux/bpf.h, Documentation/bpf/prog_cgroup_*.
"""

from __future__ import annotations

import ctypes
import os
import struct

from sandbox._linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    # (kind "c" or "b", major, minor or None for all of them, accesses out of "rwm")
    Rule = tuple[str, int, int | None, str]

_NUMBERS = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8
_PROG_TYPE_CGROUP_DEVICE = 15
_ATTACH_CGROUP_DEVICE = 6
# With it, a program on a group below takes the place of this one there; without it the kernel refuses such a one.
ALLOW_OVERRIDE = 1

KINDS = {"b": 1, "c": 2}
ACCESSES = {"m": 1, "r": 2, "w": 4}
_ALL_ACCESSES = 7
_ATTR_BYTES = 128
_LOG_BYTES = 1 << 16

# Opcodes of linux/bpf.h: load word, register and immediate arithmetic, jumps.
_LDX_W, _MOV_X, _MOV_K, _AND_K, _RSH_K = 0x61, 0xBF, 0xB7, 0x57, 0x77
_JNE_K, _JA_EXIT = 0x55, 0x95
_R0, _CONTEXT, _KIND, _ACCESS, _MAJOR, _MINOR = range(6)


def device_program(rules: Sequence[Rule]) -> bytes:
    """The program: what some rule permits is allowed, all else refused."""
    code = [
        _instruction(_LDX_W, _KIND, _CONTEXT, 0),
        _instruction(_MOV_X, _ACCESS, _KIND),
        _instruction(_AND_K, _KIND, imm=0xFFFF),
        _instruction(_RSH_K, _ACCESS, imm=16),
        _instruction(_LDX_W, _MAJOR, _CONTEXT, 4),
        _instruction(_LDX_W, _MINOR, _CONTEXT, 8),
    ]
    for rule in rules:
        code += _rule(rule)
    code += [_instruction(_MOV_K, _R0, imm=0), _instruction(_JA_EXIT)]
    return b"".join(code)


def _rule(rule: Rule) -> list[bytes]:
    kind, major, minor, accesses = rule
    permitted = sum(ACCESSES[letter] for letter in accesses)
    checks: list[tuple[int, int]] = [(_KIND, KINDS[kind]), (_MAJOR, major)]
    if minor is not None:
        checks.append((_MINOR, minor))
    # Each check jumps past what is left of this rule: the others, the three for the access, the verdict's two.
    code = [
        _instruction(_JNE_K, register, offset=len(checks) - index - 1 + 5, imm=value)
        for index, (register, value) in enumerate(checks)
    ]
    return [
        *code,
        _instruction(_MOV_X, _R0, _ACCESS),
        _instruction(_AND_K, _R0, imm=_ALL_ACCESSES & ~permitted),
        _instruction(_JNE_K, _R0, offset=2, imm=0),
        _instruction(_MOV_K, _R0, imm=1),
        _instruction(_JA_EXIT),
    ]


def _instruction(opcode: int, target: int = 0, source: int = 0, offset: int = 0, imm: int = 0) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | target, offset, imm)


def load_device_program(code: bytes) -> int:
    """A descriptor of the program, checked by the kernel's verifier; the caller closes it.

    Raises OSError: EPERM without the privilege, EINVAL or EACCES with the verifier's words.
    """
    instructions = ctypes.create_string_buffer(code, len(code))
    license_name = ctypes.create_string_buffer(b"GPL")
    log = ctypes.create_string_buffer(_LOG_BYTES)
    attr = struct.pack(
        "=IIQQIIQII16s",
        _PROG_TYPE_CGROUP_DEVICE,
        len(code) // 8,
        ctypes.addressof(instructions),
        ctypes.addressof(license_name),
        1,
        _LOG_BYTES,
        ctypes.addressof(log),
        0,
        0,
        b"toolcall_dev",
    )
    try:
        return _bpf("BPF_PROG_LOAD", _PROG_LOAD, attr)
    except OSError as error:
        words = log.value.decode("ascii", "replace").strip().replace("\n", "; ")
        raise OSError(error.errno, f"{error.strerror}{': ' + words[-500:] if words else ''}") from None


def attach_device_program(program_fd: int, group_fd: int, flags: int = 0) -> None:
    """Put the cgroup (a directory of the version 2 tree) under the program, for as long as the group exists.

    Raises OSError: EPERM also when a program on a group above permits no other below it.
    """
    _bpf("BPF_PROG_ATTACH", _PROG_ATTACH, struct.pack("=IIII", group_fd, program_fd, _ATTACH_CGROUP_DEVICE, flags))


def _bpf(name: str, command: int, attr: bytes) -> int:
    number = _NUMBERS.get(os.uname().machine)
    if number is None:
        raise OSError(38, f"{name}: unknown architecture {os.uname().machine}")
    buffer = ctypes.create_string_buffer(attr, _ATTR_BYTES)
    return syscalls.call(name, number, command, ctypes.byref(buffer), _ATTR_BYTES)
