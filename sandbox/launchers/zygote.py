"""The zygote process, as its supervisor sees it. Loads little: it is started before what the supervisor needs."""

from __future__ import annotations

import os
import socket
import sys

from sandbox._linux import wire
from sandbox._linux.child import Child, spawn
from sandbox.errors import LauncherUnavailable

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Mapping

_BOOT = "import sys; sys.path.append(sys.argv[1]); from sandbox._jail.zygote import main; main(int(sys.argv[2]))"
READY_TIMEOUT_S = 30.0
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))


class Zygote:
    """The zygote process of one supervisor. Started from the loop's own thread, which its death signal follows."""

    def __init__(self, process: Child, control: socket.socket) -> None:
        self._process = process
        self._control = control

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    def begin(cls) -> Zygote:
        """Exec a fresh, isolated interpreter (no site, no environment). It serves once `wait_ready` has come back."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, PACKAGE_ROOT]
            process = spawn(argv, {"LD_BIND_NOW": "1"}, theirs.fileno())
        return cls(process, ours)

    def wait_ready(self) -> None:
        """Raises LauncherUnavailable when it does not come up."""
        self._control.settimeout(READY_TIMEOUT_S)
        try:
            message, _ = wire.receive(self._control)
        except OSError as error:
            self._process.kill()
            raise LauncherUnavailable(f"the zygote did not start: {error}", step="zygote") from error
        if message is None:
            raise LauncherUnavailable(f"the zygote ended with status {self._process.wait()}", step="zygote")
        self._control.setblocking(False)

    @classmethod
    def start(cls) -> Zygote:
        """Begin and wait. Raises LauncherUnavailable when it does not come up."""
        zygote = cls.begin()
        zygote.wait_ready()
        return zygote

    def launch(self, message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Ask for one jail. Raises OSError (EPIPE, ECONNRESET) when the zygote is gone; the descriptors stay ours."""
        wire.send(self._control, {**message, "fds": list(fds)}, list(fds.values()))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """Let the zygote end, without waiting for it; its jails end with it."""
        self._control.close()

    def close(self) -> None:
        """`end`, and wait."""
        self.end()
        try:
            self._process.wait(5)
        except TimeoutError:
            self._process.kill()
            self._process.wait()
