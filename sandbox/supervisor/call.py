"""One call's lifetime in the supervisor: launch, watch, stop, and know when nothing of it is left.

The order is fixed: cgroup, pipes, launch; then events from the jail's status channel, which only builder and pid 1
hold; then whatever the end was, kill the group, wait for the processes, drain the pipes, read the counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from typing import Any

from sandbox._linux import cgroup, syscalls, wire
from sandbox.launchers.jail import Zygote, status_pair, wait_readable
from sandbox.outcome import Seen
from sandbox.plan import LaunchPlan
from sandbox.supervisor import polling
from sandbox.supervisor.pump import Budget, InputPump, OutputPump

POLL_S = 0.05
DRAIN_TIMEOUT_S = 2.0
DEATH_TIMEOUT_S = 10.0


class Call:
    """A running call. `run` returns what was seen; `stop` ends it with a reason, the first one counts."""

    def __init__(self, call_id: str, plan: LaunchPlan, fds: dict[str, int], group: cgroup.CallGroup | None) -> None:
        self.call_id = call_id
        self.plan = plan
        self.fds = fds
        self.group = group
        self.pid = -1
        self.stopped = ""
        self.exit: dict[str, Any] = {}
        self.failure: dict[str, Any] = {}
        self.exec_errno = 0
        self.steps_applied: list[str] = []
        self.notes: list[str] = []
        self.jail_fds: dict[str, int] = {}
        self.pumps: dict[str, OutputPump] = {}
        self.polled_peak_bytes = 0
        self.polled_cpu_s = 0.0
        self.reaction_s: float | None = None
        self.own_user_namespace = False
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._status: socket.socket | None = None
        self._input: InputPump | None = None
        output = plan.limit("output")
        self._budget = Budget(int(output.applied) if output and output.applied else 1 << 62, self._output_exceeded)

    def __repr__(self) -> str:
        return f"<Call {self.call_id} pid={self.pid} steps={len(self.steps_applied)} stopped={self.stopped or '-'}>"

    def stop(self, reason: str) -> None:
        """End the call now. Killing pid 1 ends its whole pid namespace: nothing inside can outlive or ignore it."""
        if self.stopped or self._gone.is_set():
            return
        self.stopped = reason
        self._kill()

    def _output_exceeded(self) -> None:
        self.stop("output")

    def _kill(self) -> None:
        if "pidfd" in self.jail_fds:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_kill(self.jail_fds["pidfd"], signal.SIGKILL)
        if self.group is not None:
            self.group.kill(timeout_s=0)

    async def run(self, zygote: Zygote, message: dict[str, object], timeout_s: float | None) -> Seen:
        """Launch and see the call through to its end, whatever that is."""
        tasks: list[asyncio.Task[None]] = []
        timer = self._loop.call_later(timeout_s, self.stop, "wall_time") if timeout_s is not None else None
        oom_fd = self._watch_oom()
        try:
            self._launch(zygote, message)
            tasks = [self._loop.create_task(watch) for watch in self._watches()]
            await self._gone.wait()
        finally:
            if timer:
                timer.cancel()
            if oom_fd is not None:
                self._loop.remove_reader(oom_fd)
                os.close(oom_fd)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._until_dead()
        await self._drain()
        return self._seen()

    def _launch(self, zygote: Zygote, message: dict[str, object]) -> None:
        self._status, theirs = status_pair()
        ends: dict[str, int] = {}
        with theirs, contextlib.ExitStack() as stack:
            for name in ("stdout", "stderr", "result"):
                if name == "result" and "request" not in self.fds:
                    continue
                read_end, write_end = os.pipe2(os.O_CLOEXEC)
                stack.callback(os.close, write_end)
                ends[name] = write_end
                self.pumps[name] = OutputPump(self._loop, read_end, self._budget, self.fds.pop(f"{name}_to", -1))
            if not self.plan.tty and "stdin" in self.fds:
                ends["stdin"] = self.fds["stdin"]
            else:
                ends["stdin"] = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, ends["stdin"])
            for name in ("plan", "seccomp", "request"):
                if name in self.fds:
                    ends[name] = self.fds[name]
            ends["status"] = theirs.fileno()
            self._add_cgroup(ends, stack)
            self._loop.add_reader(self._status, self._on_status)
            zygote.launch(message, ends)
        for name in ("plan", "seccomp", "request", *(() if self.plan.tty else ("stdin",))):
            if name in self.fds:
                os.close(self.fds.pop(name))

    def _add_cgroup(self, ends: dict[str, int], stack: contextlib.ExitStack) -> None:
        if self.group is None:
            return
        clone_fd = self.group.fds_for_clone
        if clone_fd is not None:
            ends["cgroup"] = clone_fd
        for index, path in enumerate(self.group.procs_paths(cloned=clone_fd is not None)):
            ends[f"procs{index}"] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, ends[f"procs{index}"])

    def _on_status(self) -> None:
        assert self._status is not None
        try:
            message, fds = wire.receive(self._status)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, fds = None, []
        if message is None:
            self._loop.remove_reader(self._status)
            self._gone.set()
            return
        names = message.get("fds", [])
        assert isinstance(names, list)
        self.jail_fds.update(zip(names, fds, strict=True))
        getattr(self, f"_on_{message['ev']}")(message)

    def _on_born(self, message: dict[str, Any]) -> None:
        self.pid = message["pid"]
        self.notes.extend(message["notes"])
        if self.stopped:
            self._kill()

    def _on_sealed(self, message: dict[str, Any]) -> None:
        self.steps_applied = message["steps"]
        self.notes = message["notes"]

    def _on_terminal(self, _message: dict[str, Any]) -> None:
        master = self.jail_fds.pop("terminal")
        os.set_blocking(master, False)
        # The pump owns the master; what it read from the pipe of an ordinary call stands for the terminal's output.
        self.jail_fds["master"] = os.dup(master)
        forward = self.fds.pop("terminal_to", -1)
        self.pumps["terminal"] = OutputPump(self._loop, master, self._budget, forward)
        if "stdin" in self.fds:
            self._input = InputPump(self._loop, self.fds.pop("stdin"), self.jail_fds["master"])

    def _on_step_failed(self, message: dict[str, Any]) -> None:
        self.failure = message

    def _on_exec_failed(self, message: dict[str, Any]) -> None:
        self.exec_errno = message["errno"]

    def _on_executed(self, _message: dict[str, Any]) -> None:
        self.steps_applied.append("exec")

    def _on_exit(self, message: dict[str, Any]) -> None:
        self.exit = message

    def _on_gone(self, _message: dict[str, Any]) -> None:
        self._gone.set()

    def signal(self, number: int) -> None:
        """Pass a signal of the caller's on to the tool's process group, through pid 1."""
        if self._status is not None and not self._gone.is_set():
            with contextlib.suppress(OSError):
                wire.send(self._status, {"op": "signal", "number": number})

    def resize(self, rows: int, columns: int) -> None:
        """The caller's terminal has changed its size."""
        if "master" in self.jail_fds:
            size = struct.pack("HHHH", rows, columns, 0, 0)
            fcntl.ioctl(self.jail_fds["master"], termios.TIOCSWINSZ, size)

    def _watch_oom(self) -> int | None:
        """With v1 the kernel kills one process only; the rest of the call ends here."""
        fd = self.group.open_oom_event() if self.group is not None else None
        if fd is not None:
            self._loop.add_reader(fd, self._on_oom, fd)
        return fd

    def _on_oom(self, fd: int) -> None:
        os.read(fd, 8)
        # The event is also raised when the group is removed; only a kill that happened is an out-of-memory end.
        if self.group is not None and self.group.stats().get("oom_kills", 0):
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
            if self.pid < 0:
                continue
            pids = polling.descendants(self.pid)
            files = polling.used_bytes(self.jail_fds["scratch"])[0] if "scratch" in self.jail_fds else 0
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
        if self.group is not None:
            stats = self.group.stats()
            if "cpu_usage_s" in stats:
                return float(stats["cpu_usage_s"])
        return polling.cpu_time_s(polling.descendants(self.pid)) if self.pid > 0 else 0.0

    async def _until_dead(self) -> None:
        """Everything inside is dead when pid 1 has been reaped; the group is killed again in case it never was."""
        started = time.monotonic()
        if "pidfd" in self.jail_fds:
            self._kill()
            await wait_readable(self._loop, self.jail_fds["pidfd"], DEATH_TIMEOUT_S)
        elif self.group is not None:
            self.group.kill()
        if self.stopped:
            self.reaction_s = time.monotonic() - started
        if self._status is not None:
            self._loop.remove_reader(self._status)
            # What pid 1 said last may still be queued behind the event that ended the wait.
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                while not self._drain_status():
                    pass
            self._status.close()

    def _drain_status(self) -> bool:
        assert self._status is not None
        message, fds = wire.receive(self._status)
        for fd in fds:
            os.close(fd)
        if message is None:
            return True
        if message["ev"] in ("sealed", "executed", "exit", "exec_failed", "step_failed"):
            getattr(self, f"_on_{message['ev']}")(message)
        return False

    async def _drain(self) -> None:
        """Read the pipes to their end. All writers are dead, so it is there unless the caller does not read."""
        for pump in self.pumps.values():
            timeout_s = None if pump.forwards and not self.stopped else DRAIN_TIMEOUT_S
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pump.done.wait(), timeout_s)
            pump.abandon()
        if self._input is not None:
            self._input.close()

    def _seen(self) -> Seen:
        stats = self.stats()
        return Seen(
            exit_status=self.exit.get("wait_status"),
            stopped=self.stopped,
            step_failed=self.failure.get("step", ""),
            step_errno=self.failure.get("errno", 0),
            step_message=self.failure.get("message", ""),
            exec_errno=self.exec_errno,
            oom_kills=int(stats.get("oom_kills", 0)),
        )

    def stats(self) -> dict[str, float | int]:
        """Counters of the kernel where there are any, else what was polled and what pid 1's children used."""
        found: dict[str, float | int] = dict(self.group.stats()) if self.group is not None else {}
        if self.exit:
            found.setdefault("cpu_user_s", self.exit["user_s"])
            found.setdefault("cpu_system_s", self.exit["system_s"])
            peak = max(self.polled_peak_bytes, self.exit["maxrss_bytes"])
            found.setdefault("memory_peak_bytes", peak)
        elif self.polled_peak_bytes:
            found.setdefault("memory_peak_bytes", self.polled_peak_bytes)
            found.setdefault("cpu_usage_s", self.polled_cpu_s)
        if "scratch" in self.jail_fds:
            used, inodes = polling.used_bytes(self.jail_fds["scratch"])
            found["disk_used_bytes"] = used
            found["inodes_used"] = inodes
        return found

    def close(self) -> None:
        """Give back every descriptor and the group. Tolerates what is already gone."""
        for fd in (*self.fds.values(), *self.jail_fds.values()):
            with contextlib.suppress(OSError):
                os.close(fd)
        self.fds.clear()
        self.jail_fds.clear()
        if self.group is not None:
            self.group.destroy()
