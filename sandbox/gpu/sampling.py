"""One look at the units through NVML: what is in use and by which processes. What is not answered is None.

Source: the NVML API reference. Utilisation is an average over 1/6 s to 1 s by product, power over 1 s on newer ones;
energy is a counter of the whole GPU. PCIe throughput takes the driver 20 ms to measure, so it is looked at seldom.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.gpu import owners
from sandbox.gpu.choosing import Use
from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.nvml import Nvml, NvmlTrouble

_PCIE_TX, _PCIE_RX = 0, 1
# After these the library has to be opened anew: it does not outlive a driver that was reloaded.
REOPEN = frozenset(("UNINITIALIZED", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH", "UNKNOWN"))


@dataclass(frozen=True, slots=True)
class Detail:
    """What is read once a second. Of a slice, power, energy and PCIe are those of the GPU it is part of."""

    sm_percent: int | None = None
    memory_percent: int | None = None
    power_mw: int | None = None
    energy_mj: int | None = None
    pcie_bytes_per_s: int | None = None
    process_sm: Mapping[int, float] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One unit at one moment. `processes`: pid -> bytes. `trouble`: NVML's name for why there is nothing."""

    uuid: str
    at_s: float
    memory_used_bytes: int | None = None
    processes: Mapping[int, int | None] | None = None
    detail: Detail | None = None
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """Readings of several units, and which of their processes run in a jail of ours (pid -> jail)."""

    readings: tuple[Reading, ...] = ()
    jails: Mapping[int, str] = field(default_factory=dict)
    trouble: str = ""


class Sampler:
    """Keeps NVML open between looks. For one thread at a time."""

    def __init__(self, units: Iterable[GpuUnit], tree: str = "", *, pids: bool = True) -> None:
        self._units = {unit.uuid: unit for unit in units}
        self._tree = tree
        self._pids = pids
        self._nvml: Nvml | None = None
        self._handles: dict[str, Any] = {}
        self._since_us: dict[str, int] = {}

    def look(self, uuids: Iterable[str], *, detailed: bool, jails: Mapping[int, str]) -> Sample:
        """Read these units. A unit's trouble stands in its reading; the library's own in the sample."""
        asked_at_s = owners.boot_time_s()
        try:
            nvml = self.nvml()
        except NvmlTrouble as trouble:
            return Sample(trouble=trouble.name)
        readings = tuple(self._read(nvml, self._units[uuid], detailed=detailed) for uuid in uuids)
        if any(reading.trouble in REOPEN for reading in readings):
            self.close()
        pids = {pid for reading in readings for pid in reading.processes or ()} if self._pids else set()
        found = {pid: jail for pid in pids if (jail := owners.jail_of(pid, self._tree, jails, asked_at_s)) is not None}
        return Sample(readings, found)

    def nvml(self) -> Nvml:
        """The library, opened when it is needed and again after it was lost. Raises NvmlTrouble."""
        if self._nvml is None:
            self._nvml = Nvml.open()
        return self._nvml

    def handle(self, uuid: str) -> Any:
        """NVML's handle of a unit. Raises NvmlTrouble."""
        if uuid not in self._handles:
            self._handles[uuid] = self.nvml().must("nvmlDeviceGetHandleByUUID", uuid)
        return self._handles[uuid]

    def use(self, uuids: Iterable[str]) -> dict[str, Use]:
        """How busy these units are, for choosing one. What is not answered stays unknown."""
        nvml = self.nvml()
        found = {}
        for uuid in uuids:
            reading = self._read(nvml, self._units[uuid], detailed=True)
            if reading.trouble:
                continue
            found[uuid] = Use(
                memory_used_bytes=reading.memory_used_bytes,
                processes=None if reading.processes is None else len(reading.processes),
                sm_percent=reading.detail.sm_percent if reading.detail else None,
                mps=bool(nvml.maybe("nvmlDeviceGetMPSComputeRunningProcesses", self.handle(uuid))),
            )
        return found

    def _read(self, nvml: Nvml, unit: GpuUnit, *, detailed: bool) -> Reading:
        at_s = time.monotonic()
        try:
            handle = self.handle(unit.uuid)
            memory = nvml.maybe("nvmlDeviceGetMemoryInfo", handle)
            return Reading(
                uuid=unit.uuid,
                at_s=at_s,
                memory_used_bytes=int(memory.used) if memory is not None else None,
                processes=nvml.processes(handle),
                detail=self._detail(nvml, unit) if detailed else None,
            )
        except NvmlTrouble as trouble:
            self._handles.pop(unit.uuid, None)  # a handle does not outlive a reset
            return Reading(unit.uuid, at_s, trouble=trouble.name)

    def _detail(self, nvml: Nvml, unit: GpuUnit) -> Detail:
        whole = self.handle(unit.whole)
        rates = None if unit.is_slice else nvml.maybe("nvmlDeviceGetUtilizationRates", whole)
        sent = nvml.maybe("nvmlDeviceGetPcieThroughput", whole, _PCIE_TX)
        received = nvml.maybe("nvmlDeviceGetPcieThroughput", whole, _PCIE_RX)
        return Detail(
            sm_percent=int(rates.gpu) if rates is not None else None,
            memory_percent=int(rates.memory) if rates is not None else None,
            power_mw=nvml.maybe("nvmlDeviceGetPowerUsage", whole),
            energy_mj=nvml.maybe("nvmlDeviceGetTotalEnergyConsumption", whole),
            pcie_bytes_per_s=None if sent is None or received is None else (sent + received) * 1024,
            process_sm=None if unit.is_slice else self._process_sm(nvml, unit, whole),
        )

    def _process_sm(self, nvml: Nvml, unit: GpuUnit, handle: Any) -> dict[int, float] | None:
        """pid -> average SM percent since the last look; empty when no process used any."""
        since = self._since_us.setdefault(unit.uuid, time.time_ns() // 1000 - 1_000_000)
        samples = nvml.utilisation_of_processes(handle, since)
        if samples is None:
            return None
        by_pid: dict[int, list[int]] = {}
        for pid, at_us, sm, _ in samples:
            # Percentages beyond 100 are the driver's way of saying that a sample is not valid.
            if at_us > since and sm <= 100:
                by_pid.setdefault(pid, []).append(sm)
                self._since_us[unit.uuid] = max(self._since_us[unit.uuid], at_us)
        return {pid: sum(values) / len(values) for pid, values in by_pid.items()}

    def close(self) -> None:
        """Let NVML go; the next look opens it anew."""
        self._handles.clear()
        nvml, self._nvml = self._nvml, None
        if nvml is not None:
            nvml.close()
