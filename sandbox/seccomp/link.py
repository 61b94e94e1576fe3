"""Join the parts of a filter into one short program. Pure.

libseccomp compares call by call, checks the architecture and the number again in each part, and masks the upper half
of every argument away by three instructions. What the kernel pays at each installation is the length of the program
and the longest path times the number of calls, so we evaluate the parts for each number as far as they do not depend
on arguments, merge neighbouring numbers with the same rest into ranges, and write that out once: a binary tree over
ranges, below it the tests of arguments, everything equal shared. The result is verified against the policy later.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from sandbox.seccomp import bpf
from sandbox.seccomp.numbers import X32_BIT

_FULL = 0xFFFF_FFFF
_MAX_BRANCH = 255


class _Return(NamedTuple):
    value: int


class _Test(NamedTuple):
    """Compare the word at `offset`, under `mask`."""

    offset: int
    mask: int
    code: int
    k: int
    yes: _Node
    no: _Node


_Node = _Return | _Test
# What the accumulator holds: a number known now, or an argument's word under a mask.
_Accumulator = int | tuple[int, int]


class Target(NamedTuple):
    """`compiled_for` is the arch token in the parts, `arch` the one wanted; numbers above `highest` are all alike."""

    compiled_for: int
    arch: int
    has_x32: bool
    highest: int
    foreign: int
    unknown: int


def link(parts: Sequence[bytes], target: Target) -> bytes:
    """One program from parts, the first of which is the entry and the others are reached by `bpf.marker`."""
    decoded = [bpf.decode(part) for part in parts]
    rests = [(nr, _Evaluation(decoded, target.compiled_for, nr).run(0, 0, 0)) for nr in range(target.highest + 2)]
    ranges = [next(group) for _, group in groupby(rests, key=lambda item: item[1])]
    tree = _range_tree(ranges)
    foreign, unknown = _Return(target.foreign), _Return(target.unknown)
    if target.has_x32:
        # -1 is no x32 number: it is what a call becomes that a tracer has cancelled.
        high = _Test(bpf.OFFSET_NR, _FULL, bpf.JEQ, _FULL, unknown, foreign)
        tree = _Test(bpf.OFFSET_NR, _FULL, bpf.JGE, X32_BIT, high, tree)
    return _Writer().program(_Test(bpf.OFFSET_ARCH, _FULL, bpf.JEQ, target.arch, tree, foreign))


def _range_tree(ranges: Sequence[tuple[int, _Node]]) -> _Node:
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    right, left = _range_tree(ranges[middle:]), _range_tree(ranges[:middle])
    return _Test(bpf.OFFSET_NR, _FULL, bpf.JGE, ranges[middle][0], right, left)


class _Evaluation:
    """Run the parts for one call number; what depends on arguments stays as tests."""

    def __init__(self, parts: Sequence[Sequence[bpf.Instruction]], arch: int, nr: int) -> None:
        self._parts = parts
        self._known = {bpf.OFFSET_ARCH: arch, bpf.OFFSET_NR: nr}

    def run(self, part: int, at: int, accumulator: _Accumulator) -> _Node:
        while True:
            code, jt, jf, k = self._parts[part][at]
            at += 1
            if code == bpf.RET:
                next_part = bpf.marker_index(k)
                if next_part is None:
                    return _Return(k)
                if next_part <= part:
                    raise ValueError(f"part {part} goes back to part {next_part}")
                part, at = next_part, 0
            elif code == bpf.LD_ABS:
                accumulator = self._known.get(k, (k, _FULL))
            elif code == bpf.ALU_AND:
                accumulator = _masked(accumulator, k)
            elif code == bpf.JA:
                at += k
            elif isinstance(accumulator, int):
                at += jt if bpf.holds(code, accumulator, k) else jf
            else:
                yes, no = self.run(part, at + jt, accumulator), self.run(part, at + jf, accumulator)
                return yes if yes == no else _Test(*accumulator, code, k, yes, no)


def _masked(accumulator: _Accumulator, mask: int) -> _Accumulator:
    if isinstance(accumulator, int):
        return accumulator & mask
    offset, old = accumulator
    return (offset, old & mask) if old & mask else 0


class _Writer:
    """Writes a program from its last instruction to its first, since jumps only go forward.

    Places are counted from the end. `_placed` knows where each node already stands, with and without the load in
    front; chains of tests on the same word load it once.
    """

    def __init__(self) -> None:
        self._reversed: list[bpf.Instruction] = []
        self._placed: dict[tuple[_Node, bool], int] = {}

    def program(self, root: _Node) -> bytes:
        self._place(root, None)
        return bpf.encode(self._reversed[::-1])

    def _place(self, node: _Node, held: tuple[int, int] | None) -> tuple[_Node, bool]:
        """Make sure that `node` is written, for a predecessor whose accumulator holds `held`; returns its key."""
        if isinstance(node, _Return):
            key: tuple[_Node, bool] = (node, False)
            if key not in self._placed:
                self._add(key, bpf.Instruction(bpf.RET, 0, 0, node.value))
            return key
        word = (node.offset, node.mask)
        key = (node, word != held)
        if key in self._placed:
            return key
        if word == held:
            self._branch(node, word)
            return key
        self._jump_to(self._place(node, word))
        if node.mask != _FULL:
            self._reversed.append(bpf.Instruction(bpf.ALU_AND, 0, 0, node.mask))
        self._add(key, bpf.Instruction(bpf.LD_ABS, 0, 0, node.offset))
        return key

    def _branch(self, node: _Test, word: tuple[int, int]) -> None:
        keys = self._place(node.no, word), self._place(node.yes, word)
        while any(self._distance(key) > _MAX_BRANCH for key in keys):
            for key in keys:
                if self._distance(key) > _MAX_BRANCH:
                    self._repeat(key)
        no, yes = (self._distance(key) for key in keys)
        self._add((node, False), bpf.Instruction(node.code, yes, no, node.k))

    def _jump_to(self, key: tuple[_Node, bool]) -> None:
        """Go to `key` from the next instruction written; nothing to do when it is the one just written."""
        if self._distance(key):
            self._reversed.append(bpf.Instruction(bpf.JA, 0, 0, self._distance(key)))

    def _repeat(self, key: tuple[_Node, bool]) -> None:
        """Bring a place within reach of a branch: a return once more, anything else by a jump."""
        node, _ = key
        if isinstance(node, _Return):
            self._add(key, bpf.Instruction(bpf.RET, 0, 0, node.value))
        else:
            self._add(key, bpf.Instruction(bpf.JA, 0, 0, self._distance(key)))

    def _distance(self, key: tuple[_Node, bool]) -> int:
        return len(self._reversed) - 1 - self._placed[key]

    def _add(self, key: tuple[_Node, bool], instruction: bpf.Instruction) -> None:
        self._placed[key] = len(self._reversed)
        self._reversed.append(instruction)
