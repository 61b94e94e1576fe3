"""The supervisor's side of the keeper, which completes containers of other engines (`sandbox._jail.keeper`)."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sandbox._linux import wire
from sandbox.errors import LauncherUnavailable
from sandbox.plan import LaunchPlan

_BOOT = "import sys; sys.path.append(sys.argv[2]); from sandbox._jail.keeper import main; main(int(sys.argv[1]))"
_READY_TIMEOUT_S = 30.0
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Keeper:
    """One process beside the supervisor; it ends, and with it what it keeps, when the supervisor does."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control

    @classmethod
    def start(cls) -> Keeper:
        """Raises LauncherUnavailable when it does not come up."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(theirs.fileno()), str(_PACKAGE_ROOT)]
            process = subprocess.Popen(
                argv, env={}, cwd="/", stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        ours.settimeout(_READY_TIMEOUT_S)
        try:
            message, _ = wire.receive(ours)
        except OSError as error:
            process.kill()
            raise LauncherUnavailable(f"the keeper did not start: {error}", step="keeper") from error
        if message is None:
            raise LauncherUnavailable(f"the keeper ended with status {process.wait()}", step="keeper")
        return cls(process, ours)

    def ask(self, op: str, message: Mapping[str, object], status_fd: int, plan: LaunchPlan) -> None:
        """Have one container looked after. What comes of it is told at `status_fd`.

        `op`: `enter` to complete the container of process `pid` and watch it, `build` to put its places together at
        `built_at` before it is made, `keep` to watch only. Raises OSError when the keeper is gone.
        """
        steps = json.dumps({"steps": plan.to_json()["steps"]}).encode()
        plan_fd, empty = wire.memfd("plan", steps), wire.memfd("seccomp", b"")
        try:
            names = ["plan", "seccomp", "status"]
            wire.send(self._control, {**message, "op": op, "fds": names}, [plan_fd, empty, status_fd])
        finally:
            os.close(plan_fd)
            os.close(empty)

    def expect(self, name: str, pipe: str) -> None:
        """A container is about to be made, whose first program will wait at `pipe`. Raises OSError when it is gone."""
        wire.send(self._control, {"op": "expect", "name": name, "pipe": pipe, "fds": []})

    def forget(self, name: str) -> None:
        """Watch a container no longer."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            wire.send(self._control, {"op": "forget", "name": name, "fds": []})

    def close(self) -> None:
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
