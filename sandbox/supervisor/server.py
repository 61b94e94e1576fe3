"""The supervisor's loop: takes calls from its one caller, runs them, keeps the chain, and ends with the caller.

Every call has a reply channel of its own, made by the caller: events and the outcome go out on it, signals come in,
and its end of file means that whoever waited is gone, so the call is ended. End of file on the control channel means
that the caller itself is gone; then every call is ended and every record finished before we go.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import json
import os
import resource
import socket
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from sandbox import __version__, host
from sandbox._linux import bare, cgroup, wire
from sandbox.audit import record as audit_record
from sandbox.audit.chain import Chain
from sandbox.audit.store import Store, has_open_chains
from sandbox.ending import Ending, classify
from sandbox.errors import AuditError, CallLost, SandboxError
from sandbox.launchers.zygote import Zygote
from sandbox.plan import LaunchPlan
from sandbox.supervisor import finish
from sandbox.supervisor.call import Call
from sandbox.supervisor.gpu import Gpus
from sandbox.supervisor.launching import Launchers
from sandbox.supervisor.pool import is_poolable
from sandbox.supervisor.work import Work

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from sandbox.launchers.contract import Container
    from sandbox.supervisor.egress import CallEgress, Egress
    from sandbox.supervisor.gpu_call import CallGpu
    from sandbox.supervisor.pool import Pool

STOP_TIMEOUT_S = 20.0
# A running call holds up to this many descriptors here; standbys, templates and our own files have theirs apart.
CALL_FDS = 16
OWN_FDS = 512
RUNNING_MAX = 1024
# Jails in the making, for each core. More of them at once take longer for every one, and a template's channel holds a
# few dozen requests: what finds it full would take the template for dead.
MAKING_PER_CORE = 4
COMMONS_MAX = 256


class Supervisor:
    """Owns the pool of jails, the cgroups, the chain and the table of running calls."""

    def __init__(self, control: socket.socket, state: Path, zygote: Zygote, facts: host.HostFacts) -> None:
        self.state = state
        self.facts = facts
        self._zygote = zygote
        self._control = control
        self._name = cgroup.owner_name(os.getpid())
        self._serial = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: dict[str, Call] = {}
        # Plans and policies by the caller's names for them; it bounds how many there are.
        self._known: dict[tuple[str, str], Any] = {}
        self._commons: dict[tuple[Any, ...], audit_record.Common] = {}
        # The plan of each kind's last call, with what is that call's own.
        self._last_plans: dict[str, LaunchPlan] = {}
        # First come, first served: what exceeds it waits, with its record opened, and its wall time not begun.
        self._slots = asyncio.Semaphore(running_max(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        self._making = asyncio.Semaphore(MAKING_PER_CORE * (os.cpu_count() or 1))
        self._closing = asyncio.Event()
        self._tree: cgroup.Tree | None = None
        self._launchers: Launchers
        self._gpus: Gpus
        self._egress: Egress | None = None
        self.chain: Chain = Store(state).open_chain("supervisor")
        self.host = {
            "id": os.uname().nodename,
            "kernel": os.uname().release,
            "boot_id": Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
            "node": None,
        }

    def __repr__(self) -> str:
        return f"<Supervisor pid={os.getpid()} calls={len(self._calls)} chain={self.chain.seq}>"

    def prepare(self) -> None:
        """Bring up what calls need."""
        layout = cgroup.detect()
        cgroup.reap(layout=layout)
        tree = None
        try:
            tree = cgroup.Tree.open(self._name, layout)
        except OSError as error:
            # Nothing is weakened by this: the facts are corrected, and the plan goes by the facts.
            reasons = dict.fromkeys(self.facts.cgroups, f"its group cannot be made: {error}")
            self.facts = self.facts.with_cgroups({}, reasons)
        if tree is not None:
            where = {name: tree.where(name) for name in self.facts.cgroups}
            self.facts = self.facts.with_cgroups(where, tree.refused)
            self._tree = tree if tree.has_groups else None
        self._gpus = Gpus(self.facts, self._tree)
        self.facts = self._gpus.complete(self.facts)
        self._launchers = Launchers(
            self.state, self._tree, tuple(self.facts.block_devices.values()), self._name, self._zygote
        )
        if has_open_chains(self.state):
            self._recover()

    def _recover(self) -> None:
        # Loaded only here: most starts find nothing that was left open.
        from sandbox.audit.recover import recover

        for recovered in recover(self.state):
            if recovered.error:
                print(f"sandbox: chain {recovered.chain_id}: {recovered.error}", file=sys.stderr)

    async def serve(self) -> None:
        """Until the caller is gone."""
        loop = asyncio.get_running_loop()
        self._control.setblocking(False)
        facts = wire.memfd("facts", json.dumps(self.facts.to_json()).encode())
        hello: dict[str, object] = {"ev": "hello", "pid": os.getpid(), "zygote_pid": self._launchers.zygote_pid}
        try:
            wire.send(self._control, hello, [facts])
        except (BrokenPipeError, ConnectionResetError):
            self._closing.set()  # the caller went away while we started
        finally:
            os.close(facts)
        # By number: for a socket asyncio makes the text of an error that nobody sees, with four system calls.
        loop.add_reader(self._control.fileno(), self._on_control)
        await self._closing.wait()
        loop.remove_reader(self._control.fileno())
        await self._stop_all()

    async def _stop_all(self) -> None:
        for call in self._calls.values():
            call.stop("caller")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_TIMEOUT_S)
        if self._egress is not None:
            self._egress.close()
        self._gpus.close()
        self._launchers.close()
        if self._tree is not None:
            self._tree.close()
        self.chain.close()

    def _on_control(self) -> None:
        # One message at a time: if there are more, the loop comes back.
        try:
            message, parts, fds = wire.receive_with_parts(self._control)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, parts, fds = None, {}, []
        if message is None:
            self._closing.set()
            return
        names = message["fds"]
        assert isinstance(names, list)
        task = asyncio.get_running_loop().create_task(self._serve_call(parts, dict(zip(names, fds, strict=True))))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve_call(self, parts: dict[str, bytes], fds: dict[str, int]) -> None:
        reply = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, fds.pop("reply"))
        reply.setblocking(False)
        try:
            ask = bare.loads(parts["ask"])
            ask["request"] = parts.get("request")
            try:
                await self._run_call(reply, self._completed(ask), fds)
            except SandboxError as error:
                _answer_error(reply, error)
        finally:
            for fd in fds.values():
                with contextlib.suppress(OSError):
                    os.close(fd)
            reply.close()

    def _completed(self, ask: dict[str, Any]) -> dict[str, Any]:
        """The ask with what the caller sent once and since then only names."""
        for name in ("policy", "plan"):
            key = ask.get(f"{name}_id")
            if key is None:
                continue
            if name in ask:
                self._known[name, key] = LaunchPlan.from_json(ask[name]) if name == "plan" else ask[name]
            elif (name, key) not in self._known:
                raise CallLost("the supervisor that knew this kind of call died before it could be handed over")
            ask[name] = self._known[name, key]
        return ask

    async def _open_record(self, ask: dict[str, Any], call_id: str) -> dict[str, Any]:
        key = (ask.get("policy_id"), ask.get("plan_id"), *ask["principal"].values())
        opening = audit_record.Opening(
            common=self._commons.get(key),
            record_id=audit_record.new_record_id(),
            call_id=call_id,
            time_start=audit_record.rfc3339(time.time_ns()),
            call=ask["call"],
            policy=ask["policy"],
            plan={name: ask[name] for name in ("argv", "env", "cwd")} if "plan" in ask else None,
            host=self.host,
            principal=ask["principal"],
            producer_version=__version__,
        )
        if opening.common is None:
            opening = replace(opening, common=self._common(key, ask, opening))
        opened = audit_record.opened_record(opening)
        self.chain.append_opened(opened, durability="flush")
        if ask["durability"] == "fsync":
            # Several calls at once share one wait for the disk.
            await asyncio.to_thread(self.chain.sync)
        return opened

    def _common(self, key: tuple[Any, ...], ask: dict[str, Any], opening: audit_record.Opening) -> audit_record.Common:
        """What its record shares with others: calls of one kind differ in few of their record's groups."""
        if len(self._commons) >= COMMONS_MAX:
            self._commons.clear()
        plan: LaunchPlan | None = ask.get("plan")
        made = audit_record.common(replace(opening, plan=_plan_data(plan) if plan else None))
        self._commons[key] = made
        return made

    async def _run_call(self, reply: socket.socket, ask: dict[str, Any], fds: dict[str, int]) -> None:
        started = time.monotonic()
        call_id = f"{self._name}-{next(self._serial)}"
        opened = await self._open_record(ask, call_id)
        if "refused" in ask:
            ending = Ending("refused", ask["refused"]["fault"], message=ask["refused"]["message"])
            closing = finish.closing(ending, started)
            await finish.close_and_answer(self.chain, reply, opened, closing, ask["durability"])
            return
        async with self._slots:
            await self._run_opened(reply, ask, fds, _Opened(call_id, started, opened))

    async def _run_opened(
        self, reply: socket.socket, ask: dict[str, Any], fds: dict[str, int], call_of: _Opened
    ) -> None:
        call_id, started, opened = call_of.call_id, call_of.started, call_of.record
        plan = self._plan_of(ask)
        work = Work(ask, plan, self.state, opened["record_id"])
        call: Call | None = None
        gpu: CallGpu | None = None
        pool: Pool | None = None
        kind = ""
        try:
            plan = await asyncio.to_thread(work.before) if work.mode in ("rw", "cow") else plan
            gpu = await self._gpus.open_call(call_id, plan)
            plan = gpu.plan if gpu is not None else plan
            kind = ask["plan_id"]
            if plan.egress is not None:
                plan, kind = await self._gateways().with_authority(plan, kind)
            pool = await self._launchers.pool(plan.launcher)
            jail = await self._take(pool, plan, kind)
            owned = dict(fds)
            fds.clear()
            call = self._calls[call_id] = Call(call_id, plan, owned, jail)
            call.request = ask["request"]
            if is_poolable(plan):
                call.another = functools.partial(self._gpus.admitted, functools.partial(pool.make, plan))
            if plan.egress is not None:
                call.egress = self._call_egress(call, plan.egress)
            self._gpus.admit(jail.group, gpu)
            if gpu is not None:
                call.gpu = gpu
                await gpu.start(call)
            ending = await self._run_launched(call, reply, plan)
        except (OSError, SandboxError) as error:
            ending = Ending("launch_error", "host", error_type=type(error).__name__, message=str(error))
        try:
            own = pool is not None and pool.launcher.own_user_namespace
            closing = await finish.gather(ending, started, call, work, own_user_namespace=own)
            await finish.close_and_answer(self.chain, reply, opened, closing, ask["durability"])
        finally:
            if pool is not None:
                pool.answered(kind)
            self._calls.pop(call_id, None)
            work.close()
            if gpu is not None:
                await gpu.close()
            if call is not None:
                call.close()
                if call.is_dying:
                    await call.jail.wait_dead()
                call.jail.close()

    def _plan_of(self, ask: dict[str, Any]) -> LaunchPlan:
        """The plan of its kind with what is this call's own, which for a function is mostly what it was last time."""
        plan, own = self._last_plans.get(ask["plan_id"]), (tuple(ask["argv"]), ask["env"], ask["cwd"])
        if plan is None or (plan.argv, plan.env, plan.cwd) != own:
            plan = replace(ask["plan"], argv=own[0], env=own[1], cwd=own[2])
            self._last_plans[ask["plan_id"]] = plan
        return plan

    def _gateways(self) -> Egress:
        # What speaks to them is loaded for calls with an allowlist alone.
        if self._egress is None:
            from sandbox.supervisor.egress import Egress

            self._egress = Egress()
        return self._egress

    def _call_egress(self, call: Call, policy: Mapping[str, Any]) -> CallEgress:
        from sandbox.supervisor.egress import CallEgress

        return CallEgress(call.call_id, policy, self._gateways(), call.stop)

    async def _take(self, pool: Pool, plan: LaunchPlan, kind: str) -> Container:
        """A container for a call, when it is its turn: in the order in which they were asked for."""
        await self._making.acquire()
        try:
            jail = pool.take(plan, kind)
        except BaseException:
            self._making.release()
            raise
        if jail.ready.is_set():
            self._making.release()
        else:
            jail.when_settled(self._making.release)
        return jail

    async def _run_launched(self, call: Call, reply: socket.socket, plan: LaunchPlan) -> Ending:
        loop = asyncio.get_running_loop()
        loop.add_reader(reply.fileno(), self._on_reply, reply, call)
        wall_time = plan.limit("wall_time")
        timeout_s = float(wall_time.applied) if wall_time and wall_time.applied else None
        try:
            seen = await call.run(timeout_s)
        finally:
            loop.remove_reader(reply.fileno())
        return classify(seen)

    def _on_reply(self, reply: socket.socket, call: Call) -> None:
        try:
            message, _ = wire.receive(reply)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message = None
        if message is None:
            asyncio.get_running_loop().remove_reader(reply.fileno())
            call.stop("caller")
        elif message["op"] == "signal":
            call.signal(int(str(message["number"])))
        elif message["op"] == "resize":
            call.resize(int(str(message["rows"])), int(str(message["columns"])))


class _Opened:
    """A call whose record is opened."""

    __slots__ = ("call_id", "record", "started")

    def __init__(self, call_id: str, started: float, record: dict[str, Any]) -> None:
        self.call_id = call_id
        self.started = started
        self.record = record


def running_max(open_files: int) -> int:
    """How many calls may run at once with so many descriptors. Never none: then the kernel's own refusal says why."""
    return max(8, min(RUNNING_MAX, (open_files - OWN_FDS) // CALL_FDS))


def _plan_data(plan: LaunchPlan) -> dict[str, Any]:
    """Of the plan, what the record needs."""
    return {
        "launcher": plan.launcher,
        "steps": [{"name": step.name} for step in plan.steps],
        "limits": [asdict(limit) for limit in plan.limits],
        "isolation": plan.isolation,
        "seccomp": plan.seccomp,
        "notes": plan.notes,
    }


def _answer_error(reply: socket.socket, error: SandboxError) -> None:
    """Our own failure, before or instead of a record: the caller raises it."""
    message: dict[str, object] = {
        "ev": "error",
        "type": "AuditError" if isinstance(error, AuditError) else type(error).__name__,
        "message": error.message[:8000],
        "hint": error.hint[:8000],
    }
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(reply, message)
