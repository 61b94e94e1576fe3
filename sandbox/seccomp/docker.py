"""A policy as the JSON that Docker and OCI runtimes read, for the launchers that use them. Pure.

There a call has one answer for "no rule fits", the profile's default, and conditions only of the form "masked value
equals". So each guard is written out as boxes that do not overlap and together cover every argument; whichever order
a runtime's libseccomp tests them in, the answer is ours. Source: OCI runtime-spec, config-linux.md, seccomp.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import NUMBERS

_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}
_ACTIONS = {
    "allow": "SCMP_ACT_ALLOW",
    "notify": "SCMP_ACT_NOTIFY",
    "log": "SCMP_ACT_LOG",
    "kill_process": "SCMP_ACT_KILL_PROCESS",
}

# For each argument the bits that are fixed, and to what: all arguments for which `arg & mask == value`.
_Box = Mapping[int, tuple[int, int]]


def to_docker_json(policy: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """The policy for `docker run --security-opt seccomp=FILE` or `linux.seccomp` of an OCI bundle.

    Only `arch` is listed, so libseccomp's own answer to foreign ABIs holds: it kills. Raises KeyError for an
    architecture that is not known.
    """
    known = NUMBERS[arch]
    plain: dict[str, list[str]] = {}
    entries: list[dict[str, Any]] = []
    for name, then in sorted(policy["calls"].items()):
        if name not in known:
            continue
        if isinstance(then, str):
            plain.setdefault(then, []).append(name)
            continue
        entries += (
            {"names": [name], **_action(action), "args": _conditions(box)}
            for box, action in boxes(then)
            if action != policy["unknown"]
        )
    groups = [{"names": names, **_action(action)} for action, names in plain.items() if action != policy["unknown"]]
    default = _action(policy["unknown"])
    return {
        "defaultAction": default["action"],
        "defaultErrnoRet": default["errnoRet"],
        "architectures": [_ARCHITECTURES[arch]],
        "syscalls": groups + entries,
    }


def to_docker_names(policy: Mapping[str, Any], arch: str) -> dict[str, Any]:
    """What the policy refuses, as a list of names, for gVisor, whose kernel answers all other calls by itself.

    Our whole filter has more instructions than gVisor takes (4096), and its conditions tell apart what reaches this
    kernel's own, which no call of the tool's does. gVisor of 2022 answers EPERM whatever error a profile names, so a
    list of what is allowed would break the programs that look for ENOSYS before they fall back.

    Conditions are kept for what reaches the host's files all the same: bits with which others would run a file as its
    owner, who is the caller.
    """
    refused = sorted(name for name, then in policy["calls"].items() if then == "EPERM")
    entries = [{"names": refused, **_action("EPERM")}]
    for name in sorted(policies.SET_ID_CALLS & policy["calls"].keys() & NUMBERS[arch].keys()):
        found = boxes(policy["calls"][name])
        entries += [
            {"names": [name], **_action(then), "args": _conditions(box)} for box, then in found if then == "EPERM"
        ]
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [_ARCHITECTURES[arch]], "syscalls": entries}


def boxes(guard: policies.Guard) -> list[tuple[_Box, str]]:
    """A guard as boxes that do not overlap and cover everything, each with its action."""
    return list(_divide(guard, {}))


def _divide(then: str | policies.Guard, box: _Box) -> Iterator[tuple[_Box, str]]:
    if isinstance(then, str):
        yield box, then
        return
    rest = [box]
    for rule in then["rules"]:
        when = {c["arg"]: (c["mask"], c["value"]) for c in rule["when"]}
        for piece in rest:
            common = _common(piece, when)
            if common is not None:
                yield from _divide(rule["then"], common)
        rest = [part for piece in rest for part in _without(piece, when)]
    for piece in rest:
        yield piece, then["else"]


def _common(box: _Box, other: _Box) -> _Box | None:
    common = dict(box)
    for arg, (mask, value) in other.items():
        old_mask, old_value = common.get(arg, (0, 0))
        if (old_value ^ value) & old_mask & mask:
            return None
        common[arg] = (old_mask | mask, old_value | value)
    return common


def _without(box: _Box, other: _Box) -> Iterator[_Box]:
    """`box` without what lies in `other`: for each bit that `other` fixes, the half where it is different."""
    if _common(box, other) is None:
        yield box
        return
    inside = dict(box)
    for arg, (mask, value) in other.items():
        old_mask, old_value = inside.get(arg, (0, 0))
        for bit in _bits(mask & ~old_mask):
            yield {**inside, arg: (old_mask | bit, old_value | (~value & bit))}
            old_mask, old_value = old_mask | bit, old_value | (value & bit)
        inside[arg] = (old_mask, old_value)


def _bits(mask: int) -> Iterable[int]:
    # High bits first: the numbers in use are small, so most of what differs does so there and leaves early.
    return [1 << at for at in reversed(range(mask.bit_length())) if mask >> at & 1]


def _action(action: str) -> dict[str, Any]:
    if action in _ACTIONS:
        return {"action": _ACTIONS[action]}
    return {"action": "SCMP_ACT_ERRNO", "errnoRet": getattr(errno, action)}


def _conditions(box: _Box) -> list[dict[str, Any]]:
    return [
        {"index": arg, "op": "SCMP_CMP_MASKED_EQ", "value": mask, "valueTwo": value}
        for arg, (mask, value) in sorted(box.items())
    ]
