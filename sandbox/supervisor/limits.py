"""Which of a plan's limits a cgroup carries, and for which devices."""

from __future__ import annotations

from collections.abc import Iterable

from sandbox._linux import cgroup
from sandbox.plan import LaunchPlan

_CGROUP_KEYS = {"memory": "memory_bytes", "pids": "pids", "cpus": "cpus", "io": "io_bytes_per_s"}


def cgroup_limits(plan: LaunchPlan) -> dict[str, float | int]:
    """Those limits of the plan that a cgroup carries. pid 1 is counted with the tool's tasks."""
    found: dict[str, float | int] = {}
    for limit in plan.limits:
        if limit.mechanism.startswith("cgroup") and limit.control in _CGROUP_KEYS and limit.applied is not None:
            assert isinstance(limit.applied, int | float)
            found[_CGROUP_KEYS[limit.control]] = limit.applied + (1 if limit.control == "pids" else 0)
    return found


def io_devices(plan: LaunchPlan, disks: Iterable[str]) -> list[str]:
    """The disks that this call can read or write, each of which gets the io limit.

    `disks`: all of the host's. They stand in where a path lies on no disk that can be told (an overlay, a
    container's root). Empty where the host has no disk: then there is nothing to limit.
    """
    paths = {"/usr"}
    for step in plan.steps:
        if step.name == "system_view":
            paths.update(source for source, _ in step.args["python_paths"])
        elif step.name == "workspace" and step.args.get("host_path"):
            paths.add(step.args["host_path"])
        elif step.name == "grants":
            paths.update(grant["host_path"] for grant in step.args["paths"])
    found = {cgroup.block_device(path) for path in paths}
    if None in found:
        found.update(disks)
    return sorted(device for device in found if device is not None)
