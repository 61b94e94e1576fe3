"""Which units a call may get, and in which order to try them: the least used one that fits comes first. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sandbox.gpu.facts import GpuNode, GpuUnit
from sandbox.gpu.limits import Asked

# What the driver itself takes of a device that nobody uses, and of a slice.
OVERHEAD_BYTES: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class Use:
    """How much of a unit is in use, by anyone. None: not known."""

    memory_used_bytes: int | None = None
    processes: int | None = None
    sm_percent: int | None = None
    mps: bool = False


def candidates(asked: Asked, units: Sequence[GpuUnit]) -> tuple[GpuUnit, ...]:
    """The units that could serve: the named ones in their order, else all that are usable and large enough.

    Raises ValueError with what is missing.
    """
    if asked.devices:
        return tuple(_named(name, units) for name in asked.devices)
    fitting = tuple(unit for unit in units if _is_large_enough(asked, unit) and not unusable(unit))
    if len(fitting) < asked.number:
        there = f"{len(fitting)} of {len(units)}" if len(fitting) < len(units) else f"{len(units)}"
        why = next((f": {why}" for unit in units if (why := unusable(unit))), "")
        raise ValueError(f"{asked.number} GPUs are asked for, and this host has {there} that can be given{why}")
    return fitting


def _named(name: str, units: Sequence[GpuUnit]) -> GpuUnit:
    for unit in units:
        if name in (unit.uuid, unit.index):
            if why := unusable(unit):
                raise ValueError(why)
            return unit
    there = ", ".join(f"{unit.index} ({unit.uuid})" for unit in units) or "none"
    raise ValueError(f"there is no GPU {name!r} that can be given; there are: {there}")


def _is_large_enough(asked: Asked, unit: GpuUnit) -> bool:
    # A slice that is sold as 5 GB holds somewhat less than 5 GiB; it is what was meant.
    return unit.memory_bytes is None or unit.memory_bytes >= (asked.memory_bytes or 0) * 9 // 10


def unusable(unit: GpuUnit) -> str:
    """Why a jail could not open this unit; empty when it could. A slice has two capability nodes of its own."""
    if not unit.nodes or (unit.is_slice and len(unit.nodes) < 3):
        return f"device nodes of GPU {unit.index} are missing below /dev"
    return closed(unit.nodes)


def closed(nodes: Iterable[GpuNode]) -> str:
    """The first of these nodes that a jail's user could not open; empty when there is none."""
    node = next((node for node in nodes if not node.usable), None)
    return f"/dev/{node.name} is not open to everyone, and so not to a jail's user: chmod a+rw" if node else ""


def order(asked: Asked, units: Sequence[GpuUnit], use: Mapping[str, Use]) -> tuple[GpuUnit, ...]:
    """Those of the candidates that fit now, the least used first. Raises ValueError naming why the others do not."""
    reasons = {unit.uuid: _unfit(asked, unit, use.get(unit.uuid, Use())) for unit in units}
    fitting = [unit for unit in units if not reasons[unit.uuid]]
    if len(fitting) < asked.number:
        raise ValueError("; ".join(f"GPU {unit.index}: {why}" for unit in units if (why := reasons[unit.uuid])))
    if asked.devices:
        return tuple(fitting)
    return tuple(sorted(fitting, key=lambda unit: _busy(unit, use.get(unit.uuid, Use()))))


def _unfit(asked: Asked, unit: GpuUnit, use: Use) -> str:
    if use.mps and not asked.allow_mps:
        return "an MPS server uses it, whose clients share their faults (gpu.allow_mps = true permits that)"
    if asked.devices or not asked.memory_bytes or unit.memory_bytes is None or use.memory_used_bytes is None:
        return ""
    free = unit.memory_bytes - use.memory_used_bytes
    if free < min(asked.memory_bytes, unit.memory_bytes) - OVERHEAD_BYTES:
        return f"{free >> 20} MiB free of {unit.memory_bytes >> 20}, {asked.memory_bytes >> 20} asked for"
    return ""


def _busy(unit: GpuUnit, use: Use) -> tuple[int, int, int, tuple[int, ...]]:
    """What is not known counts as busy: a unit that is known to be idle goes first."""
    unknown = 1 << 62
    return (
        unknown if use.processes is None else use.processes,
        unknown if use.memory_used_bytes is None else use.memory_used_bytes,
        0 if use.sm_percent is None else use.sm_percent,
        tuple(int(part) for part in unit.index.split(":")),
    )


def cdi_names(units: Iterable[GpuUnit]) -> tuple[str, ...]:
    """The units as a container runtime is told of them (Container Device Interface)."""
    return tuple(f"nvidia.com/gpu={unit.uuid}" for unit in units)


def environment(units: Iterable[GpuUnit]) -> dict[str, str]:
    """The variables that name the granted units to CUDA and to the container toolkit."""
    names = ",".join(unit.uuid for unit in units)
    return {"CUDA_VISIBLE_DEVICES": names, "NVIDIA_VISIBLE_DEVICES": names or "void"}
