"""Which of a plan's limits a cgroup carries, and for which devices."""

from __future__ import annotations

from pathlib import Path

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


def io_devices(state: Path, plan: LaunchPlan) -> list[str]:
    """The block devices behind what this call can write: an io limit is per device."""
    paths = {str(state)}
    for step in plan.steps:
        if step.name == "workspace" and step.args.get("host_path"):
            paths.add(step.args["host_path"])
        elif step.name == "grants":
            paths.update(grant["host_path"] for grant in step.args["paths"])
    return sorted({device for path in paths if (device := cgroup.block_device(path)) is not None})
