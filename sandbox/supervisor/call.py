"""One call in a jail: its streams, its timers, what ends it, and what was seen of its end.

The jail is sealed and parked before a call gets it. Then the order is fixed: streams, go; events from the jail's status
channel, which only builder and pid 1 hold; then whatever the end was, kill everything, wait for the processes, drain
the pipes, read the counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct
import termios
import time
from collections.abc import Callable

from sandbox._linux import wire
from sandbox.ending import Seen
from sandbox.launchers.contract import Container
from sandbox.launchers.jail import Jail
from sandbox.plan import LaunchPlan
from sandbox.supervisor import polling
from sandbox.supervisor.pump import Budget, InputPump, OutputPump

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from sandbox.supervisor.egress import CallEgress
    from sandbox.supervisor.gpu_call import CallGpu

POLL_S = 0.05
DRAIN_TIMEOUT_S = 2.0
START_TIMEOUT_S = 120.0
_REPLY_MAGIC = b"TCR1"


class Call:
    """A running call. `run` returns what was seen; `stop` ends it with a reason, the first one counts."""

    def __init__(self, call_id: str, plan: LaunchPlan, fds: dict[str, int], jail: Container) -> None:
        self.call_id = call_id
        self.plan = plan
        self.fds = fds
        self.jail = jail
        # What a function call runs, unless it is so large that it came as a file.
        self.request: bytes | None = None
        self.stopped = ""
        self.exit: dict[str, Any] = {}
        self.exec_errno = 0
        self.exec_directory = ""
        # A function's ending as its reply says it.
        self.reply_status: int | None = None
        # Whether the jail was still dying when the end was told.
        self.is_dying = False
        self.pumps: dict[str, OutputPump] = {}
        self.final_stats: dict[str, float | int] = {}
        self.polled_peak_bytes = 0
        self.polled_cpu_s = 0.0
        self.reaction_s: float | None = None
        self.egress: CallEgress | None = None
        self.gpu: CallGpu | None = None
        # Makes another jail, should the one that the call was given end before the call starts in it.
        self.another: Callable[[], Container] | None = None
        self._loop = asyncio.get_running_loop()
        self._input: InputPump | None = None
        output = plan.limit("output")
        self._budget = Budget(int(output.applied) if output and output.applied else 1 << 62, self._output_exceeded)

    def __repr__(self) -> str:
        return f"<Call {self.call_id} jail={self.jail.name} stopped={self.stopped or '-'}>"

    def stop(self, reason: str) -> None:
        """End the call now."""
        if self.stopped or self.jail.gone.is_set():
            return
        self.stopped = reason
        self.jail.kill()

    def _output_exceeded(self) -> None:
        self.stop("output")

    async def run(self, timeout_s: float | None) -> Seen:
        """Start the tool in the jail and see the call through to its end, whatever that is."""
        tasks: list[asyncio.Task[None]] = []
        timer: asyncio.TimerHandle | None = None
        oom_fd: int | None = None
        try:
            await self._until_ready()
            oom_fd = self._watch_oom()
            if not self.stopped and not self.jail.failure and not self.jail.gone.is_set():
                if timeout_s is not None:
                    timer = self._loop.call_later(timeout_s, self.stop, "wall_time")
                self._go()
                tasks = [self._loop.create_task(watch) for watch in self._watches()]
            await self.jail.gone.wait()
        finally:
            if timer:
                timer.cancel()
            if oom_fd is not None:
                self._loop.remove_reader(oom_fd)
                os.close(oom_fd)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.gather(*tasks, return_exceptions=True)
        started = time.monotonic()
        if not self.is_dying:
            await self.jail.wait_dead()
        if self.stopped:
            self.reaction_s = time.monotonic() - started
        if self.egress is not None:
            self.egress.begin_finish(drain=not self.stopped)
        await self._drain()
        return self._seen()

    async def _until_ready(self) -> None:
        await self._until_settled()
        if self.jail.is_usable() or self.stopped or self.another is None:
            return
        # A standby that was killed, or a template that died while it made this one: nothing of the call was in it.
        self.jail.close()
        self.exit = {}
        self.jail = self.another()
        await self._until_settled()

    async def _until_settled(self) -> None:
        self.jail.on_event = self._on_event
        if self.jail.ready.is_set():
            return
        # Not asyncio.wait_for, which makes a task of what it waits for.
        settled: asyncio.Future[bool] = self._loop.create_future()

        def settle(in_time: bool) -> None:
            if not settled.done():
                settled.set_result(in_time)

        self.jail.when_settled(lambda: settle(True))
        timer = self._loop.call_later(START_TIMEOUT_S, settle, False)
        try:
            in_time = await settled
        finally:
            timer.cancel()
        if not in_time:
            self.jail.failure = {"step": "launch", "errno": 110, "message": f"not ready after {START_TIMEOUT_S:.0f} s"}
            self.jail.kill()

    def _go(self) -> None:
        """Make the pipes, hand their far ends over, keep ours."""
        if self.egress is not None:
            self.egress.attach(self.jail.fds, self.fds)
        plan = self.plan
        reads: dict[str, int] = {}
        ends: dict[str, int] = {}
        try:
            self._open_streams(reads, ends)
            call: dict[str, Any] = {"argv": plan.argv, "env": plan.env, "cwd": plan.cwd}
            if self.request is not None and isinstance(self.jail, Jail) and self.jail.is_usual(call):
                call["request"] = self.request
            elif self.request is not None:
                ends["request"] = wire.read_only(wire.memfd("request", self.request))
            self.jail.go(call, ends)
        finally:
            for fd in ends.values():
                os.close(fd)
            # Watched from now on: before the tool was told to go there was nothing to read.
            for name, fd in reads.items():
                self.pumps[name] = OutputPump(self._loop, fd, self._budget, self.fds.pop(f"{name}_to", -1))
        if "result" in self.pumps and not plan.gpu and plan.egress is None:
            self.pumps["result"].on_done = self._on_reply
            self.pumps["result"].is_whole = reply_is_whole
        if plan.tty and "terminal" in self.jail.fds:
            self._carry_terminal()

    def _open_streams(self, reads: dict[str, int], ends: dict[str, int]) -> None:
        """Fill in the ends that we read, by stream, and those that go to the tool."""
        has_terminal = self.plan.tty
        is_function = self.request is not None or "request" in self.fds
        for name in (*(() if has_terminal else ("stdout", "stderr")), *(("result",) if is_function else ())):
            reads[name], far_end = self.jail.open_output(name)
            if far_end >= 0:
                ends[name] = far_end
        for name in ("request",) if has_terminal else ("request", "stdin"):
            if name in self.fds:
                ends[name] = self.fds.pop(name)
        if not has_terminal and "stdin" not in ends:
            ends["stdin"] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

    def _on_reply(self) -> None:
        """The function has written its reply: that is its end, and there is nothing to wait for."""
        status = reply_status(self.pumps["result"].kept)
        if status is None or not isinstance(self.jail, Jail) or not self._may_end_at_once():
            return
        # First: where others are inside, the kill is all that the kernel will say of its end.
        self.reply_status = status
        self.final_stats = self.jail.end_at_reply()
        self.is_dying = bool(self.final_stats)

    def _on_exit(self, message: dict[str, Any]) -> None:
        """pid 1 has waited for the tool: nothing but pid 1 itself has to be left."""
        self.exit = message
        if isinstance(self.jail, Jail) and not self.jail.gone.is_set():
            self.final_stats = self.jail.end_at_exit(may_be_all=self._may_end_at_once())
            self.is_dying = bool(self.final_stats)

    def _may_end_at_once(self) -> bool:
        is_over = bool(self.stopped) or self.jail.gone.is_set()
        # A gateway and a GPU have to be asked what they saw first.
        return not is_over and not self.plan.gpu and self.plan.egress is None

    def _carry_terminal(self) -> None:
        master = self.jail.fds.pop("terminal")
        os.set_blocking(master, False)
        # The pump owns the master; input and size go through a copy.
        self.jail.fds["master"] = os.dup(master)
        self.pumps["terminal"] = OutputPump(self._loop, master, self._budget, self.fds.pop("terminal_to", -1))
        if "stdin" in self.fds:
            self._input = InputPump(self._loop, self.fds.pop("stdin"), self.jail.fds["master"])

    def _on_event(self, message: dict[str, Any]) -> None:
        if message["ev"] == "executed" and "started" in self.fds:
            os.close(self.fds.pop("started"))
        elif message["ev"] == "exec_failed":
            self.exec_errno = message["errno"]
            self.exec_directory = message.get("directory", "")
        elif message["ev"] == "exit":
            self._on_exit(message)
        elif message["ev"] == "gone" and "user_s" in message:
            self.exit = message

    def signal(self, number: int) -> None:
        """Pass a signal of the caller's on to the tool's process group."""
        self.jail.signal(number)

    def resize(self, rows: int, columns: int) -> None:
        """The caller's terminal has changed its size."""
        if "master" in self.jail.fds:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self.jail.fds["master"], termios.TIOCSWINSZ, size)

    def _watch_oom(self) -> int | None:
        """With v1 the kernel kills one process only; the rest of the call ends here."""
        fd = self.jail.group.open_oom_event() if self.jail.group is not None else None
        if fd is not None:
            self._loop.add_reader(fd, self._on_oom, fd)
        return fd

    def _on_oom(self, fd: int) -> None:
        os.read(fd, 8)
        # The event is also raised when the group is removed; only a kill that happened is an out-of-memory end.
        if self.jail.group is not None and self.jail.group.stats().get("oom_kills", 0):
            self.stop("memory")

    def _watches(self) -> list[Any]:
        watches: list[Any] = []
        memory = self.plan.limit("memory")
        if memory is not None and memory.strength == "polled":
            watches.append(self._poll_memory(int(memory.requested or 0)))
        cpu_time = self.plan.limit("cpu_time")
        if cpu_time is not None and cpu_time.level != "none":
            watches.append(self._poll_cpu_time(float(cpu_time.requested or 0)))
        return watches

    async def _poll_memory(self, limit_bytes: int) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if self.jail.pid < 0:
                continue
            pids = polling.descendants(self.jail.pid)
            files = polling.used_bytes(self.jail.fds["scratch"])[0] if "scratch" in self.jail.fds else 0
            used = polling.resident_bytes(pids) + files
            if used > limit_bytes:
                used = polling.proportional_bytes(pids) + files
            self.polled_peak_bytes = max(self.polled_peak_bytes, used)
            self.polled_cpu_s = max(self.polled_cpu_s, polling.cpu_time_s(pids))
            if used > limit_bytes:
                self.stop("memory")
                return

    async def _poll_cpu_time(self, limit_s: float) -> None:
        cores = os.cpu_count() or 1
        while True:
            used = self._cpu_time_s()
            if used >= limit_s:
                self.stop("cpu_time")
                return
            # All cores at full load reach the limit no sooner than this.
            await asyncio.sleep(max(0.01, (limit_s - used) / cores))

    def _cpu_time_s(self) -> float:
        if self.jail.group is not None:
            stats = self.jail.group.stats()
            if "cpu_usage_s" in stats:
                return float(stats["cpu_usage_s"])
        return polling.cpu_time_s(polling.descendants(self.jail.pid)) if self.jail.pid > 0 else 0.0

    async def _drain(self) -> None:
        """Read the pipes to their end. All writers are dead, so it is there unless the caller does not read."""
        for pump in self.pumps.values():
            if pump.drain():
                continue
            if self.is_dying and not pump.forwards:
                pump.abandon()
                continue
            timeout_s = None if pump.forwards and not self.stopped else DRAIN_TIMEOUT_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pump.done.wait(), timeout_s)
            pump.abandon()
        if self._input is not None:
            self._input.close()

    def _seen(self) -> Seen:
        stats = self.final_stats = self.stats()
        return Seen(
            exit_status=self.exit.get("wait_status") if self.reply_status is None else self.reply_status,
            stopped=self.stopped,
            step_failed=self.jail.failure.get("step", ""),
            step_errno=self.jail.failure.get("errno", 0),
            step_message=self.jail.failure.get("message", ""),
            is_bug=bool(self.jail.failure.get("bug")),
            exec_errno=self.exec_errno,
            exec_directory=self.exec_directory,
            oom_kills=int(stats.get("oom_kills", 0)),
        )

    def stats(self) -> dict[str, float | int]:
        """Counters of the kernel where there are any, else what was polled and what pid 1's children used."""
        found: dict[str, float | int] = dict(self.final_stats)
        if not found and self.jail.group is not None:
            found.update(self.jail.group.stats())
        if self.exit:
            found.setdefault("cpu_user_s", self.exit["user_s"])
            found.setdefault("cpu_system_s", self.exit["system_s"])
            peak = max(self.polled_peak_bytes, self.exit["maxrss_bytes"])
            found.setdefault("memory_peak_bytes", peak)
            # pid 1 has only waited for some of them; what still ran at the end was seen by polling, if at all.
            found.setdefault("cpu_usage_s", max(self.polled_cpu_s, self.exit["user_s"] + self.exit["system_s"]))
        elif self.polled_peak_bytes:
            found.setdefault("memory_peak_bytes", self.polled_peak_bytes)
            found.setdefault("cpu_usage_s", self.polled_cpu_s)
        if "scratch" in self.jail.fds:
            used, inodes = polling.used_bytes(self.jail.fds["scratch"])
            found["disk_used_bytes"] = used
            found["inodes_used"] = inodes
        return found

    def close(self) -> None:
        """Give back every descriptor of ours; the jail goes back to where it came from."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


def reply_status(reply: bytes | bytearray) -> int | None:
    """The wait status of a function that has written this reply; None when it is no whole reply. See `_jail.runner`."""
    if len(reply) < len(_REPLY_MAGIC) + 4 or not reply.startswith(_REPLY_MAGIC):
        return None
    return 1 << 8 if reply.startswith(b'{"error":', len(_REPLY_MAGIC) + 4) else 0


def reply_is_whole(reply: bytes | bytearray) -> bool:
    """Whether this is all of a reply without buffers, which most are. Others end with the file. See `_jail.encode`."""
    if reply_status(reply) is None or not reply.startswith((b'{"json":', b'{"error":'), len(_REPLY_MAGIC) + 4):
        return False
    size = int.from_bytes(reply[len(_REPLY_MAGIC) : len(_REPLY_MAGIC) + 4], "little")
    return len(reply) == len(_REPLY_MAGIC) + 4 + size
