"""What holds each limit of a GPU call on the units that it may get: one row per limit, from the hardest means down.

    hardware   a MIG slice that is no larger than what was asked
    driver     a limit that the driver keeps: memory of a cgroup (r615), power of the whole GPU
    kernel     the device node is not there, and the cgroup's device rule refuses it
    polled     NVML is read and the call is ended: bounds what is used in time, prevents nothing
    none       nothing here holds it

Pure: facts and wishes in, rows out. The planner asks about every unit that might be chosen, the supervisor again
about those that were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from sandbox.gpu.facts import GpuFacts, GpuUnit
from sandbox.plan import Limit

TYPE_CHECKING = False

if TYPE_CHECKING:
    from sandbox.plan import Level, Strength

PERIOD_S: Final = 0.1
POLLED: Final = f"NVML polled every {PERIOD_S * 1000:.0f} ms, then the call is killed"
UNVERIFIED: Final = "the driver's own accounting per cgroup; never run on hardware by us"
_RANK: Final[dict[Strength, int]] = {"none": 0, "advisory": 1, "polled": 2, "driver": 3, "kernel": 4, "hardware": 5}


@dataclass(frozen=True, slots=True)
class Asked:
    """The manifest's `[gpu]` section as plain data. None: no such limit."""

    count: int = 0
    devices: tuple[str, ...] = ()
    memory_bytes: int | None = None
    sm_percent: int | None = None
    seconds: float | None = None
    energy_j: float | None = None
    power_watts: int | None = None
    processes_max: int | None = None
    allow_mps: bool = False
    duty_percent: int = 95
    duty_time_s: float = 300.0

    @property
    def number(self) -> int:
        """How many units."""
        return self.count or len(self.devices)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Asked:
        known = {name: data[name] for name in (entry.name for entry in fields(cls)) if name in data}
        return cls(**{**known, "devices": tuple(data.get("devices", ()))})


@dataclass(frozen=True, slots=True)
class _Means:
    strength: Strength
    mechanism: str
    reason: str = ""


def judge(asked: Asked, units: Sequence[GpuUnit], facts: GpuFacts) -> tuple[Limit, ...]:
    """A row for each limit that was asked for. Where units differ, the weakest one speaks for all."""
    rows = {
        "gpu_memory": (asked.memory_bytes, [_memory(asked, unit, facts) for unit in units]),
        "gpu_sm": (asked.sm_percent, [_sm(asked, unit) for unit in units]),
        "gpu_power": (asked.power_watts, [_power(asked, unit) for unit in units]),
        "gpu_energy": (asked.energy_j, [_energy(unit, facts) for unit in units]),
        "gpu_seconds": (asked.seconds, [_polled(facts)]),
        "gpu_processes": (asked.processes_max, [_polled(facts)]),
    }
    return tuple(_row(name, value, means) for name, (value, means) in rows.items() if value is not None and means)


def _row(name: str, value: int | float, means: Sequence[_Means]) -> Limit:
    weakest = min(means, key=lambda item: _RANK[item.strength])
    level: Level = "none" if weakest.strength == "none" else "partial" if weakest.strength == "polled" else "full"
    applied = None if level == "none" else value
    return Limit(name, value, applied, level, weakest.mechanism, weakest.strength, weakest.reason)


def _memory(asked: Asked, unit: GpuUnit, facts: GpuFacts) -> _Means:
    if unit.is_slice and unit.memory_bytes is not None and unit.memory_bytes <= (asked.memory_bytes or 0):
        return _Means("hardware", f"MIG slice of {unit.memory_bytes >> 20} MiB")
    if not unit.is_slice and facts.memory_limits.ok and asked.number == 1:
        return _Means("driver", "the driver's memory limit of the call's cgroup", UNVERIFIED)
    return _polled(facts, "what is allocated between two samples is not prevented")


def _sm(asked: Asked, unit: GpuUnit) -> _Means:
    if unit.is_slice and unit.sm_percent is not None and unit.sm_percent <= (asked.sm_percent or 0):
        return _Means("hardware", f"MIG slice with {unit.sm_percent} % of the multiprocessors")
    if asked.sm_percent == 100:
        return _Means("hardware", "the whole GPU")
    reason = "only a MIG slice caps the share of the multiprocessors; without one, programs take turns, uncapped"
    return _Means("none", "", reason)


def _power(asked: Asked, unit: GpuUnit) -> _Means:
    if unit.power_mw is None:
        return _Means(
            "none", "", "the power limit of this GPU cannot be set here (root, a whole GPU, driver's support)"
        )
    low, high = unit.power_mw
    if not low <= (asked.power_watts or 0) * 1000 <= high:
        return _Means("none", "", f"its power limit can be set between {low // 1000} and {high // 1000} W")
    return _Means("driver", "the GPU's power limit while the call holds it", "of the whole GPU, put back afterwards")


def _energy(unit: GpuUnit, facts: GpuFacts) -> _Means:
    if not unit.energy:
        return _Means("none", "", "this GPU has no energy counter, and power samples are no measure of energy")
    return _polled(facts, "shared with what else runs on the GPU" if unit.is_slice else "")


def _polled(facts: GpuFacts, reason: str = "") -> _Means:
    if not facts.pids.ok:
        return _Means("none", "", facts.pids.reason)
    return _Means("polled", POLLED, reason)
