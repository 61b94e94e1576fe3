"""The device program, run by a small interpreter of its instructions: what it permits and what it refuses."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox._linux import bpf, devices
from sandbox.host import HostFacts
from sandbox.supervisor.gpu import Gpus

RULES = (("c", 1, 3, "rw"), ("c", 136, None, "rw"), ("c", 195, 0, "r"), ("b", 8, 0, "rwm"))
Rule = tuple[str, int, int | None, str]


def verdict(code: bytes, kind: str, access: str, major: int, minor: int) -> int:
    """Run the program on one attempt. Knows just the instructions that the assembler uses."""
    registers = [0] * 11
    wanted = sum(bpf.ACCESSES[letter] for letter in access)
    context = (bpf.KINDS[kind] | wanted << 16, major, minor)
    at, steps = 0, 0
    while steps < 10_000:
        opcode, registers_byte, offset, imm = struct.unpack_from("=BBhi", code, at * 8)
        target, source = registers_byte & 15, registers_byte >> 4
        at, steps = at + 1, steps + 1
        match opcode:
            case 0x61:
                assert source == 1, "only the context is read"
                registers[target] = context[offset // 4]
            case 0xBF:
                registers[target] = registers[source]
            case 0xB7:
                registers[target] = imm
            case 0x57:
                registers[target] &= imm
            case 0x77:
                registers[target] >>= imm
            case 0x55:
                at += offset if registers[target] != imm else 0
            case 0x95:
                return registers[0]
            case _:
                raise AssertionError(f"unknown opcode {opcode:#x}")
    raise AssertionError("no end")


def permits(rules: tuple[Rule, ...], kind: str, access: str, major: int, minor: int) -> bool:
    """What a reader of the rules would say."""
    return any(
        (rule_kind, rule_major) == (kind, major) and rule_minor in (None, minor) and set(access) <= set(rule_access)
        for rule_kind, rule_major, rule_minor, rule_access in rules
    )


@pytest.mark.parametrize(
    ("attempt", "allowed"),
    [
        (("c", "rw", 1, 3), 1),
        (("c", "r", 1, 3), 1),
        (("c", "m", 1, 3), 0),
        (("c", "rw", 1, 4), 0),
        (("b", "rw", 1, 3), 0),
        (("c", "w", 136, 77), 1),
        (("c", "r", 195, 0), 1),
        (("c", "rw", 195, 0), 0),
        (("c", "r", 195, 1), 0),
        (("b", "rwm", 8, 0), 1),
    ],
)
def test_the_program_permits_what_a_rule_names_and_nothing_else(
    attempt: tuple[str, str, int, int], allowed: int
) -> None:
    assert verdict(bpf.device_program(RULES), *attempt) == allowed


def test_an_empty_list_refuses_everything() -> None:
    assert verdict(bpf.device_program(()), "c", "r", 1, 3) == 0


accesses = st.sets(st.sampled_from("rwm"), min_size=1).map(lambda letters: "".join(sorted(letters)))
numbers = st.integers(0, 4)
rules = st.tuples(st.sampled_from("bc"), numbers, st.none() | numbers, accesses)


@given(st.lists(rules, max_size=6).map(tuple), st.sampled_from("bc"), accesses, numbers, numbers)
def test_program_and_reader_agree(rules: tuple[Rule, ...], kind: str, access: str, major: int, minor: int) -> None:
    assert verdict(bpf.device_program(rules), kind, access, major, minor) == permits(rules, kind, access, major, minor)


def test_every_jail_has_its_own_nodes_and_no_gpu() -> None:
    base = bpf.device_program(devices.BASE)
    for minor in (3, 5, 7, 8, 9):
        assert verdict(base, "c", "rw", 1, minor) == 1
    for major, minor in ((5, 0), (5, 2), (136, 0)):
        assert verdict(base, "c", "rw", major, minor) == 1
    # NVIDIA's nodes, DRM, KFD's usual number, /dev/mem, kmsg, tun, fuse, kvm
    for major, minor in ((195, 0), (195, 255), (226, 128), (510, 0), (1, 1), (1, 11), (10, 200), (10, 229), (10, 232)):
        for access in ("r", "w", "m"):
            assert verdict(base, "c", access, major, minor) == 0, (major, minor, access)
    assert verdict(base, "b", "r", 8, 0) == 0


def test_a_rule_as_a_line_of_version_1() -> None:
    assert [devices.v1_line(rule) for rule in RULES] == ["c 1:3 rw", "c 136:* rw", "c 195:0 r", "b 8:0 rwm"]


class Jail:
    """As much of one as its admission needs; `directory` is its group in a version 1 tree."""

    def __init__(self, directory: Path) -> None:
        self.group = SimpleNamespace(v2="", v1={"devices": str(directory)})
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_a_jail_that_stands_in_for_one_that_died_is_held_to_no_gpu_either(tmp_path: Path) -> None:
    # Version 1 narrows each group by itself: one that is forgotten may open what any call on this host may be granted.
    gpu = ("c", 195, 0, "rw")
    (tmp_path / "call").mkdir()
    for name in ("devices.deny", "devices.allow", "call/devices.deny"):
        (tmp_path / name).touch()
    gpus = Gpus(HostFacts(), None)
    gpus._rules = devices.DeviceRules.open("", str(tmp_path), [gpu])
    assert gpus._rules.kind == "v1"
    made: list[Any] = [Jail(tmp_path / "call"), Jail(tmp_path / "gone")]
    assert gpus.admitted(lambda: made[0]) is made[0]
    assert (tmp_path / "call" / "devices.deny").read_text() == "c 195:0 rw"
    with pytest.raises(FileNotFoundError):
        gpus.admitted(lambda: made[1])
    assert (made[0].is_closed, made[1].is_closed) == (False, True)
    gpus.close()
