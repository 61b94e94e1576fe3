"""The attendant of a container with a kernel of its own (gVisor's runsc): nothing of ours runs inside.

There the host's namespaces, filters and descriptors mean nothing to the tool, so it is started as the container's
first process, and this attendant does from outside what pid 1 does in a jail: it parks until the call comes, writes the
call into the bundle, starts the runtime in the call's group, passes signals on and reports the end. A function's
request and result travel as files in a place of the call's own, since only standard streams can be handed through.

Does not defend against: faults of the sentry; that is what its own filter and namespaces are for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import select
import signal

from sandbox._jail import container, inside, pid1, steps
from sandbox._jail.launch import report_failure
from sandbox._linux import mounts, syscalls, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CONTAINER = "call"
# Inside, and below the scratch tmpfs outside, so that the call's own size limit holds for a result too.
EXCHANGE = "/run/sandbox/exchange"
_ENTER = {name: steps.at_once(steps.STEPS[name]) for name in ("affinity",)}
_LOG_MAX_BYTES = 2000
_CHUNK_BYTES = 1 << 20
_REFUSED = 127
# How runsc ends when it could not do its own work; the tool may end so as well.
_FAILED = 128
_WITH_FILES = f'exec "$@" 3<{EXCHANGE}/request 4>{EXCHANGE}/result'


class Attendant(container.Attendant):
    """Pid 1 of the runtime's pid namespace."""

    def attend(self) -> int:
        launch = self.launch
        self.prepare()
        config = json.loads(wire.read_memfd(launch.fds["config"]))
        self._make_exchange()
        # Its processes speak to each other by an abstract socket, named after the container, that belongs to a network
        # namespace: here nobody else finds it, and every call's has the same name (unix(7)).
        syscalls.unshare(syscalls.CLONE_NEWNET)
        launch.applied += [step["name"] for step in launch.plan["steps"] if step["where"] in ("enter", "runtime")]
        pid1.park(launch)
        wait_status = self._watch(self._start(config))
        if self._is_lost(wait_status):
            return 1  # how the tool ended nobody knows; whether memory ended both, the group does
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._hand_out_result()
        message = {
            "ev": "exit",
            "wait_status": wait_status,
            "user_s": usage.ru_utime,
            "system_s": usage.ru_stime,
            "maxrss_bytes": usage.ru_maxrss * 1024,
        }
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(launch.status, message)
        return 0

    def _start(self, config: dict[str, Any]) -> int:
        """Start the runtime with the call in its bundle; returns its pid."""
        launch, call = self.launch, self.launch.call
        launch.step = "exec"
        refused = self._refusal(call["argv"][0], call["env"])
        if refused:
            wire.send(launch.status, {"ev": "exec_failed", "errno": refused})
            return _failed_child()
        argv = list(call["argv"])
        if "request" in launch.fds:
            self._take_request()
            argv = ["/bin/sh", "-c", _WITH_FILES, "sh", *argv]
        config["process"]["args"] = argv
        config["process"]["env"] = [f"{name}={value}" for name, value in call["env"].items()]
        config["process"]["cwd"] = call["cwd"]
        with open(f"{self.bundle}/config.json", "w", encoding="utf-8") as file:
            json.dump(config, file)
        options = ["--root", f"{self.bundle}/state", "--ignore-cgroups", "--oci-seccomp", "--log", self._log]
        # Its own network stack, with a loopback and nothing else: it makes a network namespace for itself.
        options += ["--network", "none"]
        command = [self.program, *options, "run", "--bundle", self.bundle, CONTAINER]
        pid = os.fork()
        if pid == 0:
            self._become(command)
        wire.send(launch.status, {"ev": "executed"})
        for name in ("stdin", "stdout", "stderr"):
            os.close(launch.fds.pop(name))
        return pid

    def _become(self, command: list[str]) -> None:
        try:
            os.setsid()
            for fd in self.procs_fds():
                os.write(fd, b"0")
            self.launch.run_steps("enter", _ENTER)
            moved = [os.dup(self.launch.fds[name]) for name in ("stdin", "stdout", "stderr")]
            for number, fd in enumerate(moved):
                os.dup2(fd, number, inheritable=True)
            os.execve(command[0], command, container.ENV)  # noqa: S606 - this is the point
        except OSError as error:
            report_failure(self.launch, error)
        os._exit(_REFUSED)

    def _refusal(self, program: str, env: dict[str, str]) -> int:
        """The errno with which the program cannot be executed, by what the view shows; 0 when it can be tried."""
        root = inside.open_root(self.launch.root)
        refused = 0
        try:
            for path in pid1.candidates(program, env):
                fd = inside.open_place(root, path, follow=True)
                if fd is None:
                    refused = refused or errno.ENOENT
                    continue
                mode = os.fstat(fd).st_mode
                os.close(fd)
                if mode & 0o111:
                    return 0
                refused = errno.EACCES
        finally:
            os.close(root)
        return refused or errno.ENOENT

    def _make_exchange(self) -> None:
        """A directory that the tool cannot change, on the tmpfs of its private places, and where it will be shown.

        Then the root is read-only, which runsc could not make it: it would drop nosuid in vain (EPERM).
        """
        os.mkdir(self._exchange, 0o755)
        os.makedirs(f"{self.launch.root}{EXCHANGE}")
        mounts.remount_read_only(self.launch.root)

    def _take_request(self) -> None:
        owner = self.launch.owner
        for name, data in (("request", wire.read_memfd(self.launch.fds["request"])), ("result", b"")):
            fd = os.open(f"{self._exchange}/{name}", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
                os.fchown(fd, owner, owner)

    def _is_lost(self, wait_status: int) -> bool:
        """Whether it was the runtime that failed, by its own log, after the tool had started.

        Raises OSError with what it said when it failed before.
        """
        if wait_status != _FAILED << 8 or not os.path.exists(self._log):
            return False
        with open(self._log, "rb") as file:
            said = " ".join(file.read(_LOG_MAX_BYTES).decode("utf-8", "replace").split())
        if "creating container" in said or "starting container" in said:
            self.launch.step = "create"
            raise OSError(errno.EIO, f"runsc: {said}")
        return bool(said)

    @property
    def _log(self) -> str:
        return f"{self.bundle}/log"

    @property
    def _exchange(self) -> str:
        return f"{self.launch.mnt}/scratch/exchange"

    def _hand_out_result(self) -> None:
        """Copy what the function wrote into the pipe; the far end is the supervisor's, bounded there."""
        if "result" not in self.launch.fds:
            return
        self.launch.step = "result"
        fd = os.open(f"{self._exchange}/result", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with contextlib.suppress(BrokenPipeError):
            while chunk := os.read(fd, _CHUNK_BYTES):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self.launch.fds["result"], view) :]
        os.close(fd)

    def _watch(self, runtime_pid: int) -> int:
        """Reap, and pass signals on, until the runtime has ended; its wait status."""
        wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
        poller = select.poll()
        poller.register(wake_read, select.POLLIN)
        poller.register(self.launch.status, select.POLLIN)
        while True:
            while True:
                pid, status = _reap()
                if pid == runtime_pid:
                    return _unwrapped(status)
                if not pid:
                    break
            ready = {fd for fd, _ in poller.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
            if self.launch.status.fileno() in ready:
                self._obey()

    def _obey(self) -> None:
        message, _ = wire.receive(self.launch.status)
        if message is None:
            os._exit(1)
        if message.get("op") == "signal":
            argv = [self.program, "--root", f"{self.bundle}/state", "kill", "--all", CONTAINER, str(message["number"])]
            pid = os.fork()
            if pid == 0:
                os.execve(argv[0], argv, container.ENV)  # noqa: S606 - this is the point


def _reap() -> tuple[int, int]:
    try:
        return os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return 0, 0


def _unwrapped(status: int) -> int:
    """The tool's wait status from the runtime's: 128 and more is how it tells that a signal ended the tool."""
    code = status >> 8
    return code - 128 if not status & 0x7F and 128 < code <= 128 + 64 else status


def _failed_child() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(_REFUSED)
    return pid
