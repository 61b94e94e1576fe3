"""What `sandbox gpu` shows: devices, leases, who uses what, and what each limit would be held by here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sandbox.gpu import inventory, owners
from sandbox.gpu.facts import GpuFacts, GpuUnit
from sandbox.gpu.leases import Leases
from sandbox.gpu.limits import Asked, judge
from sandbox.gpu.nvml import NvmlTrouble
from sandbox.gpu.sampling import Reading, Sampler

GIB = 1 << 30


class Report:
    """Looks as often as it is asked to. `facts` is None on a host without any sign of a GPU."""

    def __init__(self, leases: Leases | None = None) -> None:
        data = inventory.find()
        self.facts = GpuFacts.from_json(data) if data is not None else None
        self._leases = leases or Leases()
        self._sampler = Sampler(self.facts.units if self.facts is not None else ())

    def look(self) -> dict[str, Any]:
        """Everything as JSON data; what NVML does not say is null."""
        facts = self.facts
        if facts is None:
            return {"gpu": False, "trouble": "", "units": []}
        readings: Mapping[str, Reading] = {}
        if facts.units:
            sample = self._sampler.look([unit.uuid for unit in facts.units], detailed=True, jails={})
            readings = {reading.uuid: reading for reading in sample.readings}
        holders = self._leases.holders(facts.units)
        return {
            "gpu": True,
            "driver": facts.driver,
            "trouble": facts.trouble,
            "fix": facts.fix,
            "pids": asdict(facts.pids),
            "memory_limits": asdict(facts.memory_limits),
            "unknown": list(facts.unknown),
            "units": [self._unit(facts, unit, readings.get(unit.uuid), holders) for unit in facts.units],
        }

    def _unit(
        self, facts: GpuFacts, unit: GpuUnit, reading: Reading | None, holders: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        detail = reading.detail if reading is not None else None
        return {
            **{name: getattr(unit, name) for name in ("index", "uuid", "parent", "name", "memory_bytes", "sm_percent")},
            "nodes": [node.name for node in unit.nodes],
            "trouble": reading.trouble if reading is not None else "",
            "memory_used_bytes": reading.memory_used_bytes if reading is not None else None,
            "sm_used_percent": detail.sm_percent if detail is not None else None,
            "power_watts": detail.power_mw / 1000 if detail is not None and detail.power_mw is not None else None,
            "lease": holders.get(unit.uuid),
            "processes": _processes(reading, facts),
            "limits": {
                limit.control: {"level": limit.level, "strength": limit.strength, "reason": limit.reason}
                for limit in would_hold(unit, facts)
            },
        }

    def close(self) -> None:
        try:
            self._sampler.close()
        except NvmlTrouble:
            return  # there is nothing to tell a driver that is gone


def _processes(reading: Reading | None, facts: GpuFacts) -> list[dict[str, Any]] | None:
    if reading is None or reading.processes is None:
        return None
    return [
        {"pid": pid, "memory_bytes": used, "call": owners.call_of(pid) if facts.pids.ok else None}
        for pid, used in sorted(reading.processes.items())
    ]


def would_hold(unit: GpuUnit, facts: GpuFacts) -> tuple[Any, ...]:
    """By what limits of a call on this unit would be held: those that fit it best."""
    power = sum(unit.power_mw) // 2000 if unit.power_mw is not None else 100
    asked = Asked(
        count=1,
        memory_bytes=unit.memory_bytes if unit.is_slice and unit.memory_bytes is not None else GIB,
        sm_percent=unit.sm_percent if unit.is_slice else 50,
        seconds=60.0,
        energy_j=1000.0,
        power_watts=power,
        processes_max=1,
    )
    return judge(asked, [unit], facts)
