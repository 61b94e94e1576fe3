"""The Docker form of the policy, compiled the way a container runtime does it, answers as the policy does."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.seccomp import bpf, docker
from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import AUDIT_ARCH, NUMBERS

pyseccomp = pytest.importorskip("pyseccomp", exc_type=ImportError)

POLICY = policies.default_policy()
GUARDED = sorted(name for name, then in POLICY["calls"].items() if isinstance(then, dict))
WORDS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 6, 8, 10, 16, 17, 28, 35, 0x40, 0x5412, 0x5413, 0x20008, 0o4755, 0o104644, 0o20000]),
    st.integers(0, (1 << 64) - 1),
    st.builds(lambda bit: 1 << bit, st.integers(0, 63)),
    st.integers(0, 0xFFFF),
)


def answer(profile: dict[str, Any], name: str, args: Sequence[int]) -> list[str]:
    """Every answer that some entry of the profile gives; a runtime may pick any."""
    words = {38: "ENOSYS", "SCMP_ACT_ALLOW": "allow"}
    found = []
    for entry in profile["syscalls"]:
        if name in entry["names"] and all(
            args[c["index"]] & c["value"] == c["valueTwo"] and c["op"] == "SCMP_CMP_MASKED_EQ"
            for c in entry.get("args", [])
        ):
            action = entry["action"]
            found.append(words.get(action) or bpf.action_name(0x0005_0000 | entry["errnoRet"]))
    return found or [words[profile["defaultErrnoRet"]]]


@pytest.mark.parametrize("arch", sorted(NUMBERS))
@settings(max_examples=600, deadline=None)
@given(data=st.data())
def test_exactly_one_entry_answers_and_it_answers_as_the_policy(arch: str, data: st.DataObject) -> None:
    name = data.draw(st.one_of(st.sampled_from(GUARDED), st.sampled_from(sorted(NUMBERS[arch]))))
    args = data.draw(st.lists(WORDS, min_size=6, max_size=6))
    if name in NUMBERS[arch]:
        assert answer(PROFILES[arch], name, args) == [policies.evaluate(POLICY, name, args)]


PROFILES = {arch: docker.to_docker_json(POLICY, arch) for arch in NUMBERS}


def test_profile_is_plain_json_of_the_runtime_specification() -> None:
    profile = PROFILES["x86_64"]
    assert json.loads(json.dumps(profile)) == profile
    assert profile["architectures"] == ["SCMP_ARCH_X86_64"]
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 38)
    assert {"names", "action"} <= set(profile["syscalls"][0])
    # runc turns two conditions on one argument into alternatives.
    for entry in profile["syscalls"]:
        indexes = [condition["index"] for condition in entry.get("args", [])]
        assert len(indexes) == len(set(indexes))


@pytest.fixture(scope="module")
def runtime_program() -> list[bpf.Instruction]:
    """What runc and crun do with a profile: one libseccomp rule for each name and entry."""
    if pyseccomp.system_arch() != AUDIT_ARCH["x86_64"]:
        pytest.skip("libseccomp compiles these numbers on x86-64 only")
    profile = PROFILES["x86_64"]
    actions = {"SCMP_ACT_ALLOW": pyseccomp.ALLOW}
    filter_ = pyseccomp.SyscallFilter(pyseccomp.ERRNO(profile["defaultErrnoRet"]))
    for entry in profile["syscalls"]:
        action = actions.get(entry["action"]) or pyseccomp.ERRNO(entry["errnoRet"])
        conditions = [
            pyseccomp.Arg(c["index"], pyseccomp.MASKED_EQ, c["value"], c["valueTwo"]) for c in entry.get("args", [])
        ]
        for name in entry["names"]:
            filter_.add_rule(action, NUMBERS["x86_64"][name], *conditions)
    with open(os.memfd_create("filter"), "w+b") as file:
        filter_.export_bpf(file)
        file.seek(0)
        return bpf.decode(file.read())


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(GUARDED), args=st.lists(WORDS, min_size=6, max_size=6))
def test_runtime_compiles_it_to_the_policys_answers(
    runtime_program: list[bpf.Instruction], name: str, args: list[int]
) -> None:
    found = bpf.simulate(runtime_program, AUDIT_ARCH["x86_64"], NUMBERS["x86_64"][name], args).action
    assert found == policies.evaluate(POLICY, name, args)


@pytest.mark.parametrize("arch", sorted(NUMBERS))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_for_gvisor_it_refuses_what_the_policy_refuses_by_name_and_every_set_id_bit(
    arch: str, data: st.DataObject
) -> None:
    profile = docker.to_docker_names(POLICY, arch)
    profile["defaultErrnoRet"] = "SCMP_ACT_ALLOW"
    refused = sorted(name for name, then in POLICY["calls"].items() if then == "EPERM")
    assert answer(profile, data.draw(st.sampled_from(refused)), [0] * 6) == ["EPERM"]
    name = data.draw(st.sampled_from(sorted(policies.SET_ID_CALLS & NUMBERS[arch].keys())))
    args = data.draw(st.lists(WORDS, min_size=6, max_size=6))
    expected = policies.evaluate(POLICY, name, args)
    assert answer(profile, name, args) == [expected if expected == "EPERM" else "allow"]
