"""A plan as an OCI runtime bundle's configuration. Pure.

The root file system is the view that the plan's own steps build; the runtime adds what takes its hand: namespaces,
ids, the mounts that belong to them, masked paths, limits per process, no capabilities, `no_new_privs`, the filter.
Source: OCI runtime-spec 1.0.2, config.md and config-linux.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sandbox.plan import LaunchPlan

SPEC_VERSION = "1.0.2"
INSIDE_ID = 1000
# The cgroup namespace is not among them: the runtime is started in one whose root is the call's group.
NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts")
# Where a function's request and result lie for a runtime that hands no descriptors through.
EXCHANGE = "/run/sandbox/exchange"
_CAP_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
KERNEL_MOUNTS = (
    ("/proc", "proc", ("nosuid", "nodev", "noexec", "hidepid=2")),
    ("/dev/pts", "devpts", ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620")),
    ("/dev/mqueue", "mqueue", ("nosuid", "nodev", "noexec")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where one container is made: `root` on the host, its first program, and (inside id, host id) pairs.

    `hard_limits`: the maker's own hard limits by rlimit name, above which nothing can be set.
    """

    root: str
    argv: Sequence[str]
    ids: Sequence[tuple[int, int]]
    hard_limits: Mapping[str, int]


def runtime_spec(plan: LaunchPlan, place: Place, seccomp: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a bundle for this plan."""
    steps = {step.name: step.args for step in plan.steps}
    return {
        "ociVersion": SPEC_VERSION,
        "process": _process(steps, place),
        "root": {"path": place.root, "readonly": True},
        "hostname": steps["hostname"]["name"],
        "mounts": [*_dev(steps, place.root), *(_mount(*item) for item in KERNEL_MOUNTS)],
        "linux": {
            "namespaces": [{"type": name} for name in NAMESPACES],
            "uidMappings": _mappings(place.ids),
            "gidMappings": _mappings(place.ids),
            "maskedPaths": [f"/proc/{name}" for name in steps["proc"]["masked"]],
            "readonlyPaths": [f"/proc/{name}" for name in steps["proc"]["read_only"]],
            "cgroupsPath": "/call",
            # Which devices the call may open is the rule of the call's own group, above any that the runtime makes.
            "resources": {"devices": [{"allow": True, "access": "rwm"}]},
            "seccomp": seccomp,
        },
    }


def userspace_spec(plan: LaunchPlan, place: Place, seccomp: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for a runtime with a kernel of its own, without the call, which comes later.

    `seccomp`: what is refused, by name.

    It makes its own /dev and /proc, and serves the view's files through a process outside. What is writable is named
    one by one, since all that belongs to the root is served read-only; and every private place is named, since it
    puts memory of its own, without a size, where it finds an empty one.
    """
    spec = runtime_spec(plan, place, seccomp)
    writable = sorted({*_written(plan), EXCHANGE}, key=lambda path: path.count("/"))
    proc = next(mount for mount in spec["mounts"] if mount["destination"] == "/proc")
    exchange = f"{place.root.rpartition('/')[0]}/scratch/exchange"
    sources = {EXCHANGE: exchange}
    spec["mounts"] = [
        {**proc, "options": ["nosuid", "nodev", "noexec"]},
        *(
            {"destination": path, "type": "bind", "source": sources.get(path, place.root + path), "options": ["rbind"]}
            for path in writable
        ),
    ]
    spec["root"]["readonly"] = False  # it is already
    linux = spec["linux"]
    linux["namespaces"] = [item for item in linux["namespaces"] if item["type"] != "network"]
    del linux["maskedPaths"], linux["readonlyPaths"], linux["resources"], linux["cgroupsPath"]
    return spec


def _written(plan: LaunchPlan) -> set[str]:
    """Paths inside that the call may write: its private places, granted ones and the workspace."""
    found: set[str] = set()
    for step in plan.steps:
        if step.name == "scratch":
            found.update(step.args["directories"])
        elif step.name in ("grants", "inner_grants"):
            found.update(grant["jail_path"] for grant in step.args["paths"] if grant["access"] == "write")
        elif step.name == "workspace" and step.args["mode"] in ("rw", "cow"):
            found.add(step.args["jail_path"])
    return found


def _process(steps: Mapping[str, Mapping[str, Any]], place: Place) -> dict[str, Any]:
    return {
        "terminal": False,
        "user": {"uid": INSIDE_ID, "gid": INSIDE_ID},
        "args": list(place.argv),
        # The tool's environment comes with its call; the container's first process has none of it.
        "env": ["PATH=/usr/bin:/bin", "LANG=C.UTF-8"],
        "cwd": "/",
        "capabilities": {name: [] for name in _CAP_SETS},
        "noNewPrivileges": True,
        "rlimits": [_rlimit(name, value, place.hard_limits) for name, value in steps["rlimits"].items()],
    }


def _rlimit(name: str, value: int, hard_limits: Mapping[str, int]) -> dict[str, Any]:
    value = min(value, hard_limits.get(name, value))
    return {"type": f"RLIMIT_{name}", "hard": value, "soft": value}


def _mount(destination: str, kind: str, options: Sequence[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": list(options)}


def _dev(steps: Mapping[str, Mapping[str, Any]], root: str) -> list[dict[str, Any]]:
    """The view's own /dev onto itself: a runtime makes no devices, links and terminals in a /dev that was bound.

    What is mounted in it is named too: crun 1.8.1 binds without what lies below, `rbind` or not.
    """
    below = [f"/dev/{name}" for name in steps["devices"]["nodes"]]
    below += sorted(path for path in steps["scratch"]["directories"] if path.startswith("/dev/"))
    return [
        {"destination": path, "type": "bind", "source": root + path, "options": ["rbind"]} for path in ("/dev", *below)
    ]


def _mappings(ids: Sequence[tuple[int, int]]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": 1} for inside, outside in ids]
