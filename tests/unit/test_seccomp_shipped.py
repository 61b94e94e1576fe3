"""The filters that travel with the package do what their policy says, and no other policy gets one of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox.seccomp import compile as compiler
from sandbox.seccomp import policy as policies
from sandbox.seccomp import shipped
from sandbox.seccomp.numbers import NUMBERS

POLICIES = [policies.default_policy(deny_set_affinity=pinned) for pinned in (False, True)]
ARCH = os.uname().machine


def test_every_form_of_the_policy_is_shipped_and_nothing_else() -> None:
    expected = {shipped.path(policy, arch) for policy in POLICIES for arch in NUMBERS}
    found = {str(path) for path in Path(min(expected)).parent.iterdir()}
    assert found == expected, "after a change of the policy or the compiler: scripts/ship-filters"


@pytest.mark.parametrize("arch", sorted(NUMBERS))
@pytest.mark.parametrize("policy", POLICIES, ids=["default", "pinned"])
def test_shipped_programs_do_what_their_policy_says(policy: Mapping[str, Any], arch: str) -> None:
    program = shipped._read(shipped.path(policy, arch))
    assert program is not None
    compiler.verify(program, policy, arch)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The digests of the policies that had to be compiled."""
    found: list[str] = []

    def program(policy: Mapping[str, Any], **_rest: Any) -> bytes:
        found.append(policy["digest"])
        return b"compiled"

    monkeypatch.setattr(compiler, "program", program)
    return found


@pytest.mark.skipif(ARCH not in NUMBERS, reason=f"no seccomp filter for {ARCH}")
def test_a_plan_gets_the_shipped_program(compiled: list[str], tmp_path: Path) -> None:
    for policy, pinned in zip(POLICIES, (False, True), strict=True):
        program = shipped.program({"name": "default", "deny_set_affinity": pinned}, tmp_path)
        assert program == shipped._read(shipped.path(policy, ARCH))
    assert compiled == []
    assert list(tmp_path.iterdir()) == []


def test_another_policy_is_compiled(compiled: list[str], tmp_path: Path) -> None:
    policy = {name: value for name, value in POLICIES[0].items() if name != "digest"}
    policy["calls"] = {**policy["calls"], "read": "EPERM"}
    assert shipped.program(policy, tmp_path) == b"compiled"
    assert compiled == [policies.digest(policy)]


@pytest.mark.parametrize("torn", [lambda data: data[:-8], lambda data: b"", lambda data: data[:40] + b"\0" + data[41:]])
def test_a_damaged_program_is_compiled(
    torn: Any, compiled: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = shipped.path(POLICIES[0], ARCH)
    data = Path(shipped.path(POLICIES[0], "x86_64")).read_bytes()
    monkeypatch.setattr(shipped, "_DIRECTORY", str(tmp_path))
    (tmp_path / os.path.basename(name)).write_bytes(torn(data))
    assert shipped.program({"name": "default"}, tmp_path) == b"compiled"
    assert compiled == [POLICIES[0]["digest"]]
