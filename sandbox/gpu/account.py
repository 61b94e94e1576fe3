"""What one call uses of its units, from one reading to the next, and whether that is over a limit. Pure.

GPU seconds are the share of the multiprocessors that the call's processes had, added up over time. Where the driver
does not say which process had them, the device's own share counts while nobody else is on it; where it says neither
(MIG), the time during which the call had a process on the device. `seconds_by` says which it was.
Energy is the device's counter: exact when the call was alone on it, else the call's part by its share.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.limits import PERIOD_S, Asked
from sandbox.gpu.sampling import Detail, Reading
from sandbox.monitor.gpu import DutyPoint

DUTY_POINTS_MAX: Final = 7200
# The bases of GPU seconds and of memory, from the best down; a call's is the weakest that was used.
_BASES: Final = ("none", "processes", "device", "residence")


@dataclass(frozen=True, slots=True)
class Breach:
    """A limit that was crossed: what was seen, and how long nobody had looked (the overshoot is bounded by that)."""

    limit: str
    seen: float
    allowed: float
    gap_s: float

    def to_json(self) -> dict[str, Any]:
        return {"limit": self.limit, "seen": self.seen, "allowed": self.allowed, "gap_s": round(self.gap_s, 4)}


class UnitTally:
    """One unit's share of a call's account."""

    def __init__(self, unit: GpuUnit, before: Reading) -> None:
        self.unit = unit
        self.memory_bytes: int | None = 0
        self.memory_peak_bytes: int | None = None
        self.memory_by = "none"
        self.seconds: float | None = None
        self.seconds_by = "none"
        self.energy_j: float | None = None
        self.is_energy_known = unit.energy
        self.shared = unit.is_slice
        self.pcie_bytes: float | None = None
        self.processes = 0
        self.processes_peak = 0
        self.samples = 0
        self.gap_s = 0.0
        self.gap_max_s = 0.0
        self.duty: deque[DutyPoint] = deque(maxlen=DUTY_POINTS_MAX)
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._before = before
        self._last_s = before.at_s
        self._detailed = before
        self._others = False
        # Processes of the call since the last detail: one that has ended meanwhile is still in the driver's samples.
        self._recent: set[int] = set()
        self._digest = hashlib.sha256()

    def add(self, reading: Reading, mine: Collection[int]) -> None:
        """Take in a reading; `mine` are the pids of the call's processes on this unit."""
        self.gap_s = reading.at_s - self._last_s
        self.gap_max_s = max(self.gap_max_s, self.gap_s)
        self._last_s = reading.at_s
        self.samples += 1
        self.processes = len(mine)
        self.processes_peak = max(self.processes_peak, len(mine))
        self._recent.update(mine)
        # The driver may still list a process that has just been killed.
        if reading.processes is None or not self._recent.issuperset(reading.processes):
            self._others = True
        self._add_memory(reading, mine)
        if reading.detail is not None:
            self._add_detail(reading, reading.detail, mine)
            self._recent = set(mine)
        self._digest.update(f"{reading.at_s:.3f} {self.memory_bytes} {len(mine)} {reading.detail}\n".encode())

    def _add_memory(self, reading: Reading, mine: Collection[int]) -> None:
        used = [reading.processes[pid] for pid in mine] if reading.processes is not None else []
        known = [value for value in used if value is not None]
        if reading.processes is not None and len(known) == len(used):
            self.memory_bytes = sum(known)
            self._weaken("memory_by", "processes" if used else "none")
        elif reading.memory_used_bytes is not None and self._before.memory_used_bytes is not None:
            # Not said per process: what the device holds more than before the call, an upper bound of the call's part.
            self.memory_bytes = max(0, reading.memory_used_bytes - self._before.memory_used_bytes)
            self._weaken("memory_by", "device")
        else:
            self.memory_bytes = None
            return
        self.memory_peak_bytes = max(self.memory_peak_bytes or 0, self.memory_bytes)

    def _add_detail(self, reading: Reading, detail: Detail, mine: Collection[int]) -> None:
        elapsed_s = reading.at_s - self._detailed.at_s
        share, basis = self._share(detail)
        self.seconds = (self.seconds or 0.0) + share * elapsed_s
        if self._recent:
            self._weaken("seconds_by", basis)
        self._add_energy(detail)
        for name in ("sm_percent", "memory_percent", "power_mw"):
            self._average(name, getattr(detail, name), elapsed_s)
        if detail.pcie_bytes_per_s is not None:
            self.pcie_bytes = (self.pcie_bytes or 0.0) + detail.pcie_bytes_per_s * elapsed_s
        if detail.sm_percent is not None and mine:
            self.duty.append(DutyPoint(reading.at_s, detail.sm_percent, detail.pcie_bytes_per_s))
        self._detailed = reading
        self._others = False

    def _share(self, detail: Detail) -> tuple[float, str]:
        """The part of the multiprocessors that the call had since the last detail, and how that is known."""
        if detail.process_sm is not None:
            own = sum(value for pid, value in detail.process_sm.items() if pid in self._recent)
            return min(1.0, own / 100), "processes"
        if not self._recent:
            return 0.0, "none"
        if detail.sm_percent is not None and not self._others:
            return detail.sm_percent / 100, "device"
        return 1.0, "residence"

    def _add_energy(self, detail: Detail) -> None:
        before = self._detailed.detail.energy_mj if self._detailed.detail is not None else None
        if detail.energy_mj is None or before is None:
            # Unknown from here on rather than less than it was.
            self.energy_j, self.is_energy_known = None, False
            return
        delta_j = max(0, detail.energy_mj - before) / 1000
        if self._others:
            self.shared = True
            delta_j *= self._part(detail)
        if self.is_energy_known:
            self.energy_j = (self.energy_j or 0.0) + delta_j

    def _part(self, detail: Detail) -> float:
        """The call's part of what everybody on the device used; all of it where nobody can say."""
        if not self._recent:
            return 0.0
        total = sum((detail.process_sm or {}).values())
        own = sum(value for pid, value in (detail.process_sm or {}).items() if pid in self._recent)
        return own / total if total else 1.0

    def _average(self, name: str, value: float | None, weight: float) -> None:
        if value is not None and weight > 0:
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def _mean(self, name: str) -> float | None:
        weight = self._weights.get(name)
        return round(self._sums[name] / weight, 2) if weight else None

    def _weaken(self, name: str, basis: str) -> None:
        if _BASES.index(basis) > _BASES.index(getattr(self, name)):
            setattr(self, name, basis)

    def to_json(self) -> dict[str, Any]:
        power = self._mean("power_mw")
        return {
            "uuid": self.unit.uuid,
            "parent_uuid": self.unit.parent or None,
            "index": self.unit.index,
            "name": self.unit.name,
            "memory_peak_bytes": self.memory_peak_bytes,
            "memory_by": self.memory_by,
            "seconds": None if self.seconds is None else round(self.seconds, 3),
            "seconds_by": self.seconds_by,
            "energy_j": None if self.energy_j is None else round(self.energy_j, 3),
            "energy_shared": self.shared,
            "sm_percent_avg": self._mean("sm_percent"),
            "memory_percent_avg": self._mean("memory_percent"),
            "power_watts_avg": None if power is None else round(power / 1000, 2),
            "pcie_bytes": None if self.pcie_bytes is None else round(self.pcie_bytes),
            "processes_peak": self.processes_peak,
            "samples": self.samples,
            "period_s": PERIOD_S,
            "gap_max_s": round(self.gap_max_s, 3),
            "series_sha256": f"sha256:{self._digest.hexdigest()}",
        }


class Account:
    """All units of one call together. `enforced`: the limits that are polled for."""

    def __init__(
        self, asked: Asked, units: Sequence[GpuUnit], before: Mapping[str, Reading], enforced: Collection[str]
    ):
        self.asked = asked
        self.tallies = {unit.uuid: UnitTally(unit, before[unit.uuid]) for unit in units}
        self._enforced = frozenset(enforced)
        self._pids: dict[str, frozenset[int]] = {}

    def add(self, reading: Reading, mine: Collection[int]) -> None:
        """Take in a reading of one of the call's units."""
        self._pids[reading.uuid] = frozenset(mine)
        self.tallies[reading.uuid].add(reading, mine)

    def breaches(self) -> list[Breach]:
        """Every enforced limit that is crossed now."""
        tallies = self.tallies.values()
        gap_s = max((tally.gap_s for tally in tallies), default=0.0)
        pids = frozenset[int]().union(*self._pids.values())
        asked = self.asked
        now: dict[str, tuple[float | None, float | None]] = {
            "gpu_memory": (sum(tally.memory_bytes or 0 for tally in tallies), asked.memory_bytes),
            "gpu_seconds": (sum(tally.seconds or 0.0 for tally in tallies), asked.seconds),
            "gpu_energy": (sum(tally.energy_j or 0.0 for tally in tallies), asked.energy_j),
            "gpu_processes": (len(pids), asked.processes_max),
        }
        return [
            Breach(name, seen, allowed, gap_s)
            for name, (seen, allowed) in now.items()
            if name in self._enforced and seen is not None and allowed is not None and seen > allowed
        ]

    def unwatchable(self) -> str:
        """An enforced limit whose value the driver has stopped giving; empty when all can be seen."""
        tallies = self.tallies.values()
        if "gpu_memory" in self._enforced and any(tally.memory_bytes is None for tally in tallies):
            return "gpu_memory"
        if "gpu_energy" in self._enforced and any(not tally.is_energy_known for tally in tallies):
            return "gpu_energy"
        return ""

    def to_json(self) -> list[dict[str, Any]]:
        return [tally.to_json() for tally in self.tallies.values()]
