"""One container of the launcher `docker`, from its making to its end, in the supervisor's loop.

The daemon is no part of the call: streams are pipes between the tool and us, and killing goes by a descriptor of the
container's first process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sandbox._linux import syscalls, wire
from sandbox.errors import LaunchError
from sandbox.launchers import docker_config as config
from sandbox.launchers.docker_engine import Ended, Engine
from sandbox.launchers.docker_making import Making
from sandbox.launchers.feed import Feed
from sandbox.launchers.gate import call_script, pipe_inside
from sandbox.launchers.group import ContainerGroup
from sandbox.launchers.keeper import Keeper

SAMPLE_S: Final = 0.1
_NO_SHELL: Final = "the image may lack /bin/sh, which waits for the call"


@dataclass(frozen=True)
class Crew:
    """Who works for the containers of one supervisor. `thread` has blocking work done, and keeps order in nothing."""

    keeper: Keeper
    thread: Callable[[Callable[[], Any]], Future[Any]]


class DockerContainer:
    """One container, as `sandbox.launchers.contract.Container` has it. Lives on the supervisor's loop."""

    def __init__(self, crew: Crew, making: Making) -> None:
        self.name = making.name
        self.fds = making.fds
        self.steps_applied: list[str] = []
        # What its making has to say is told here while it goes on.
        self.notes = making.notes
        self.details = making.details
        self.failure: dict[str, Any] = {}
        self.is_killed = False
        self.is_closed = False
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self._crew = crew
        self._making = making
        self._made: Future[Any] | None = None
        self._status: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled: list[Callable[[], None]] = []
        self._feeds: list[Feed] = []
        self._is_opened = False
        self._signals: list[int] = []
        self._terminal = ""

    def __repr__(self) -> str:
        return f"<DockerContainer {self._making} gone={self.gone.is_set()}>"

    @property
    def pid(self) -> int:
        return self._making.pid

    @property
    def group(self) -> ContainerGroup:
        return self._making.group

    def is_usable(self) -> bool:
        return not (self.failure or self.gone.is_set() or self.is_closed)

    def when_settled(self, then: Callable[[], None]) -> None:
        self._settled.append(then)

    # -- how it is made -----------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Have it made; `ready` is set when that is done or has failed."""
        self._made = self._crew.thread(self._making.make)
        self._task(self._launch(self._made))

    def _task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, made: Future[Any]) -> None:
        try:
            await asyncio.wrap_future(made)
            if self.is_closed:
                return
            self._enter()
        except (LaunchError, OSError) as error:
            self._fail(getattr(error, "step", "") or "container", error)

    def _enter(self) -> None:
        """Have the keeper watch it, and complete what is not yet. What comes back is told on a socket of its own."""
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status.setblocking(False)
        self._loop.add_reader(self._status, self._on_status)
        made = self._making
        message = {"name": self.name, "pid": made.pid, "mark": made.id, "host_uid": made.uid}
        with theirs:
            self._crew.keeper.ask("keep" if made.is_built else "enter", message, theirs.fileno(), made.plan)

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
            self._status.close()
            self._status = None
            if not self.ready.is_set():
                self._fail("enter", LaunchError("the keeper ended before the container was complete"))
            return
        names: Any = message.get("fds", ())
        self.fds.update(zip(names, fds, strict=True))
        if message["ev"] == "born":
            self._born()
        elif message["ev"] == "sealed":
            self._sealed(message)
        elif message["ev"] == "step_failed":
            self.failure = message
            self._settle()
            self.kill()
        elif message["ev"] == "terminal":
            self._terminal = str(message["path"])
        elif message["ev"] == "egress" and self.on_event is not None:
            self.on_event(message)

    def _born(self) -> None:
        self._loop.add_reader(self.fds["pidfd"], self._on_death)
        with contextlib.suppress(OSError):
            # It may have ended already; then there is nothing to count.
            self.group.find(self.pid, self._making.layout)
            self._check_io()
        if self.is_killed:
            self.kill()

    def _check_io(self) -> None:
        try:
            self._making.check_io()
        except LaunchError as error:
            self._fail("io", error)
            self.kill()

    def _sealed(self, message: Mapping[str, Any]) -> None:
        self.steps_applied = list(message["steps"])
        self.notes += message["notes"]
        if not self.gone.is_set():
            self._task(self._sample())
        self._settle()

    async def _sample(self) -> None:
        """Keep the counters fresh: the container's group is the engine's, and gone when it has ended."""
        while not self.gone.is_set():
            self.group.stats()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), SAMPLE_S)

    def _fail(self, step: str, error: Exception) -> None:
        hint = getattr(error, "hint", "")
        message = str(getattr(error, "message", error))
        self.failure = {"step": step, "errno": getattr(error, "errno", 0) or 0}
        self.failure["message"] = f"{message} ({hint})" if hint else message
        self._settle()
        self._end()

    def _settle(self) -> None:
        self.ready.set()
        settled, self._settled = self._settled, []
        for then in settled:
            then()

    # -- how its call runs ----------------------------------------------------------------------------------------

    def open_output(self, name: str) -> tuple[int, int]:
        """Our end of the stream; its other end is a named pipe that the gate opens."""
        assert self._making.gate is not None
        return self._making.gate.open_reading(name), -1

    def go(self, call: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Open the gate. Streams that come from us are passed on byte by byte, from copies of `fds`."""
        gate, pipes = self._making.gate, self._making.pipes
        assert gate is not None
        pipes["status"] = gate.open_both("status")
        self._loop.add_reader(pipes["status"], self._on_gate)
        streams = {"stdin": "/dev/null", **({"terminal": self._terminal} if self._terminal else {})}
        for name in ("stdin", "request"):
            if name in fds and not _is_null(fds[name]):
                streams[name] = pipe_inside(name)
                self._feeds.append(Feed(self._loop, os.dup(fds[name]), gate.open_both(name)))
        if "request" in fds:
            streams["result"] = pipe_inside("result")
        argv, env, cwd = call["argv"], call["env"], call["cwd"]
        assert isinstance(argv, list | tuple)
        assert isinstance(env, dict)
        assert isinstance(cwd, str)
        argv = [self._making.python, *argv[1:]] if self._making.python else list(argv)
        files = int(config.step(self._making.plan, "rlimits")["NOFILE"])
        limit = files if files < config.ROOM_FILES else None
        gate.write("call", call_script(argv, env, cwd, streams, limit))
        os.write(pipes["go"], b"go\n")

    def _on_gate(self) -> None:
        words = os.read(self._making.pipes["status"], 4096).decode("ascii", "replace").split()
        if not words or self._is_opened:
            return  # the tool's own writing, which says nothing
        self._is_opened = True
        if words[0] == "opened":
            for feed in self._feeds:
                feed.start()
            self.steps_applied.append("exec")
            self._tell({"ev": "executed"})
            for number in self._signals:
                self.signal(number)
        elif words[0] == "nolimit":
            self.failure = {"step": "exec", "errno": 0, "message": "the image's shell cannot limit open files (ulimit)"}
        elif words[0] == "noenv":
            self.failure = {"step": "exec", "errno": 0, "message": "the image lacks env, which starts the tool"}
        else:
            self._tell({"ev": "exec_failed", "errno": 2})

    def _tell(self, message: dict[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event(message)

    def signal(self, number: int) -> None:
        """Through the container's init, which passes signals on to its child. Early ones wait for the tool.

        The shell that has a terminal passes none on: then it goes to its child, by a descriptor of that process.
        """
        if not self._is_opened:
            self._signals.append(number)
            return
        if self._terminal:
            signal_child(self.pid, number)
            return
        engine, container = self._making.engine, self._making.id
        if engine is not None and not self.gone.is_set():
            self._crew.thread(lambda: _signal(engine, container, number))

    def kill(self) -> None:
        """The end of its first process is the end of everything in its pid namespace (pid_namespaces(7))."""
        self.is_killed = True
        if "pidfd" in self.fds:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_kill(self.fds["pidfd"], signal.SIGKILL)
        elif self.ready.is_set():
            self._end()

    def _on_death(self) -> None:
        self._loop.remove_reader(self.fds["pidfd"])
        self.group.stats()
        if self.is_killed and self.ready.is_set():
            # We did it, so there is nothing to ask: the end of a call must not wait for a daemon that hangs.
            self._tell_exit(signal.SIGKILL)
            self._end()
            return
        self._task(self._ended())

    async def _ended(self) -> None:
        """Ask the engine how it ended; it may not know, because it has ended too or somebody removed the container."""
        engine, container = self._making.engine, self._making.id
        assert engine is not None
        try:
            ended: Ended = await asyncio.wrap_future(self._crew.thread(lambda: engine.wait(container)))
        except LaunchError as error:
            self.notes.append(f"how the container ended is not known: {error.message}")
        else:
            self.group.is_out_of_memory = ended.out_of_memory
            if not self.ready.is_set():
                self._fail("container", LaunchError(f"it ended with {ended.exit_code} before its call; {_NO_SHELL}"))
            self._tell_exit(ended.exit_code << 8)
        if not self.ready.is_set():
            self._fail("container", LaunchError("it ended before its call"))
        self._end()

    def _tell_exit(self, wait_status: int) -> None:
        stats = self.group.stats()
        self._tell(
            {
                "ev": "exit",
                "wait_status": wait_status,
                "user_s": stats.get("cpu_user_s", 0.0),
                "system_s": stats.get("cpu_system_s", 0.0),
                "maxrss_bytes": stats.get("memory_peak_bytes", 0),
            }
        )

    def _end(self) -> None:
        self._settle()
        self.gone.set()

    async def wait_dead(self) -> None:
        """The first process is reaped after all others of its pid namespace, so its end is theirs."""
        self.kill()
        await self.gone.wait()

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = self._making.is_given_up = True
        self.kill()
        if "pidfd" in self.fds:
            self._loop.remove_reader(self.fds["pidfd"])
        if self._status is not None:
            self._loop.remove_reader(self._status)
            self._status.close()
            self._status = None
        pipes = self._making.pipes
        if "status" in pipes:
            self._loop.remove_reader(pipes["status"])
        for feed in self._feeds:
            feed.close()
        for fd in (*pipes.values(), *self.fds.values()):
            os.close(fd)
        pipes.clear()
        self.fds.clear()
        self._end()
        self._crew.keeper.forget(self.name)
        self._crew.thread(self._dispose)

    def _dispose(self) -> None:
        """In a thread."""
        if self._made is not None:
            # It was begun before this, so this waits for no thread that it takes itself.
            wait([self._made])
        self._making.dispose()


def signal_child(parent: int, number: int) -> None:
    """Send a signal to the one child of a process. Its end, meanwhile or before, is no error."""
    with contextlib.suppress(OSError):
        for text in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()[:1]:
            pidfd = os.pidfd_open(int(text))
            try:
                if int(Path(f"/proc/{text}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    syscalls.pidfd_kill(pidfd, number)
            finally:
                os.close(pidfd)


def _signal(engine: Engine, container: str, number: int) -> None:
    """In a thread. A container that has ended meanwhile needs no signal, and a daemon that is gone shows in its end."""
    with contextlib.suppress(LaunchError):
        engine.signal(container, number)


def _is_null(fd: int) -> bool:
    info, null = os.fstat(fd), os.stat("/dev/null")
    return info.st_rdev == null.st_rdev and info.st_rdev != 0
