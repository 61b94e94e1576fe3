"""The policy itself: complete, unambiguous, and what its definition says about each call."""

from __future__ import annotations

import errno
import json
from collections import Counter
from pathlib import Path

import pytest

from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import NUMBERS

GOLDEN = Path(__file__).parents[1] / "golden" / "seccomp_default.json"
DIRTY = 0xDEAD_BEEF_0000_0000
POLICY = policies.default_policy()


def verdict(name: str, *args: int) -> str:
    """The policy's answer, which must be the same with garbage in the upper half of every register."""
    clean = policies.evaluate(POLICY, name, args)
    assert policies.evaluate(POLICY, name, [arg | DIRTY for arg in args]) == clean
    return clean


def test_every_known_number_has_an_answer_of_its_own() -> None:
    for arch, numbers in NUMBERS.items():
        assert not [name for name in numbers if name not in POLICY["calls"]], arch


def test_no_call_is_listed_twice() -> None:
    listed = Counter(name for names in policies.ALLOWED.values() for name in names.split())
    listed.update(name for _, names in policies.REFUSED.values() for name in names.split())
    listed.update(policies.ABSENT.split())
    assert [name for name, count in listed.items() if count > 1] == []
    assert set(POLICY["calls"]) - set(listed) == {
        "clone",
        "open",
        "openat",
        "chmod",
        "fchmod",
        "fchmodat",
        "fchmodat2",
        "creat",
        "mknod",
        "mknodat",
        "ioctl",
        "prctl",
        "prlimit64",
        "personality",
        "socket",
        "socketpair",
    }


def test_policy_is_plain_json_with_a_stable_digest() -> None:
    text = json.dumps(POLICY)
    assert policies.resolve(json.loads(text)) == POLICY
    assert policies.default_policy()["digest"] == POLICY["digest"]
    assert policies.default_policy(deny_set_affinity=True)["digest"] != POLICY["digest"]


def test_policy_equals_the_reviewed_one() -> None:
    """A change shows up in review, call by call. To accept it: `python -m tests.unit.test_seccomp_policy`."""
    assert json.loads(GOLDEN.read_text()) == POLICY


def test_short_form_of_a_plan_stands_for_the_whole_policy() -> None:
    assert policies.resolve({"name": "default"}) == POLICY
    assert policies.resolve({"name": "default", "deny_set_affinity": True})["calls"]["sched_setaffinity"] == "EPERM"
    assert POLICY["calls"]["sched_setaffinity"] == "allow"


@pytest.mark.parametrize("spec", [{"name": "none"}, {}, {"name": "default", "version": 99}])
def test_unknown_policy_is_refused(spec: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not known here"):
        policies.resolve(spec)


def test_changed_policy_under_an_old_digest_is_refused() -> None:
    changed = {**POLICY, "calls": {**POLICY["calls"], "bpf": "allow"}}
    with pytest.raises(ValueError, match="digest"):
        policies.resolve(changed)
    with pytest.raises(ValueError, match="digest"):
        policies.resolve({"name": "default", "deny_set_affinity": True, "digest": POLICY["digest"]})


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("clone", (17,), "allow"),
        ("clone", (0x003D_0F00,), "allow"),  # what pthread_create passes
        *(("clone", (17 | 1 << bit,), "EPERM") for bit in (17, 25, 26, 27, 28, 29, 30)),
        ("clone3", (0, 88), "ENOSYS"),
        ("openat2", (), "ENOSYS"),
        ("unshare", (0,), "EPERM"),
        ("setns", (3, 0), "EPERM"),
        ("chmod", (0, 0o1777), "allow"),
        ("chmod", (0, 0o4755), "EPERM"),
        ("fchmod", (0, 0o2755), "EPERM"),
        ("fchmodat", (0, 0, 0o6755), "EPERM"),
        ("fchmodat2", (0, 0, 0o4000), "EPERM"),
        ("fchmodat2", (0, 0, 0o755), "allow"),
        ("creat", (0, 0o4755), "EPERM"),
        ("open", (0, 0o100, 0o4755), "EPERM"),
        ("open", (0, 0o100, 0o755), "allow"),
        ("open", (0, 0, 0o4755), "allow"),  # no file is made: the register holds whatever it held
        ("openat", (0, 0, 0o20200000, 0o2755), "EPERM"),  # O_TMPFILE
        ("openat", (0, 0, 0o20200000, 0o600), "allow"),
        ("mknod", (0, 0o010644), "allow"),
        ("mknod", (0, 0o644), "allow"),
        ("mknod", (0, 0o020644), "EPERM"),
        ("mknodat", (0, 0, 0o060644), "EPERM"),
        ("mknodat", (0, 0, 0o104755), "EPERM"),
        ("mkdir", (0, 0o6755), "allow"),
        *(("ioctl", (0, number), "EPERM") for number in policies.TERMINAL_IOCTLS.values()),
        ("ioctl", (0, 0x5413), "allow"),
        ("ioctl", (0, 0x8048_4C01), "allow"),
        ("prctl", (28,), "EPERM"),
        ("prctl", (35, 1), "EPERM"),
        ("prctl", (15,), "allow"),
        ("personality", (0xFFFF_FFFF,), "allow"),
        ("personality", (0x0004_0000,), "ENOSYS"),
        ("socket", (1, 0x80801, 0), "allow"),
        ("socket", (1, 3, 77), "allow"),
        ("socket", (2, 0x80801, 0), "allow"),
        ("socket", (10, 1, 6), "allow"),
        ("socket", (2, 2, 17), "allow"),
        ("socket", (2, 2, 6), "EPROTONOSUPPORT"),
        ("socket", (2, 1, 132), "EPROTONOSUPPORT"),  # SCTP
        ("socket", (2, 1, 262), "EPROTONOSUPPORT"),  # MPTCP
        ("socket", (2, 2, 1), "EPROTONOSUPPORT"),  # ICMP without a raw socket
        ("socket", (2, 10, 0), "EPROTONOSUPPORT"),  # SOCK_PACKET, the old way to AF_PACKET
        ("socket", (2, 0x80003, 1), "EPERM"),
        ("socket", (10, 3, 58), "EPERM"),
        ("socket", (16, 3, 0), "allow"),
        *(("socket", (16, 3, protocol), "EPROTONOSUPPORT") for protocol in (4, 9, 12, 15, 16)),
        *(("socket", (family, 1, 0), "EAFNOSUPPORT") for family in (0, 3, 9, 17, 29, 31, 38, 40, 41, 44, 0x8000_0001)),
        ("socketpair", (1, 1, 0), "allow"),
        ("socketpair", (2, 1, 0), "EOPNOTSUPP"),
        ("socketpair", (40, 1, 0), "EOPNOTSUPP"),
        ("never_heard_of", (), "ENOSYS"),
    ],
)
def test_answer_is_the_documented_one(name: str, args: tuple[int, ...], expected: str) -> None:
    assert verdict(name, *args) == expected


def test_rules_of_a_guard_never_contradict_each_other() -> None:
    """Then their order does not matter, and no compiler's reordering can change an answer."""

    def check(guard: policies.Guard) -> None:
        for at, first in enumerate(guard["rules"]):
            for second in guard["rules"][at + 1 :]:
                fixed = {c["arg"]: c for c in first["when"]}
                apart = any(
                    (c["value"] ^ fixed[c["arg"]]["value"]) & c["mask"] & fixed[c["arg"]]["mask"]
                    for c in second["when"]
                    if c["arg"] in fixed
                )
                assert apart or first["then"] == second["then"], (first, second)
        for rule in guard["rules"]:
            assert all(c["value"] & ~c["mask"] == 0 and c["mask"] <= 0xFFFF_FFFF for c in rule["when"])
            if not isinstance(rule["then"], str):
                check(rule["then"])

    for then in POLICY["calls"].values():
        if not isinstance(then, str):
            check(then)


def test_every_refused_call_has_a_reason_and_an_errno() -> None:
    for name, then in POLICY["calls"].items():
        if isinstance(then, str) and then != "allow":
            assert policies.refusal_reason(name)
            assert isinstance(getattr(errno, then), int)
    assert policies.refusal_reason("read") == ""


def test_page_for_people_names_every_refused_and_guarded_call() -> None:
    page = (Path(__file__).parents[2] / "docs" / "seccomp.md").read_text()
    refused = {name for _, names in policies.REFUSED.values() for name in names.split()}
    guarded = {name for name, then in POLICY["calls"].items() if isinstance(then, dict)}
    symbols = {*policies.TERMINAL_IOCTLS, *policies.REFUSED_PRCTLS}
    assert [name for name in sorted(refused | guarded | symbols) if f"`{name}`" not in page] == []


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(POLICY, indent=1, sort_keys=True) + "\n")
