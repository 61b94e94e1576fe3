"""The supervisor's end of the gateway: start it, open and close calls on it, notice when it is gone or hangs.

Fails closed: when the gateway ends, its sockets end with it, and every call that was open on it is told (`lost`), so
that the supervisor can end it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from sandbox._linux import wire
from sandbox.errors import LauncherUnavailable

_BOOT: Final = (
    "import sys; sys.path.extend(p for p in sys.argv[4:] if p not in sys.path); "
    "from sandbox.egress.gateway import main; main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
)
PACKAGE_ROOT: Final = Path(__file__).resolve().parents[2]
READY_TIMEOUT_S: Final = 60.0
CLOSE_TIMEOUT_S: Final = 20.0
PING_S: Final = 2.0
# A gateway that answers nothing for so long is taken for hanging, and killed. Generous: hosts get busy.
HANG_S: Final = 20.0


class GatewayLost(Exception):
    """The gateway is gone, or did not answer in time."""


class Tie:
    """One call's tie to the gateway. The callbacks run in the loop; `lost` at most once."""

    def __init__(self, call_id: str, on_breach: Callable[[str], None], on_lost: Callable[[str], None]) -> None:
        self.call_id = call_id
        self.on_breach = on_breach
        self.on_lost = on_lost
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.closed: asyncio.Future[dict[str, Any]] = loop.create_future()


class Gateway:
    """The gateway process of one supervisor."""

    def __init__(self, popen: subprocess.Popen[bytes], control: socket.socket) -> None:
        self._process = popen
        self._control = control
        self._loop = asyncio.get_running_loop()
        self._ties: dict[str, Tie] = {}
        self._ready = self._loop.create_future()
        self._heard = time.monotonic()
        self._is_lost = False
        self._authority = ""
        self._ping = self._loop.call_later(PING_S, self._on_ping)
        self._loop.add_reader(control, self._on_message)

    def __repr__(self) -> str:
        return f"<Gateway pid={self._process.pid} calls={len(self._ties)}{' lost' if self._is_lost else ''}>"

    @classmethod
    def start(cls, uid: int | None, *, reads_http: bool = False) -> Gateway:
        """Exec a fresh, isolated interpreter; does not wait for it. `uid`: the unprivileged one it takes, as root.

        `reads_http`: for calls with HTTP rules and secrets; it then has a certificate authority.

        Call it from the loop's own thread, which the gateway's death signal follows.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", _BOOT, str(theirs.fileno()), str(-1 if uid is None else uid)]
            argv += [
                "http" if reads_http else "",
                str(PACKAGE_ROOT),
                *(path for path in sys.path if os.path.isabs(path)),
            ]
            popen = subprocess.Popen(
                argv,
                # Names are looked up as they are written: no search list of the host's is put behind them.
                env={"LOCALDOMAIN": ".", "RES_OPTIONS": "ndots:1"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return cls(popen, ours)

    @property
    def is_alive(self) -> bool:
        return not self._is_lost and self._process.poll() is None

    @property
    def pid(self) -> int:
        return self._process.pid

    async def open(self, tie: Tie, policy: Mapping[str, Any], listeners: Mapping[str, int]) -> None:
        """Hand a call's listeners over, and its secrets' values with them; they are closed here.

        Raises GatewayLost, LauncherUnavailable.
        """
        try:
            await self._until_ready()
            self._ties[tie.call_id] = tie
            policy_fd = wire.memfd("policy", json.dumps(policy).encode())
            try:
                names = {"policy": policy_fd, **listeners}
                self._send({"op": "open", "call": tie.call_id, "fds": list(names)}, list(names.values()))
            finally:
                os.close(policy_fd)
        finally:
            for fd in listeners.values():
                os.close(fd)
        await tie.opened

    def begin_close(self, tie: Tie, *, drain: bool) -> None:
        """Have a call's flows ended. Raises GatewayLost."""
        if tie.call_id not in self._ties:
            raise GatewayLost("the call was never opened on the gateway")
        self._send({"op": "close", "call": tie.call_id, "drain": drain}, [])

    async def journal(self, tie: Tie) -> dict[str, Any]:
        """What a call tried, once `begin_close` has ended it. Raises GatewayLost."""
        try:
            return await asyncio.wait_for(asyncio.shield(tie.closed), CLOSE_TIMEOUT_S)
        except TimeoutError:
            self._lose("it did not close a call in time")
            raise GatewayLost("the gateway did not close a call in time") from None
        finally:
            self._ties.pop(tie.call_id, None)

    async def authority(self) -> str:
        """The certificate (PEM) that jails have to trust. Raises GatewayLost, LauncherUnavailable."""
        await self._until_ready()
        return self._authority

    async def _until_ready(self) -> None:
        try:
            await asyncio.wait_for(asyncio.shield(self._ready), READY_TIMEOUT_S)
        except TimeoutError:
            self._lose("it did not start in time")
            raise LauncherUnavailable("the egress gateway did not start in time", step="egress") from None

    def _send(self, message: dict[str, object], fds: list[int]) -> None:
        if self._is_lost:
            raise GatewayLost("the egress gateway is gone")
        try:
            wire.send(self._control, message, fds)
        except OSError as error:
            self._lose(f"the channel to it broke: {error.strerror}")
            raise GatewayLost("the egress gateway is gone") from None

    def _on_ping(self) -> None:
        """Only while calls are open on it: an idle one is asked nothing."""
        self._ping = self._loop.call_later(PING_S, self._on_ping)
        if not self._ties:
            self._heard = time.monotonic()
            return
        if time.monotonic() - self._heard > HANG_S:
            self._lose("it stopped answering")
            return
        try:
            self._send({"op": "ping"}, [])
        except GatewayLost:
            return

    def _on_message(self) -> None:
        while not self._is_lost:
            try:
                message, fds = wire.receive(self._control)
            except BlockingIOError:
                return
            except OSError:
                message, fds = None, []
            if message is None:
                self._lose("it ended")
                return
            self._heard = time.monotonic()
            self._take(message, fds)

    def _take(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["ev"]
        if kind == "ready":
            self._authority = message["authority"]
            self._ready.set_result(None)
        tie = self._ties.get(message.get("call", ""))
        if tie is None:
            for fd in fds:
                os.close(fd)
        elif kind == "opened":
            tie.opened.set_result(None)
        elif kind == "refused":
            tie.opened.set_exception(LauncherUnavailable(f"the egress gateway: {message['message']}", step="egress"))
        elif kind == "breach":
            tie.on_breach(message["budget"])
        elif kind == "closed":
            try:
                tie.closed.set_result(json.loads(wire.read_memfd(fds[0])))
            finally:
                os.close(fds[0])

    def _lose(self, why: str) -> None:
        """Make sure that it is gone, and tell everyone who has a call on it."""
        if self._is_lost:
            return
        self._is_lost = True
        self._ping.cancel()
        self._loop.remove_reader(self._control)
        self._control.close()
        self._process.kill()
        self._process.wait()
        error = GatewayLost(f"the egress gateway is gone: {why}")
        for future in (self._ready, *(future for tie in self._ties.values() for future in (tie.opened, tie.closed))):
            if not future.done():
                future.set_exception(error)
                future.exception()  # seen: not everyone waits for it
        for tie in list(self._ties.values()):
            tie.on_lost(why)

    def close(self) -> None:
        """Let it end."""
        if self._is_lost:
            return
        self._is_lost = True
        self._ping.cancel()
        self._loop.remove_reader(self._control)
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
