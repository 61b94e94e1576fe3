"""Which launcher a plan is for, what it refuses, and the steps of one whose root is an image's. Pure.

"auto" is the cheapest launcher that is enough: the native jail wherever namespaces will do. A launcher that is named
is taken or refused, never replaced by another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from sandbox import planner_gpu, planner_http
from sandbox.grants import has_glob, path_within
from sandbox.host import HostFacts
from sandbox.launchers.declared import (
    DECLARED,
    GETTING,
    GRADES,
    Choice,
    choices,
    find_runtime,
    grade,
    has_landlock,
    is_enough,
)
from sandbox.manifest import Manifest
from sandbox.plan import Step
from sandbox.spec import CallSpec

_DEFAULT: Final = Choice("jail")


def choose(manifest: Manifest, facts: HostFacts) -> tuple[Choice, dict[str, str], tuple[str, ...]]:
    """The launcher; or the native one, why none will do by control, and what would help."""
    asked = manifest.isolation
    if asked.launcher != "auto" and asked.launcher not in DECLARED:
        return _DEFAULT, {"launcher": f"no launcher is called {asked.launcher!r}"}, ()
    found = choices(asked.launcher, asked.runtime)
    if asked.runtime and not found:
        reason = f"the launcher {asked.launcher!r} drives no runtime {asked.runtime!r}"
        return _DEFAULT, {"launcher": reason}, ()
    enough = [choice for choice in found if is_enough(choice, asked.minimum)]
    if not enough:
        return _DEFAULT, {"isolation": f"{asked.minimum} needs another launcher than {_title(asked.launcher)}"}, ()
    lacking: dict[str, str] = {}
    for choice in enough:
        why, fix = _lack(choice, manifest, facts)
        if not why:
            return choice, {}, ()
        lacking[why] = fix
    name = "isolation" if asked.minimum != GRADES[0] else "launcher"
    reason = f"{asked.minimum} needs one of: {'; '.join(lacking)}" if name == "isolation" else "; ".join(lacking)
    return _DEFAULT, {name: reason}, tuple(dict.fromkeys(filter(None, lacking.values())))


def _title(launcher: str) -> str:
    return "the native jail" if launcher in ("jail", "auto") else f"{launcher} without a stronger runtime"


def _lack(choice: Choice, manifest: Manifest, facts: HostFacts) -> tuple[str, str]:
    """(what it lacks here, what would help); both empty when it can be had as far as the facts tell."""
    declared = DECLARED[choice.launcher]
    if declared.needs_image and not manifest.isolation.image:
        return f"{_spoken(choice)}, which needs isolation.image", "name an image: isolation.image = 'python:3.11-slim'"
    if not declared.needs_image and manifest.isolation.image:
        return f"{choice.launcher} takes no image", ""
    return lack_here(choice, facts)


def lack_here(choice: Choice, facts: HostFacts) -> tuple[str, str]:
    """(what this host lacks for it, what would help), whatever a manifest asks for."""
    declared = DECLARED[choice.launcher]
    if choice.runtime and not find_runtime(choice.runtime, facts):
        return f"{_spoken(choice)}, which is not installed", GETTING[choice.runtime]
    if declared.program and declared.program not in facts.runtimes:
        return f"{declared.program}, which is not installed", GETTING[declared.program]
    why, fix = declared.obstacle(choice.runtime, facts)
    return (f"{_spoken(choice)}: {why}", fix) if why else ("", "")


def _spoken(choice: Choice) -> str:
    return f"{choice.launcher} with {choice.runtime} ({grade(choice)})" if choice.runtime else choice.launcher


def gaps(choice: Choice, manifest: Manifest, call: CallSpec) -> dict[str, str]:
    """What the call asks for and this launcher declares that it cannot do with this runtime."""
    wanted: Mapping[str, Callable[[], bool]] = {
        "terminal": lambda: call.tty,
        "cow": lambda: call.workspace.mode == "cow",
        "inspection": lambda: planner_http.inspects(manifest),
        "gpu": lambda: planner_gpu.is_on(manifest),
        "egress": lambda: manifest.network.mode != "none",
        "deny": lambda: _denies_beyond_grants(manifest, call),
        "write": lambda: call.workspace.mode == "rw" or any(path.startswith("/") for path in manifest.filesystem.write),
    }
    declared = DECLARED[choice.launcher].runtime_gaps.get(choice.runtime, {})
    return {name: f"{choice.launcher}: {why}" for name, why in declared.items() if name in wanted and wanted[name]()}


def _denies_beyond_grants(manifest: Manifest, call: CallSpec) -> bool:
    """Whether a path is denied by name that lies in nothing of the host's that is shown."""
    files = manifest.filesystem
    trees = [*files.read, *files.write, *filter(None, (call.workspace.host_path,))]
    named = [path for path in files.deny if path.startswith("/") and not has_glob(path)]
    return any(not any(path_within(path, tree) for tree in trees) for path in named)


def refuse_engine(choice: Choice, engine: str) -> dict[str, str]:
    """A container on another machine can be neither entered nor ended from here, and its streams are not ours."""
    if choice.launcher != "docker" or not engine or engine.startswith("unix://"):
        return {}
    return {"launcher": f"DOCKER_HOST is {engine}, and only a daemon on this host will do (unix://...)"}


def isolation(choice: Choice, facts: HostFacts) -> dict[str, Any]:
    """What the record says about the wall."""
    landlock = facts.landlock_abi if has_landlock(choice) else 0
    return {
        "launcher": choice.launcher,
        **({"runtime": choice.runtime} if choice.runtime else {}),
        "grade": grade(choice),
        "landlock_abi": landlock,
        "linux_caps": "none",
        "no_new_privs": True,
        "missing": [] if landlock or not has_landlock(choice) else ["landlock"],
    }


def container_steps(
    settings: Mapping[str, Any], mounted: tuple[Step, ...], sealed: tuple[Step, ...], network: tuple[Step, ...]
) -> tuple[Step, ...]:
    """The steps of a launcher whose root is an image's: made by its engine, completed from outside, then released.

    `mounted`: what is put into its tree. `sealed`: limits of the process, which the engine applies before its first
    instruction. `network`: the gateway's.
    """
    return (
        Step("container", "view", settings),
        Step("namespaces", "view"),
        *sealed,
        Step("capabilities", "view"),
        Step("no_new_privs", "view"),
        Step("seccomp", "view"),
        *mounted,
        *network,
        Step("exec", "tool"),
    )
