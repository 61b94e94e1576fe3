"""One call's GPUs: what it leases, what it may open, its account, its findings, and its end when it goes beyond.

A breach is answered by freezing the call, so that it does not go on while it is ended, and killing it by its group.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from sandbox.errors import LaunchError
from sandbox.gpu import power
from sandbox.gpu.account import Account, Breach
from sandbox.gpu.choosing import cdi_names, environment
from sandbox.gpu.facts import GpuNode
from sandbox.gpu.leases import Lease
from sandbox.gpu.limits import Asked, judge
from sandbox.gpu.nvml import LOST, NvmlTrouble
from sandbox.gpu.sampling import Reading, Sample
from sandbox.monitor import gpu as rules
from sandbox.plan import LaunchPlan, Limit

if TYPE_CHECKING:
    from sandbox._linux.bpf import Rule
    from sandbox.launchers.contract import Group
    from sandbox.supervisor.gpu import Watched
    from sandbox.supervisor.gpu_guard import Guard

# A driver may refuse to answer once; as often as this in a row, nobody watches the call any more.
TROUBLES_MAX: Final = 3
CMDLINE_MAX: Final = 4096
FINDINGS_MAX: Final = 50
LOST_REASON: Final = "gpu_lost"
NO_GRANT_REASON: Final = "gpu"


class CallGpu:
    """One call's units, its account and its findings; without units, only what it may be seen to use all the same."""

    def __init__(
        self, guard: Guard, plan: LaunchPlan, asked: Asked, leases: list[Lease], before: Mapping[str, Reading]
    ) -> None:
        self._guard = guard
        self._asked = asked
        self._leases = leases
        self.units = {lease.unit.uuid: lease.unit for lease in leases}
        self.limits = judge(asked, list(self.units.values()), guard.facts) if leases else ()
        self.plan = self._granted(plan) if leases else plan
        enforced = [limit.control for limit in self.limits if limit.level != "none"]
        self.account = Account(asked, list(self.units.values()), before, enforced)
        self.findings: list[dict[str, Any]] = []
        self.watched: Watched | None = None
        self._power_before: dict[str, int] = {}
        self._troubles = 0
        self._seen_pids: set[int] = set()
        self._rules_said: set[str] = set()
        self._breach: Breach | None = None
        self._is_lost = False
        self._reaction_s: float | None = None
        self._ended: asyncio.Task[None] | None = None
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<CallGpu units={','.join(unit.index for unit in self.units.values()) or '-'}>"

    def _nodes(self) -> list[GpuNode]:
        if not self.units:
            return []
        nodes = [*self._guard.facts.control_nodes, *(node for unit in self.units.values() for node in unit.nodes)]
        return list(dict.fromkeys(nodes))

    def _granted(self, plan: LaunchPlan) -> LaunchPlan:
        """The plan with the very nodes that were leased, or an engine's names for them, and the variables."""
        if plan.launcher == "docker":
            plan = plan.with_step_args("container", devices=list(cdi_names(self.units.values())))
        else:
            step = next(step for step in plan.steps if step.name == "devices")
            nodes = {node.name: [node.major, node.minor] for node in self._nodes()}
            plan = plan.with_step_args("devices", nodes=[*step.args["nodes"], *nodes], numbers=nodes)
        return replace(plan, env={**plan.env, **environment(self.units.values())})

    def device_rules(self) -> Sequence[Rule]:
        """What the call's group may open beside every jail's nodes."""
        return node_rules(self._nodes())

    def cap_power(self) -> None:
        """In the thread: set the power limit of the leased GPUs, if one was asked for. Raises NvmlTrouble."""
        if not any(limit.control == "gpu_power" and limit.level != "none" for limit in self.limits):
            return
        sampler = self._guard.sampler
        for lease in self._leases:
            handle = sampler.handle(lease.unit.uuid)
            before = power.cap(sampler.nvml(), handle, lease, self._asked.power_watts or 0)
            self._power_before[lease.unit.uuid] = before

    async def start(self, watched: Watched) -> None:
        """The jail is there: put its group under the driver's limit, and watch it. Raises LaunchError."""
        self.watched = watched
        group = watched.jail.group
        memory = next((limit for limit in self.limits if limit.control == "gpu_memory"), None)
        if memory is not None and memory.strength == "driver":
            try:
                await self._guard.apart.do(lambda: self._limit_memory(group))
            except (NvmlTrouble, TimeoutError) as error:
                raise LaunchError(f"the driver's memory limit: {error}", step="gpu_memory") from error
        self._note(rules.miner_argv(self.plan.argv))
        self._guard.watch(self)

    def _limit_memory(self, group: Group | None) -> None:
        if group is None or not group.v2:
            raise NvmlTrouble("NO_CGROUP", "nvmlDeviceSetMemoryLimits_v1")
        for uuid in self.units:
            handle = self._guard.sampler.handle(uuid)
            self._guard.sampler.nvml().set_memory_limit(handle, group.v2, self._asked.memory_bytes or 0)

    def take_in(self, readings: Iterable[Reading], mine: set[int]) -> None:
        """Account for readings of this call's units, and end it when it is over a limit."""
        bad = ""
        for reading in readings:
            if reading.trouble:
                bad = reading.trouble
                continue
            self.account.add(reading, mine & set(reading.processes or ()))
        self._look_at_commands(mine)
        if bad or (bad := self.account.unwatchable()):
            self.troubled(bad)
            return
        self._troubles = 0
        breaches = self.account.breaches()
        if breaches and self._breach is None:
            self._breach = breaches[0]
            self.end(breaches[0].limit)
        for uuid, tally in self.account.tallies.items():
            if "gpu_steady_duty" not in self._rules_said:
                percent, time_s = self._asked.duty_percent, self._asked.duty_time_s
                self._note(rules.gpu_steady_duty(tuple(tally.duty), uuid, percent=percent, time_s=time_s))

    def _look_at_commands(self, pids: set[int]) -> None:
        """The command line of each process that is new on the call's GPU. It is the tool's: data, bounded."""
        for pid in pids - self._seen_pids:
            self._seen_pids.add(pid)
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    words = file.read(CMDLINE_MAX).decode("utf-8", "replace").split("\0")
            except OSError:
                continue
            self._note(rules.miner_argv([word for word in words if word], pid))

    def used_without_grant(self, pid: int, uuid: str) -> None:
        """A process of this call is on a unit that it does not hold: the end of the call."""
        if "gpu_used_without_grant" not in self._rules_said:
            self._note(rules.gpu_used_without_grant(pid, uuid, list(self.units)))
            self.end(NO_GRANT_REASON)

    def troubled(self, name: str) -> None:
        """NVML did not answer for this call's units. Not the tool's fault, whatever it does meanwhile."""
        self._troubles += 1
        if name in LOST or self._troubles >= TROUBLES_MAX:
            self.end(f"{LOST_REASON}:{name}")

    def _note(self, finding: rules.Finding | None) -> None:
        if finding is None or len(self.findings) >= FINDINGS_MAX:
            return
        # Of the command that was asked for and the process that it became, one is enough.
        same = finding.evidence.get("matched")
        if same is None or all(same != other["evidence"][0].get("matched") for other in self.findings):
            self._rules_said.add(finding.rule)
            self.findings.append(finding.to_json())

    def end(self, reason: str) -> None:
        """Freeze and kill. The first reason counts."""
        self._is_lost = self._is_lost or reason.startswith(LOST_REASON)
        if self.watched is None:
            return
        if self._ended is None:
            self._ended = asyncio.get_running_loop().create_task(self._time_death(self.watched, time.monotonic()))
        group = self.watched.jail.group
        if group is not None:
            # Frozen, it takes no more while it is being killed. Where nothing can freeze, the kill alone has to do.
            with contextlib.suppress(OSError):
                group.freeze(timeout_s=0)
        self.watched.stop(reason)

    async def _time_death(self, watched: Watched, started_s: float) -> None:
        """How long it took from the decision until nothing of the call was left."""
        await watched.jail.gone.wait()
        self._reaction_s = time.monotonic() - started_s

    async def finish(self) -> dict[str, Any]:
        """When nothing of the call runs any more: `usage`, `findings` and `enforcement` for the record."""
        self._guard.unwatch(self)
        if self.units and not self._is_lost:
            with contextlib.suppress(TimeoutError):
                last = await self._guard.apart.do(self._last_look)
                for reading in last.readings:
                    if not reading.trouble:
                        self.account.add(reading, ())
        if self._breach is not None:
            breach = self._breach
            evidence = {**breach.to_json(), "reaction_s": self._reaction_s}
            self._note(rules.gpu_limit(breach.limit, breach.seen, breach.allowed, evidence))
        # Given back before the caller is answered, who may want the same unit for the next call.
        await self.close()
        return {
            "usage": self.account.to_json() if self.units else None,
            "findings": self.findings,
            "enforcement": {limit.control: _row(asdict(limit)) for limit in self._enforced()},
        }

    def _enforced(self) -> list[Limit]:
        """As planned, now that it is known for which units."""
        granted = self.plan.limit("gpu")
        if not self.units or granted is None:
            return []
        return [replace(granted, applied=", ".join(self.units)), *self.limits]

    def _last_look(self) -> Sample:
        return self._guard.sampler.look(self.units, detailed=True, jails={})

    async def close(self) -> None:
        """Put back what was changed and give the units back. Safe to call again."""
        self._guard.unwatch(self)
        if self._is_closed:
            return
        self._is_closed = True
        if self._ended is not None:
            self._ended.cancel()
        try:
            if self._power_before:
                await self._guard.apart.do(self._put_back_power)
        except (NvmlTrouble, TimeoutError) as error:
            # The note in the lease's file stays: whoever leases the unit next puts it back.
            print(f"sandbox: the power limit of a GPU could not be put back: {error}", file=sys.stderr)
            for lease in self._leases:
                lease.abandon()
            return
        for lease in self._leases:
            lease.release()

    def _put_back_power(self) -> None:
        sampler = self._guard.sampler
        for uuid, before_mw in self._power_before.items():
            power.put_back(sampler.nvml(), sampler.handle(uuid), before_mw)


def node_rules(nodes: Iterable[GpuNode]) -> list[Rule]:
    return list(dict.fromkeys(("c", node.major, node.minor, node.accesses) for node in nodes))


def _row(limit: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in limit.items() if key != "control"}
