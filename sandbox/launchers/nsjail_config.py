"""A plan as nsjail's configuration, in protobuf's text form. Pure.

nsjail makes the namespaces and changes the root to the view that the plan's own steps built; a field that it does not
know ends it, so what is written here is either understood or refused. Its own limits, its network, its filter and its
mounts are not used: the call's group, the gateway, our filter and our /proc hold in the same way under every launcher
(nsjail goes on without a mount that it cannot make a place for, unless told that it has to be there).
Source: nsjail's config.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sandbox.launchers.oci_spec import INSIDE_ID, Place
from sandbox.plan import LaunchPlan

_Message = Sequence[tuple[str, Any]]
# The view is mounted so, and a user namespace may not take that away (mount_namespaces(7)).
_LOCKED = (("nosuid", True), ("nodev", True))


class Word(str):
    """An enumeration's value: written without quotes."""

    __slots__ = ()


def nsjail_config(plan: LaunchPlan, place: Place, pass_fds: Sequence[int]) -> str:
    """The configuration of a jail for this plan whose first program is `place.argv`."""
    hostname = next(step.args["name"] for step in plan.steps if step.name == "hostname")
    outside = dict(place.ids)[INSIDE_ID]
    ids = [("inside_id", str(INSIDE_ID)), ("outside_id", str(outside)), ("count", 1)]
    fields: list[tuple[str, Any]] = [
        ("name", "call"),
        ("mode", Word("ONCE")),
        ("hostname", hostname),
        ("cwd", "/"),
        ("time_limit", 0),  # the supervisor's timer counts, which knows when the tool starts
        ("log_level", Word("WARNING")),
        ("keep_env", False),
        ("envar", "PATH=/usr/bin:/bin"),
        ("envar", "LANG=C.UTF-8"),
        ("nice_level", 0),
        ("keep_caps", False),
        ("disable_no_new_privs", False),
        *(("pass_fd", fd) for fd in pass_fds),
        ("disable_rl", True),  # set before nsjail starts: its own are in megabytes
        ("clone_newcgroup", False),  # it is started in a cgroup namespace whose root is the call's group
        ("uidmap", ids),
        ("gidmap", ids),
        ("iface_no_lo", True),
        ("mount_proc", False),
        ("mount", [("src", place.root), ("dst", "/"), ("is_bind", True), ("rw", False), *_LOCKED]),
        ("exec_bin", [("path", place.argv[0]), *(("arg", arg) for arg in place.argv[1:])]),
    ]
    return dump(fields)


def dump(fields: _Message, indent: str = "") -> str:
    """Fields as protobuf text: scalars as `name: value`, a list of pairs as a message."""
    lines = []
    for name, value in fields:
        if isinstance(value, list):
            lines.append(f"{indent}{name} {{\n{dump(value, indent + '  ')}{indent}}}\n")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | Word):
        return str(value)
    return f'"{_escaped(str(value))}"'


def _escaped(text: str) -> str:
    """Every byte that is not plain ASCII as an octal escape; a path may hold any."""
    data = text.encode("utf-8", "surrogateescape")
    return "".join(chr(b) if 32 <= b < 127 and b not in b'"\\' else f"\\{b:03o}" for b in data)
