"""What GPUs this host has, as frozen data: gathered by `inventory`, read by the planner. None of it is a judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.host.facts import Feature


@dataclass(frozen=True, slots=True)
class GpuNode:
    """A device node by its name below /dev. `usable`: a jail's uid could open it (`accesses` "r" or "rw")."""

    name: str
    major: int
    minor: int
    accesses: str = "rw"
    usable: bool = True


@dataclass(frozen=True, slots=True)
class GpuUnit:
    """What one lease is for: a whole GPU, or a MIG slice of one (then `parent` is the GPU's UUID).

    `index` is NVML's, "0" or "0:1" for slice 1 of GPU 0. `sm_percent`: share of the multiprocessors; None is unknown.
    `power_mw`: the least and the most that the power limit can be set to; None where it cannot.
    """

    uuid: str
    index: str
    name: str = ""
    parent: str = ""
    memory_bytes: int | None = None
    sm_percent: int | None = 100
    power_mw: tuple[int, int] | None = None
    energy: bool = False
    nodes: tuple[GpuNode, ...] = ()

    @property
    def is_slice(self) -> bool:
        return bool(self.parent)

    @property
    def whole(self) -> str:
        """The UUID of the GPU that it is, or is part of."""
        return self.parent or self.uuid


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """The GPUs of the supervisor's host. `trouble`: why none can be granted, by NVML's name for it; then `fix`.

    `pids`: whether NVML's process ids are ours, so that a process can be told to be a call's. `memory_limits`: whether
    the driver itself can limit a cgroup's memory. `libraries`: the driver's files outside the system's directories,
    each as (where it really is, the name that programs look for).
    """

    driver: str = ""
    trouble: str = ""
    fix: str = ""
    units: tuple[GpuUnit, ...] = ()
    control_nodes: tuple[GpuNode, ...] = ()
    libraries: tuple[tuple[str, str], ...] = ()
    pids: Feature = field(default_factory=lambda: Feature(True))
    memory_limits: Feature = field(default_factory=lambda: Feature(False))
    unknown: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GpuFacts:
        """Rebuild from `dataclasses.asdict`. Raises KeyError or TypeError on anything else: the sender is ours."""
        fields = dict(data)
        fields["units"] = tuple(_unit(unit) for unit in data["units"])
        fields["control_nodes"] = tuple(GpuNode(**node) for node in data["control_nodes"])
        fields["libraries"] = tuple((source, name) for source, name in data["libraries"])
        fields["unknown"] = tuple(data["unknown"])
        for name in ("pids", "memory_limits"):
            fields[name] = Feature(**data[name])
        return cls(**fields)


def _unit(data: Mapping[str, Any]) -> GpuUnit:
    power = tuple(data["power_mw"]) if data["power_mw"] is not None else None
    return GpuUnit(**{**data, "power_mw": power, "nodes": tuple(GpuNode(**node) for node in data["nodes"])})
