"""Compiled filters, by simulation: they say what the policy says, for every call, argument and architecture."""

from __future__ import annotations

import ctypes.util
import errno
import importlib
import os
import random
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox._linux import seccomp as linux_seccomp
from sandbox.errors import InternalError, LauncherUnavailable
from sandbox.seccomp import bpf
from sandbox.seccomp import compile as compiler
from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import AUDIT_ARCH, NUMBERS

pyseccomp = pytest.importorskip("pyseccomp", exc_type=ImportError)

POLICY = policies.default_policy()
PINNED = policies.default_policy(deny_set_affinity=True)
PROGRAMS = {
    (arch, policy["digest"]): bpf.decode(compiler.program(policy, arch=arch))
    for arch in NUMBERS
    for policy in (POLICY, PINNED)
}
NAMES = {arch: {nr: name for name, nr in numbers.items()} for arch, numbers in NUMBERS.items()}
MASK_64 = (1 << 64) - 1


def run(arch: str, nr: int, args: Sequence[int] = (), policy: dict[str, Any] = POLICY) -> bpf.Verdict:
    return bpf.simulate(PROGRAMS[arch, policy["digest"]], AUDIT_ARCH[arch], nr, args)


def interesting_words() -> list[int]:
    """Every mask and value in any guard, and their neighbours."""
    found = {0, 1, 0xF, 0xFFFF_FFFF, MASK_64, 1 << 31, 1 << 32}

    def collect(then: Any) -> None:
        if isinstance(then, str):
            return
        for rule in then["rules"]:
            for condition in rule["when"]:
                found.update((condition["value"], condition["mask"], condition["value"] + 1, condition["value"] - 1))
            collect(rule["then"])

    for then in POLICY["calls"].values():
        collect(then)
    return sorted(word & MASK_64 for word in found)


WORDS = st.one_of(
    st.sampled_from(interesting_words()),
    st.integers(0, MASK_64),
    # An interesting lower half below a random upper one, and two interesting ones mixed bit by bit.
    st.builds(
        lambda low, high: low & 0xFFFF_FFFF | high << 32, st.sampled_from(interesting_words()), st.integers(0, 9)
    ),
    st.builds(lambda a, b: (a | b) & MASK_64, st.sampled_from(interesting_words()), st.integers(0, 0xFFFF)),
)


@pytest.mark.parametrize("arch", sorted(NUMBERS))
@pytest.mark.parametrize("policy", [POLICY, PINNED], ids=["default", "pinned"])
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_program_answers_as_the_policy_does(arch: str, policy: dict[str, Any], data: st.DataObject) -> None:
    guarded = [
        NUMBERS[arch][name]
        for name, then in policy["calls"].items()
        if isinstance(then, dict) and name in NUMBERS[arch]
    ]
    nr = data.draw(st.one_of(st.sampled_from(guarded), st.integers(0, 520), st.integers(0, (1 << 30) - 1)))
    args = data.draw(st.lists(WORDS, min_size=6, max_size=6))
    assert run(arch, nr, args, policy).action == policies.evaluate(policy, NAMES[arch].get(nr, ""), args)


@pytest.mark.parametrize("arch", sorted(NUMBERS))
def test_every_number_answers_as_the_policy_does(arch: str) -> None:
    for nr in range(2048):
        for args in ((0,) * 6, (MASK_64,) * 6):
            expected = policies.evaluate(POLICY, NAMES[arch].get(nr, ""), args)
            assert run(arch, nr, args).action == expected, (nr, NAMES[arch].get(nr))


@pytest.mark.parametrize("token", [0x4000_0003, 0x4000_0028, 0, 0xFFFF_FFFF])
@pytest.mark.parametrize("arch", sorted(NUMBERS))
def test_foreign_architecture_kills_whatever_the_number(arch: str, token: int) -> None:
    others = {token, *AUDIT_ARCH.values()} - {AUDIT_ARCH[arch]}
    program = PROGRAMS[arch, POLICY["digest"]]
    for other in others:
        for nr in (*range(600), 0x4000_0000, 0xFFFF_FFFF):
            assert bpf.simulate(program, other, nr).action == "kill_process"


def test_x32_numbers_kill() -> None:
    for nr in range(600):
        assert run("x86_64", 0x4000_0000 | nr).action == "kill_process"
    assert run("x86_64", 0x7FFF_FFFF).action == "kill_process"
    assert run("x86_64", 0xFFFF_FFFE).action == "kill_process"


@pytest.mark.parametrize("arch", sorted(NUMBERS))
def test_cancelled_call_is_absent_not_foreign(arch: str) -> None:
    assert run(arch, -1).action == "ENOSYS"


@pytest.mark.parametrize("arch", sorted(NUMBERS))
def test_paths_stay_short(arch: str, record_property: pytest.RecordProperty) -> None:
    """A chain would cost 400 steps for the last number; the kernel walks every path at each installation."""
    steps = [run(arch, nr).steps for nr in NAMES[arch]]
    longest_guard = max(
        run(arch, NUMBERS[arch][name], (family, kind, protocol)).steps
        for name in ("socket", "ioctl", "personality", "mknodat")
        for family in (0, 1, 2, 10, 16, 99)
        for kind in (0, 1, 2, 3, 99)
        for protocol in (0, 6, 17, 99)
    )
    record_property("median", statistics.median(steps))
    assert statistics.median(steps) <= 12
    assert max(steps) <= 20
    assert longest_guard <= 28
    assert len(PROGRAMS[arch, POLICY["digest"]]) <= 220


def test_calls_without_a_guard_can_be_kept_in_the_kernels_bitmap() -> None:
    for nr, name in NAMES["x86_64"].items():
        assert run("x86_64", nr).reads_arguments == isinstance(POLICY["calls"][name], dict), name


def test_tree_optimisation_of_the_installed_libseccomp_takes_effect() -> None:
    def longest(optimize: int) -> int:
        filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(38))
        filter_.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, optimize)
        for nr in range(300):
            filter_.add_rule_exactly(pyseccomp.ALLOW, nr)
        with open(os.memfd_create("filter"), "w+b") as file:
            filter_.export_bpf(file)
            file.seek(0)
            code = bpf.decode(file.read())
        return max(bpf.simulate(code, pyseccomp.system_arch(), nr).steps for nr in range(300))

    assert longest(1) > 150
    assert longest(2) < 30


def test_our_numbers_are_libseccomps_where_it_knows_them() -> None:
    tokens = {"x86_64": pyseccomp.Arch.X86_64, "aarch64": pyseccomp.Arch.AARCH64}
    known = 0
    for arch, numbers in NUMBERS.items():
        for name, nr in numbers.items():
            theirs = pyseccomp.resolve_syscall(tokens[arch], name)
            assert theirs in (nr, -1), (arch, name)
            known += theirs == nr
    assert known > 650


def test_miscompiled_program_is_an_internal_error() -> None:
    code = PROGRAMS["x86_64", POLICY["digest"]]
    for at, instruction in enumerate(code):
        if instruction.code == bpf.RET:
            broken = [*code[:at], instruction._replace(k=bpf.return_value("log")), *code[at + 1 :]]
            with pytest.raises(InternalError, match="the policy says"):
                compiler.verify(bpf.encode(broken), POLICY, "x86_64")


@pytest.mark.parametrize("seed", range(2))
def test_policies_of_any_shape_compile_to_what_they_say(seed: int) -> None:
    """Answers so mixed that nothing merges: branches then reach further than the 255 instructions that a jump can."""
    draw = random.Random(seed)
    errnos = sorted(errno.errorcode.values())

    def guard(depth: int) -> Any:
        if depth == 0 or draw.random() < 0.4:
            return draw.choice(errnos)
        arg, bits = draw.randrange(2), draw.sample(range(32), 3)
        mask = sum(1 << bit for bit in bits)
        values = draw.sample([0, mask, 1 << bits[0], 1 << bits[1]], draw.randint(1, 4))
        rules = [{"when": [{"arg": arg, "mask": mask, "value": v}], "then": guard(depth - 1)} for v in values]
        return {"rules": rules, "else": draw.choice(errnos)}

    calls = {name: guard(2) for name in NUMBERS["x86_64"]}
    policy = {"name": "mixed", "unknown": "ENOSYS", "foreign_abi": "kill_process", "calls": calls}
    code = bpf.decode(compiler.program(policy, arch="x86_64"))
    assert len(code) > 1500
    for nr, name in NAMES["x86_64"].items():
        args = [draw.getrandbits(64) for _ in range(6)]
        expected = bpf.return_value(policies.evaluate(policy, name, args))
        assert bpf.simulate(code, AUDIT_ARCH["x86_64"], nr, args).action == bpf.action_name(expected)


def test_unknown_action_is_refused() -> None:
    policy = {**POLICY, "calls": {**POLICY["calls"], "read": "EWHATEVER"}}
    del policy["digest"]
    with pytest.raises(ValueError, match="EWHATEVER"):
        compiler.program(policy, arch="x86_64")


def test_unknown_architecture_is_unavailable() -> None:
    with pytest.raises(LauncherUnavailable, match="riscv64"):
        compiler.program(POLICY, arch="riscv64")


def test_missing_pyseccomp_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    with pytest.raises(LauncherUnavailable, match="pip install pyseccomp"):
        compiler.program(POLICY, arch="x86_64")


def test_missing_libseccomp_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent() -> str:
        raise OSError("libseccomp.so.2: cannot open shared object file")

    monkeypatch.setattr(linux_seccomp, "libseccomp_version", absent)
    with pytest.raises(LauncherUnavailable, match="apt install libseccomp2"):
        compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path)


def test_cache_hit_does_not_load_pyseccomp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    assert compiler.program({"name": "default"}, arch="x86_64", cache_dir=tmp_path) == first
    with pytest.raises(LauncherUnavailable):
        compiler.program(PINNED, arch="x86_64", cache_dir=tmp_path)
    with pytest.raises(LauncherUnavailable):
        compiler.program(POLICY, arch="aarch64", cache_dir=tmp_path)


def test_another_libseccomp_compiles_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path)
    monkeypatch.setattr(linux_seccomp, "libseccomp_version", lambda: "9.9.9")
    compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\x01\x00\x05\x00", b"\x00\x00\xff\x7f")),
        lambda path: path.chmod(0o666),
        lambda path: path.rename(path.with_suffix(".moved")) and path.symlink_to(path.with_suffix(".moved")),
    ],
    ids=["torn", "empty", "eperm-made-allow", "writable-by-others", "link"],
)
def test_cache_file_that_cannot_be_trusted_is_compiled_anew(damage: Any, tmp_path: Path) -> None:
    good = compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    damage(path)
    assert compiler.program(POLICY, arch="x86_64", cache_dir=tmp_path) == good
    assert not path.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_bytes()[32:] == good


def test_cache_leaves_no_other_files_and_is_private(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "seccomp"
    compiler.program(POLICY, arch="x86_64", cache_dir=folder)
    assert [path.suffix for path in folder.iterdir()] == [".bpf"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert compiler.program(POLICY, arch="x86_64", cache_dir=blocked / "below")


@pytest.mark.parametrize(
    "program",
    [b"", b"1234567", bpf.encode([bpf.Instruction(bpf.LD_ABS, 0, 0, 0)]), bpf.encode([bpf.Instruction(0x99, 0, 0, 0)])],
    ids=["empty", "torn", "runs-off-the-end", "unknown-instruction"],
)
def test_bytes_that_are_no_program_are_refused(program: bytes) -> None:
    with pytest.raises(ValueError):
        bpf.decode(program)


def test_listing_names_calls_and_answers() -> None:
    program = bpf.encode(
        [
            bpf.Instruction(bpf.LD_ABS, 0, 0, 0),
            bpf.Instruction(bpf.JEQ, 0, 1, 1),
            bpf.Instruction(bpf.RET, 0, 0, bpf.return_value("EPERM")),
            bpf.Instruction(bpf.RET, 0, 0, bpf.return_value("allow")),
        ]
    )
    lines = list(bpf.listing(program, {1: "write"}))
    assert lines == ["   0 ld   0x0", "   1 jeq  write 2 3", "   2 ret  EPERM", "   3 ret  allow"]


def test_libseccomp_is_found_where_nothing_tells_the_names_of_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.util.find_library", lambda _name: None)
    monkeypatch.delitem(sys.modules, "pyseccomp")
    with pytest.raises(RuntimeError, match="libseccomp"):
        importlib.import_module("pyseccomp")
    assert compiler._library().SyscallFilter
    assert ctypes.util.find_library("seccomp") is None, "only while it is loaded"
