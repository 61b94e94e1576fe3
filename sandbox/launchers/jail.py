"""The native launcher: hands a plan to the zygote, which builds the jail. Needs nothing but the kernel and Python."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox._linux import cgroup, syscalls, wire
from sandbox.launchers.zygote import Zygote

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

_Launch = Callable[[Mapping[str, object], Mapping[str, int]], None]
_OUT_OF_THE_WAY = Path("/sys/kernel")
DEATH_TIMEOUT_S = 10.0
# What a call's record takes from its group.
_COUNTED = {"pids_current", "memory_peak_bytes", "cpu_usage_s", "cpu_user_s", "cpu_system_s"}
STREAMS = ("stdin", "stdout", "stderr", "result", "request")
# How a parked function is told to take its call: see `_jail.function.USUAL_GO`, which is compared with this.
_USUAL_STREAMS = ("stdin", "stdout", "stderr", "result")
USUAL_GO = json.dumps({"op": "go", "fds": _USUAL_STREAMS, "call": None}, separators=(",", ":")).encode() + b"\n"


def mount_point(state: Path) -> Path:
    """The directory over which each builder mounts, in a mount namespace of its own.

    Below /sys nothing can be granted. Anywhere else a grant of a directory above it would take the half-built view
    along, and an idmapped mount of that is refused (EINVAL).
    """
    if _OUT_OF_THE_WAY.is_dir():
        return _OUT_OF_THE_WAY
    mnt = state / "mnt"
    mnt.mkdir(mode=0o700, parents=True, exist_ok=True)
    return mnt


async def wait_readable(loop: asyncio.AbstractEventLoop, fd: int, timeout_s: float) -> bool:
    """Whether `fd` (a pidfd: its process has ended) became readable in time."""
    # Not asyncio.wait_for, which makes a task of what it waits for.
    answer: asyncio.Future[bool] = loop.create_future()

    def tell(value: bool) -> None:
        if not answer.done():
            answer.set_result(value)

    loop.add_reader(fd, tell, True)
    timer = loop.call_later(timeout_s, tell, False)
    try:
        return await answer
    finally:
        loop.remove_reader(fd)
        timer.cancel()


class Jail:
    """One jail, from its launch to its end. It parks when it is sealed, and `go` makes the tool start in it.

    Owns its status channel, the descriptors that it sends out, and its cgroup. Single use: `go` once, then `close`.
    """

    def __init__(self, name: str, group: cgroup.CallGroup | None, host_uid: int | None) -> None:
        self.name = name
        self.group = group
        self.host_uid = host_uid
        self.fds: dict[str, int] = {}
        self.steps_applied: list[str] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.failure: dict[str, Any] = {}
        # Environment and directory that its template has prepared it for.
        self.usual: tuple[Mapping[str, str], str] | None = None
        # Removes its group once nothing is in it.
        self.bury: Callable[[cgroup.CallGroup], object] = cgroup.CallGroup.destroy
        self.is_killed = False
        # Nothing of a runtime's lies between its first process and us.
        self._is_native = False
        # Its first process is all that is left in it, and waits to be killed.
        self._is_alone = False
        self.is_serving = False
        self.is_reaped = False
        self.is_closed = False
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self.on_end: Callable[[], None] | None = None
        self.on_closed: Callable[[Jail], None] | None = None
        self._settled: list[Callable[[], None]] = []
        # Streams opened ahead of the call, by name: our end and the tool's.
        self._streams: dict[str, tuple[int, int]] = {}
        self._pid = -1
        self._status: socket.socket | None = None
        self._loop = asyncio.get_running_loop()

    def __repr__(self) -> str:
        return f"<Jail {self.name} pid={self._pid} steps={len(self.steps_applied)} gone={self.gone.is_set()}>"

    @property
    def pid(self) -> int:
        """Of its first process; -1 before it is born."""
        if self._pid < 0 and "pidfd" in self.fds:
            self._pid = _pid_of(self.fds["pidfd"])
        return self._pid

    def is_usable(self) -> bool:
        """Whether a call may get it: sealed, or on its way there. Reads what has come and was not read yet: behind
        "sealed" there may be word of its end."""
        while self._status is not None and not self.gone.is_set() and not self.failure:
            try:
                if not self._status.recv(1, socket.MSG_PEEK):
                    return False
            except BlockingIOError:
                return True
            except OSError:
                return False
            self._on_status()
        return False

    def when_settled(self, then: Callable[[], None]) -> None:
        """Call `then` once: when it is sealed or serves, or will never be. Precondition: none of that yet."""
        self._settled.append(then)

    def launch(self, zygote: Zygote, message: Mapping[str, object], plan: bytes, seccomp: bytes) -> None:
        """Have it built and sealed by a builder of its own. Raises OSError when the zygote is gone."""
        self._is_native = True
        data_fds = {"plan": wire.memfd("plan", plan), "seccomp": wire.memfd("seccomp", seccomp)}
        try:
            clone_fd = self.group.fds_for_clone if self.group is not None else None
            self._send(zygote.launch, message, data_fds if clone_fd is None else {**data_fds, "cgroup": clone_fd})
        finally:
            for fd in data_fds.values():
                os.close(fd)

    def launch_with(self, launch: _Launch, message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Have it made by whoever `launch` asks. The descriptors stay the caller's. Raises OSError."""
        self._send(launch, message, fds)

    def launch_from(self, template: Jail, index: int) -> None:
        """Have it forked from a template that serves. Raises OSError when the template is gone."""
        self._is_native = True
        self._send(template.fork, {"op": "fork", "index": index}, {})

    def fork(self, message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """As a template: make a child."""
        if self._status is None:
            raise BrokenPipeError(errno.EPIPE, "the template has ended")
        wire.send(self._status, {**message, "fds": list(fds)}, list(fds.values()))

    def _send(self, launch: _Launch, message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status.setblocking(False)
        ends = dict(fds)
        opened: list[int] = []
        try:
            if self.group is not None:
                for path in self.group.procs_paths(cloned="cgroup" in fds):
                    opened.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
                    ends[f"procs{len(opened) - 1}"] = opened[-1]
            ends["status"] = theirs.fileno()
            self._loop.add_reader(self._status.fileno(), self._on_status)
            launch(message, ends)
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)

    def prepare(self) -> None:
        """Open what its call will need, before that comes: its streams, and word of running out of memory."""
        for name in ("stdout", "stderr", "result"):
            if name not in self._streams:
                self._streams[name] = self._open_pipe(name)
        if self.group is not None:
            self.group.prepare_oom_event()

    def open_output(self, name: str) -> tuple[int, int]:
        """(the end to read, the end to pass to `go`) of one of the tool's streams."""
        return self._streams.pop(name, None) or self._open_pipe(name)

    def _open_pipe(self, name: str) -> tuple[int, int]:
        """Let the tool open its own pipes anew by /dev/stdout and /dev/stderr, as shells do.

        Opening /proc/self/fd/N goes by the pipe's owner and mode (0600). A pipe that is read by its own writer harms
        nobody but him.
        """
        ends = os.pipe2(os.O_CLOEXEC)
        if self.host_uid is not None and name != "result":
            os.fchown(ends[1], self.host_uid, self.host_uid)
        return ends

    def is_usual(self, call: Mapping[str, object]) -> bool:
        """Whether its template has prepared it for this environment and directory: then `go` may take a `request`."""
        return self.usual is not None and self.usual == (call["env"], call["cwd"])

    def go(self, call: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Start the tool: `call` holds argv, env and cwd, `fds` its streams, which stay the caller's to close."""
        assert self._status is not None
        if self.host_uid is not None and "stdin" in fds and stat.S_ISFIFO(os.fstat(fds["stdin"]).st_mode):
            os.fchown(fds["stdin"], self.host_uid, self.host_uid)  # see `_open_pipe`
        if "request" in call:
            # A parked function knows the rest, and takes this very message with next to no work.
            request = call["request"]
            assert isinstance(request, bytes)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                wire.send_encoded(self._status, USUAL_GO + request, [fds[name] for name in _USUAL_STREAMS])
            return
        names = {name: fds[name] for name in STREAMS if name in fds}
        data = json.dumps(call).encode()
        with contextlib.ExitStack() as stack:
            if len(data) > wire.INLINE_MAX_BYTES:
                names["call"] = wire.memfd("call", data)
                stack.callback(os.close, names["call"])
                call = {}
            # Fails when the jail has ended; its end is what the caller will see.
            stack.enter_context(contextlib.suppress(BrokenPipeError, ConnectionResetError))
            wire.send(self._status, {"op": "go", "fds": list(names), "call": call}, list(names.values()))

    def signal(self, number: int) -> None:
        """Have pid 1 send a signal to the tool's process group."""
        if self._status is not None and not self.gone.is_set():
            with contextlib.suppress(OSError):
                wire.send(self._status, {"op": "signal", "number": number})

    def kill(self) -> None:
        """Killing pid 1 ends its whole pid namespace: nothing inside can outlive or ignore it."""
        self.is_killed = True
        if "pidfd" in self.fds:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_kill(self.fds["pidfd"], signal.SIGKILL)
        if self.group is not None:
            self.group.kill(timeout_s=0)

    def end_at_reply(self) -> dict[str, float | int]:
        """End a function that has written its reply: its one process has nothing left to do.

        Its counters when it was the only task inside: then `gone` is set, and it is killed when somebody waits for its
        death, which is after the outcome was told. Empty when there were others, or when nobody counts: then
        `gone` comes when all of it is.
        """
        if self.usual is None or self.group is None or "pidfd" not in self.fds:
            return {}
        # First: a task that is to stop does not get back to its own code, so what is counted now is all, and nobody is
        # there to let it go on. Not SIGKILL yet: taking it apart would compete with us for the core that it woke us on.
        self._signal_first(signal.SIGSTOP)
        return self._end_alone()

    def end_at_exit(self, *, may_be_all: bool) -> dict[str, float | int]:
        """As `end_at_reply`, when pid 1 has waited for the tool: it is ours, does nothing more, and waits for us.

        If this may not be all that is to be known (not `may_be_all`), it is killed at once.
        """
        if not self._is_native:
            return {}
        if may_be_all and self.group is not None:
            return self._end_alone()
        self._signal_first(signal.SIGKILL)
        return {}

    def _end_alone(self) -> dict[str, float | int]:
        """The group's counters if one task is left in it and all is counted: then `gone` is set. Else it is killed."""
        assert self.group is not None
        stats = self.group.stats()
        if stats.get("pids_current", 2) <= 1 and stats.keys() >= _COUNTED:
            self._is_alone = True
            self._end()
            return stats
        self._signal_first(signal.SIGKILL)
        return {}

    def _signal_first(self, number: int) -> None:
        if "pidfd" in self.fds:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_kill(self.fds["pidfd"], number)

    def _on_status(self) -> None:
        assert self._status is not None
        try:
            message, fds = wire.receive(self._status)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, fds = None, []
        if message is None:
            self._loop.remove_reader(self._status.fileno())
            self._end()
            return
        self._note(message, fds)

    def _end(self) -> None:
        if self.gone.is_set():
            return
        self.gone.set()
        self._settle()
        if self.on_end is not None:
            self.on_end()

    def _settle(self) -> None:
        self.ready.set()
        settled, self._settled = self._settled, []
        for then in settled:
            then()

    def _note(self, message: dict[str, Any], fds: list[int]) -> None:
        self.fds.update(zip(message.get("fds", ()), fds, strict=True))
        event = message["ev"]
        if event == "born":
            self._pid = message["pid"]
            self.notes = message["notes"]
        elif event == "sealed":
            self.steps_applied, self.notes = message["steps"], message["notes"]
            self._settle()
        elif event == "serving":
            self.notes = message["notes"]
            self.is_serving = True
            self._settle()
        elif event == "executed":
            self.steps_applied.append("exec")
        elif event == "step_failed":
            self.failure = message
            self._settle()
        elif event == "gone":
            self.is_reaped = True
        if self.is_killed and "pidfd" in message.get("fds", ()):
            self.kill()
        if self.on_event is not None:
            self.on_event(message)
        if event == "gone":
            self._end()

    async def wait_dead(self) -> None:
        """Until every process inside is gone: pid 1 is reaped after all the others (pid_namespaces(7))."""
        if self.is_reaped:
            pass  # pid 1 was waited for, which is after every other process inside
        elif "pidfd" in self.fds:
            if self._is_alone:
                self._signal_first(signal.SIGKILL)
            else:
                self.kill()
            if self._status is not None:
                # What it still has to say is read below: until then it need not wake us.
                self._loop.remove_reader(self._status.fileno())
            await wait_readable(self._loop, self.fds["pidfd"], DEATH_TIMEOUT_S)
        elif self.group is not None:
            self.group.kill()
        if self._status is None:
            return
        self._loop.remove_reader(self._status.fileno())
        # What pid 1 said last may still be queued behind the event that ended the wait.
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while True:
                message, fds = wire.receive(self._status)
                if message is None:
                    break
                self._note(message, fds)
        self._status.close()
        self._status = None

    def close(self) -> None:
        """Give back descriptors and group; what still runs inside is killed."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._status is not None:
            self.kill()
            self._loop.remove_reader(self._status.fileno())
            self._status.close()
            self._status = None
        for fd in (*self.fds.values(), *(end for ends in self._streams.values() for end in ends)):
            os.close(fd)
        self.fds.clear()
        self._streams.clear()
        if self.group is not None:
            self.bury(self.group)
            self.group = None
        self.on_end = None
        self._end()
        if self.on_closed is not None:
            self.on_closed(self)


def _pid_of(pidfd: int) -> int:
    """The pid in our own namespace. Source: pidfd_open(2), /proc/PID/fdinfo."""
    with open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pid:"))
