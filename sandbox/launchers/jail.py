"""The native launcher: hands a plan to the zygote, which builds the jail. Needs nothing but the kernel and Python."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from sandbox._linux import wire
from sandbox.errors import LauncherUnavailable

_BOOT = "import sys; sys.path.append(sys.argv[2]); from sandbox._jail.zygote import main; main(int(sys.argv[1]))"
READY_TIMEOUT_S = 30.0
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


class Zygote:
    """The zygote process of one supervisor. Started from the loop's own thread, which its death signal follows."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = process
        self._control = control

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    def start(cls) -> Zygote:
        """Exec a fresh, isolated interpreter (no site, no environment) and wait until it serves.

        Raises LauncherUnavailable when it does not come up.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(theirs.fileno()), str(PACKAGE_ROOT)]
            process = subprocess.Popen(
                argv, env={}, cwd="/", stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        ours.settimeout(READY_TIMEOUT_S)
        try:
            message, _ = wire.receive(ours)
        except OSError as error:
            process.kill()
            raise LauncherUnavailable(f"the zygote did not start: {error}", step="zygote") from error
        if message is None:
            raise LauncherUnavailable(f"the zygote ended with status {process.wait()}", step="zygote")
        ours.setblocking(False)
        return cls(process, ours)

    def launch(self, message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Ask for one jail. Raises OSError (EPIPE, ECONNRESET) when the zygote is gone; the descriptors stay ours."""
        wire.send(self._control, {**message, "fds": list(fds)}, list(fds.values()))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        """Let the zygote end; its jails end with it."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def status_pair() -> tuple[socket.socket, socket.socket]:
    """(our end, the jail's end) of one jail's status channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    return ours, theirs


def prepare_mount_points(state: Path) -> Path:
    """The empty directories on which builders mount, each in a mount namespace of its own."""
    mnt = state / "mnt"
    for name in ("root", "scratch", "lower"):
        os.makedirs(mnt / name, mode=0o700, exist_ok=True)
    return mnt


async def wait_readable(loop: asyncio.AbstractEventLoop, fd: int, timeout_s: float) -> bool:
    """Whether `fd` (a pidfd: its process has ended) became readable in time."""
    event = asyncio.Event()
    loop.add_reader(fd, event.set)
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
    return True
