"""The guard: leases units to calls, and reads NVML while calls run.

Every 100 ms while some call holds a unit, those units; every other second all of them, for a process of ours that was
granted nothing. NVML is asked in a thread of its own, which may hang with the driver: then the calls that hold a unit
are ended, as the host's fault, since nobody can say any more what they do.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sandbox.errors import LaunchError
from sandbox.gpu import power
from sandbox.gpu.choosing import candidates, order
from sandbox.gpu.facts import GpuFacts
from sandbox.gpu.leases import Lease, Leases
from sandbox.gpu.limits import PERIOD_S, Asked
from sandbox.gpu.nvml import NvmlTrouble
from sandbox.gpu.sampling import Reading, Sample, Sampler
from sandbox.plan import LaunchPlan
from sandbox.supervisor.apart import HANG_S, Apart
from sandbox.supervisor.gpu_call import LOST_REASON, CallGpu, node_rules

if TYPE_CHECKING:
    from sandbox._linux.bpf import Rule

SLOW_S: Final = 2.0
DETAIL_S: Final = 1.0


class Guard:
    """All calls of one supervisor on a host with GPUs."""

    def __init__(self, data: Mapping[str, Any], tree: str, leases: Leases | None = None) -> None:
        self.facts = GpuFacts.from_json(data)
        self.apart = Apart()
        self.leases = leases or Leases()
        self._units = {unit.uuid: unit for unit in self.facts.units}
        self._tree = tree
        self.sampler = self._new_sampler()
        self._calls: list[CallGpu] = []
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._slow_s = self._detail_s = 0.0

    def __repr__(self) -> str:
        return f"<Guard units={len(self._units)} calls={len(self._calls)} {self.facts.trouble}>"

    def _new_sampler(self) -> Sampler:
        return Sampler(self._units.values(), self._tree, pids=self.facts.pids.ok)

    def grantable(self) -> list[Rule]:
        """The rule of every node that some call may be granted."""
        return node_rules([*self.facts.control_nodes, *(node for unit in self.facts.units for node in unit.nodes)])

    async def open_call(self, call_id: str, plan: LaunchPlan) -> CallGpu:
        """A call's part of the guard, with what it leases. Raises LaunchError."""
        if plan.gpu is None:
            return CallGpu(self, plan, Asked(), [], {})
        asked = Asked.from_json(plan.gpu)
        holder = {"pid": os.getpid(), "call_id": call_id}
        try:
            leases, before = await self.apart.do(lambda: self._lease(asked, holder))
            gpu = CallGpu(self, plan, asked, leases, before)
            try:
                await self.apart.do(gpu.cap_power)
            except BaseException:
                await gpu.close()
                raise
        except NvmlTrouble as trouble:
            raise LaunchError(trouble.message, step="gpu_lease", hint=trouble.hint) from trouble
        except TimeoutError:
            raise LaunchError(f"NVML did not answer for {HANG_S:.0f} s", step="gpu_lease") from None
        return gpu

    def _lease(self, asked: Asked, holder: Mapping[str, Any]) -> tuple[list[Lease], dict[str, Reading]]:
        """In the thread: choose by what is in use now, lock, and read where the account starts from."""
        try:
            units = candidates(asked, self.facts.units)
            ordered = order(asked, units, self.sampler.use(unit.uuid for unit in units))
        except ValueError as error:
            raise LaunchError(str(error), step="gpu_lease") from error
        leases = self.leases.acquire(ordered, asked.number, holder)
        try:
            sample = self.sampler.look([lease.unit.uuid for lease in leases], detailed=True, jails={})
            trouble = sample.trouble or next((item.trouble for item in sample.readings if item.trouble), "")
            if trouble:
                raise NvmlTrouble(trouble)
            for lease in leases:
                power.put_back_left(self.sampler.nvml(), self.sampler.handle(lease.unit.whole), lease)
        except BaseException:
            for lease in leases:
                lease.release()
            raise
        return leases, {reading.uuid: reading for reading in sample.readings}

    def watch(self, gpu: CallGpu) -> None:
        """Look after a call from now on."""
        self._calls.append(gpu)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
            self._task.add_done_callback(self._ended)

    def unwatch(self, gpu: CallGpu) -> None:
        if gpu in self._calls:
            self._calls.remove(gpu)
            self._wake.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled() and (error := task.exception()) is not None:
            # A guard that is not there guards nothing: whoever relies on it goes too.
            print(f"sandbox: the GPU guard failed: {error!r}", file=sys.stderr)
            for call in self._holders():
                call.end(f"{LOST_REASON}:guard failed")

    def _holders(self) -> list[CallGpu]:
        return [call for call in self._calls if call.units]

    def _by_jail(self) -> dict[str, CallGpu]:
        # Anew each time: a call may be given another jail when the one it had died before its start.
        return {call.watched.jail.name: call for call in self._calls if call.watched is not None}

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        looked_s = self._slow_s = self._detail_s = loop.time()
        while self._calls:
            left_s = looked_s + (PERIOD_S if self._holders() else SLOW_S) - loop.time()
            if left_s > 0:
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), left_s)
                continue
            looked_s = loop.time()
            await self._look(looked_s)

    async def _look(self, now_s: float) -> None:
        held = {uuid for call in self._holders() for uuid in call.units}
        is_slow, is_detailed = now_s - self._slow_s >= SLOW_S, now_s - self._detail_s >= DETAIL_S
        uuids = list(self._units if is_slow else held)
        jails = {call.watched.jail.pid: name for name, call in self._by_jail().items() if call.watched is not None}
        sampler = self.sampler
        try:
            # Details are only of interest to accounts.
            others = [uuid for uuid in uuids if uuid not in held]
            sample = await self.apart.do(
                lambda: _join(
                    sampler.look(sorted(held), detailed=is_detailed, jails=jails),
                    sampler.look(others, detailed=False, jails=jails) if others else Sample(),
                )
            )
        except TimeoutError:
            self.sampler = self._new_sampler()
            sample = Sample(trouble="TIMEOUT")
            for call in self._holders():
                call.end(f"{LOST_REASON}:no answer for {HANG_S:.0f} s")
        self._slow_s = now_s if is_slow else self._slow_s
        self._detail_s = now_s if is_detailed else self._detail_s
        self.take_in(sample)

    def take_in(self, sample: Sample) -> None:
        """Judge one sample."""
        if sample.trouble:
            for call in self._holders():
                call.troubled(sample.trouble)
            return
        calls = self._by_jail()
        for reading in sample.readings:
            for pid in reading.processes or ():
                other = calls.get(sample.jails.get(pid, ""))
                if other is not None and reading.uuid not in other.units:
                    other.used_without_grant(pid, reading.uuid)
        for name, call in calls.items():
            mine = {pid for pid, jail in sample.jails.items() if jail == name}
            call.take_in([reading for reading in sample.readings if reading.uuid in call.units], mine)

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.apart.close()


def _join(first: Sample, second: Sample) -> Sample:
    return Sample((*first.readings, *second.readings), {**first.jails, **second.jails}, first.trouble or second.trouble)
