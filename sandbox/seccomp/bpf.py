"""Classic BPF as seccomp uses it: decode, encode, simulate and list programs. Pure; makes no system call.

A program is an array of `struct sock_filter { u16 code; u8 jt, jf; u32 k; }`, little endian, over `struct
seccomp_data { int nr; u32 arch; u64 instruction_pointer; u64 args[6]; }`. Jumps only go forward, so every program
ends. Source: Documentation/networking/filter.rst, seccomp(2), kernel/seccomp.c (seccomp_check_filter).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

INSTRUCTION_BYTES = 8
MAX_INSTRUCTIONS = 4096  # BPF_MAXINSNS

LD_ABS, ALU_AND, RET, JA, JEQ, JGT, JGE, JSET = 0x20, 0x54, 0x06, 0x05, 0x15, 0x25, 0x35, 0x45
_NAMES = {LD_ABS: "ld", ALU_AND: "and", RET: "ret", JA: "ja", JEQ: "jeq", JGT: "jgt", JGE: "jge", JSET: "jset"}
_BRANCHES = {JEQ, JGT, JGE, JSET}
OFFSET_NR, OFFSET_ARCH = 0, 4

_ACTIONS = {"kill_process": 0x8000_0000, "notify": 0x7FC0_0000, "log": 0x7FFC_0000, "allow": 0x7FFF_0000}
_ERRNO, _TRACE = 0x0005_0000, 0x7FF0_0000


class Instruction(NamedTuple):
    code: int
    jt: int
    jf: int
    k: int


def return_value(action: str) -> int:
    """The SECCOMP_RET_* value of a policy's action. Raises ValueError for an unknown one."""
    if action in _ACTIONS:
        return _ACTIONS[action]
    number = getattr(errno, action, None)
    if not isinstance(number, int):
        raise ValueError(f"seccomp action {action!r}: not an errno name nor one of {', '.join(_ACTIONS)}")
    return _ERRNO | number


def action_name(value: int) -> str:
    """The policy's word for a SECCOMP_RET_* value."""
    for name, number in _ACTIONS.items():
        if value == number:
            return name
    if value & 0xFFFF_0000 == _ERRNO:
        number = value & 0xFFFF
        # Linux has one number for ENOTSUP and EOPNOTSUPP, and Python's table keeps the former.
        return "EOPNOTSUPP" if number == errno.EOPNOTSUPP else errno.errorcode.get(number, str(number))
    return hex(value)


def marker(index: int) -> int:
    """A return value that stands for "go on with part `index`" until `link` has resolved it. Never installed."""
    return _TRACE | index


def marker_index(value: int) -> int | None:
    """The part that a marker names, or None for any other return value."""
    return value & 0xFFFF if value & 0xFFFF_0000 == _TRACE else None


def decode(program: bytes) -> list[Instruction]:
    """Raises ValueError for bytes that are no program: a torn tail, an unknown instruction, a jump out of it."""
    if not program or len(program) % INSTRUCTION_BYTES:
        raise ValueError(f"{len(program)} bytes are no array of BPF instructions")
    code = [Instruction(*fields) for fields in struct.iter_unpack("<HBBI", program)]
    if len(code) > MAX_INSTRUCTIONS:
        raise ValueError(f"{len(code)} BPF instructions; the kernel takes {MAX_INSTRUCTIONS}")
    for at, instruction in enumerate(code):
        if instruction.code not in _NAMES:
            raise ValueError(f"instruction {at}: unknown code {instruction.code:#x}")
        if any(target >= len(code) for target in _targets(at, instruction)):
            raise ValueError(f"instruction {at}: goes past the end")
    return code


def encode(code: Sequence[Instruction]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in code)


def _targets(at: int, instruction: Instruction) -> tuple[int, ...]:
    if instruction.code == RET:
        return ()
    if instruction.code == JA:
        return (at + 1 + instruction.k,)
    if instruction.code in _BRANCHES:
        return (at + 1 + instruction.jt, at + 1 + instruction.jf)
    return (at + 1,)


class Verdict(NamedTuple):
    action: str
    steps: int
    reads_arguments: bool


def simulate(program: Sequence[Instruction], arch: int, nr: int, args: Sequence[int] = ()) -> Verdict:
    """Run a decoded program on one call, as the kernel would.

    `steps` counts instructions; `reads_arguments` tells whether the kernel can keep the answer in its bitmap of
    calls that are always allowed.
    """
    padded = [arg & 0xFFFF_FFFF_FFFF_FFFF for arg in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("<IIQ6Q", nr & 0xFFFF_FFFF, arch, 0, *padded)
    at = accumulator = steps = 0
    reads_arguments = False
    while True:
        code, jt, jf, k = program[at]
        steps += 1
        at += 1
        if code == LD_ABS:
            (accumulator,) = struct.unpack_from("<I", data, k)
            reads_arguments |= k not in (OFFSET_NR, OFFSET_ARCH)
        elif code == ALU_AND:
            accumulator &= k
        elif code == RET:
            return Verdict(action_name(k), steps, reads_arguments)
        elif code == JA:
            at += k
        else:
            at += jt if holds(code, accumulator, k) else jf


def holds(code: int, accumulator: int, k: int) -> bool:
    """Whether a branch is taken."""
    if code == JEQ:
        return accumulator == k
    if code == JGT:
        return accumulator > k
    if code == JGE:
        return accumulator >= k
    return bool(accumulator & k)


def listing(program: bytes, names: Mapping[int, str] | None = None) -> Iterator[str]:
    """One line an instruction, for people: index, name, operand, jump targets."""
    known = names or {}
    loaded = -1
    for at, instruction in enumerate(decode(program)):
        if instruction.code == LD_ABS:
            loaded = instruction.k
        operand = action_name(instruction.k) if instruction.code == RET else f"{instruction.k:#x}"
        if instruction.code == JEQ and loaded == OFFSET_NR:
            operand = known.get(instruction.k, operand)
        targets = _targets(at, instruction) if instruction.code in {*_BRANCHES, JA} else ()
        yield f"{at:4} {_NAMES[instruction.code]:4} {operand} {' '.join(map(str, targets))}".rstrip()
