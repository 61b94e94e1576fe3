"""Launchers whose container is made around our own view: crun and runc (`oci`), and nsjail.

Which process does which step changes with the runtime, the steps do not: the builder makes the view, the runtime's
configuration carries what takes its hand, the attendant does the rest of what takes privileges in the container's
namespaces, and the container's first process, in the caller's own interpreter, seals itself. See
`sandbox._jail.container`.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sandbox._linux import wire
from sandbox.errors import LauncherUnavailable
from sandbox.launchers.jail import Jail, mount_point
from sandbox.launchers.oci_spec import INSIDE_ID, Place
from sandbox.launchers.zygote import PACKAGE_ROOT, Zygote
from sandbox.plan import LaunchPlan, Step
from sandbox.seccomp import docker
from sandbox.seccomp import policy as policies

LIB = "/run/sandbox/lib"
_BOOT = f"import sys; sys.path.append({LIB!r}); from sandbox._jail.inner import main; main(sys.argv[1])"
FIRST_FD = 3
# Where a runtime insists on a root in the container, that is the last uid of the container's block.
ROOT_ID_OFFSET = 63
_OUR_FILES = ("__init__.py", "errors.py", "_jail", "_linux")
# A runtime takes the limit of open files on before it is done: crun 1.8.1 cannot make a container with 32 of them. So
# the container's first process lowers it, as the last thing before the filter.
ROOM_FILES = 256
_RLIMITS = ("CORE", "NOFILE", "FSIZE", "MEMLOCK", "RTPRIO", "NICE", "NPROC", "CPU")


@dataclass(frozen=True)
class Flavour:
    """One runtime as a launcher: how it is found, what is written for it, which steps are left to others.

    `config(kind, place)` makes the bytes of its configuration. `enter`: steps done in the process that becomes the
    runtime; `outside`: those that the attendant does, in the container's namespaces; `inside`: those that the
    container's first process does itself. `fds`: what that process finds open from descriptor 3 on. `has_root`: it
    wants a uid 0 in the container, beside the tool's. `own_tasks`: how many of its own run in the call's group;
    `making_tasks`: how many do until the container is sealed.
    """

    name: str
    find: Callable[[], str]
    config: Callable[[Kind, Place], bytes]
    hint: str
    enter: tuple[str, ...] = ("affinity",)
    outside: tuple[str, ...] = ("user_limits", "loopback", "egress", "hostname")
    inside: tuple[str, ...] = ("landlock", "close_fds")
    fds: tuple[str, ...] = ("status", "plan", "release")
    has_root: bool = False
    own_tasks: int = 0
    making_tasks: int = 0


class Kind:
    """What containers of one plan have in common, worked out once. `program`: our compiled filter."""

    def __init__(self, plan: LaunchPlan, flavour: Flavour, program: bytes) -> None:
        self.plan = plan
        self.flavour = flavour
        self.program = program

    @cached_property
    def content(self) -> bytes:
        return json.dumps({"steps": arranged(self.plan, self.flavour)}, separators=(",", ":")).encode()

    @cached_property
    def seccomp(self) -> dict[str, Any]:
        """The filter as runtimes read it."""
        return docker.to_docker_json(policies.resolve(self.plan.seccomp), os.uname().machine)


def with_room(plan: LaunchPlan) -> LaunchPlan:
    """The plan with as many open files as a runtime itself takes."""
    asked = _open_files(plan)
    return plan if asked >= ROOM_FILES else plan.with_step_args("rlimits", NOFILE=ROOM_FILES)


def _open_files(plan: LaunchPlan) -> int:
    return int(next(step for step in plan.steps if step.name == "rlimits").args["NOFILE"])


def arranged(plan: LaunchPlan, flavour: Flavour) -> list[dict[str, Any]]:
    """The plan's steps with who does each here: `view`, `enter`, `runtime`, `outside`, `call` or `tool`."""
    exact = _open_files(plan)
    if flavour.inside:
        plan = with_room(plan)
    steps = [step for step in plan.steps if step.name != "scratch"]
    scratch = next(step for step in plan.steps if step.name == "scratch")
    at = next(index for index, step in enumerate(steps) if step.name == "devices") + 1
    steps.insert(at, replace(scratch, where="view"))
    placed: list[dict[str, Any]] = []
    for step in steps:
        placed.append({"name": step.name, "where": _where(step, flavour), "args": _args(step)})
        if step.name == "terminals" and step.args["tty"]:
            placed.append({"name": "terminals", "where": "call", "args": dict(step.args)})
        if step.name == "rlimits" and exact < _open_files(plan):
            placed.append({"name": "rlimits", "where": "call", "args": {"NOFILE": exact}})
    return placed


def _where(step: Step, flavour: Flavour) -> str:
    if step.where != "call":
        return "runtime" if step.name == "enter_root" else step.where
    if step.name in flavour.outside:
        return "outside"
    if step.name in flavour.inside:
        return "call"
    return "enter" if step.name in flavour.enter else "runtime"


def _args(step: Step) -> dict[str, Any]:
    args = dict(step.args)
    if step.name == "system_view":
        there = {target for _, target in args["runtime_files"]}
        package = f"{PACKAGE_ROOT}/sandbox"
        ours = ([f"{package}/{name}", f"{LIB}/sandbox/{name}"] for name in _OUR_FILES)
        args["runtime_files"] = [*args["runtime_files"], *(pair for pair in ours if pair[1] not in there)]
    return args


def launch(jail: Jail, zygote: Zygote, kind: Kind, state: Path) -> None:
    """Have `jail` made. Raises LauncherUnavailable where the runtime is missing, OSError without a zygote."""
    flavour = kind.flavour
    program = flavour.find()
    if not program:
        raise LauncherUnavailable(f"{flavour.name} is not installed", step="create", hint=flavour.hint)
    mnt = str(mount_point(state))
    message: dict[str, object] = {
        "mnt": mnt,
        "host_uid": jail.host_uid,
        "own_id": 0,
        "runtime": flavour.name,
        "program": program,
        "cgroup_v2": jail.group.v2 if jail.group is not None else "",
        "inner_fds": list(flavour.fds),
    }
    data: Mapping[str, bytes] = {
        "plan": kind.content,
        "config": flavour.config(kind, place(jail.host_uid, flavour, mnt)),
        "seccomp": kind.program,
    }
    fds = {name: wire.memfd(name, content) for name, content in data.items()}
    try:
        jail.launch_with(zygote.launch, message, fds)
    finally:
        for fd in fds.values():
            os.close(fd)


def place(host_uid: int | None, flavour: Flavour, mnt: str) -> Place:
    # An ordinary user is root in the namespace in which his view is built.
    ids = [(INSIDE_ID, 0 if host_uid is None else host_uid)]
    if flavour.has_root and host_uid is not None:
        ids.append((0, host_uid + ROOT_ID_OFFSET))
    argv = [sys.executable, "-I", "-S", "-c", _BOOT, json.dumps(flavour.fds)]
    return Place(f"{mnt}/root", argv, ids, _hard_limits())


def _hard_limits() -> dict[str, int]:
    hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in _RLIMITS}
    return {name: value for name, value in hard.items() if value != resource.RLIM_INFINITY}
