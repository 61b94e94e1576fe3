"""The gateway process: one per supervisor, in the host's network namespace, started by `client`.

It holds no file of ours and needs no privilege: as root it takes an unprivileged uid, and in any case it gives up
gaining privileges, writing files and executing programs. It ends with the supervisor. If it dies, every socket of its
goes with it: flows end, connects inside are refused, nothing new passes.

Messages on the control channel (`wire`), from the supervisor: `open` (call, policy and listeners as descriptors),
`close` (call), `ping`. To it: `ready`, `opened`, `refused`, `breach` (call, budget), `closed` (journal as a
descriptor), `pong`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import ipaddress
import json
import os
import resource
import socket
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from sandbox._linux import landlock, netlink, process, scheduling, wire
from sandbox.egress.addresses import Address
from sandbox.egress.handlers import Handler, handlers
from sandbox.egress.hello import quiet_about_names
from sandbox.egress.resolver import Resolver
from sandbox.egress.session import HTTP, Session

if TYPE_CHECKING:
    from sandbox.egress.http_relay import HttpRelay

OWN_ADDRESSES_KEPT_S: Final = 5.0
# Of the descriptors that we may open: listeners, lookups, and what is being set up need some beside the flows' two.
FDS_PER_FLOW: Final = 2
FDS_RESERVED: Final = 256


class Gateway:
    """The table of sessions, and what they share."""

    def __init__(self, control: socket.socket, fds_max: int, reader: HttpRelay | None = None) -> None:
        """`reader`: what reads HTTP, in the gateway that is there for calls with HTTP rules."""
        self.resolver = Resolver()
        self.handlers: Mapping[str, Handler] = {**handlers(), **({HTTP: reader} if reader else {})}
        self._authority = reader.authority.pem if reader else ""
        self._control = control
        self._flows_left = max(16, (fds_max - FDS_RESERVED) // FDS_PER_FLOW)
        self._sessions: dict[str, Session] = {}
        self._own: tuple[float, frozenset[Address]] = (0.0, frozenset())
        self._loop = asyncio.get_running_loop()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsent: collections.deque[tuple[dict[str, object], list[int]]] = collections.deque()
        self._second = (0, "")

    def __repr__(self) -> str:
        return f"<Gateway sessions={len(self._sessions)} flows_left={self._flows_left}>"

    async def serve(self) -> None:
        """Until the supervisor is gone."""
        self._control.setblocking(False)
        self._tell({"ev": "ready", "pid": os.getpid(), "authority": self._authority})
        self._loop.add_reader(self._control, self._on_control)
        await self._closing.wait()
        for session in list(self._sessions.values()):
            await session.close()
        self.resolver.close()

    # -- what sessions ask -------------------------------------------------------------------------------------

    def own_addresses(self) -> frozenset[Address]:
        """The addresses of this host's interfaces, at most some seconds old."""
        at, found = self._own
        now = time.monotonic()
        if now - at > OWN_ADDRESSES_KEPT_S:
            found = frozenset(ipaddress.ip_address(text) for text in netlink.interface_addresses())
            self._own = (now, found)
        return found

    def take_flow(self) -> bool:
        if self._flows_left <= 0:
            return False
        self._flows_left -= 1
        return True

    def give_flow(self) -> None:
        self._flows_left += 1

    def tell_breach(self, session: Session, budget: str) -> None:
        self._tell({"ev": "breach", "call": session.call_id, "budget": budget})

    def now(self) -> str:
        """RFC 3339 with microseconds; the part that changes once a second is made once a second."""
        time_ns = time.time_ns()
        seconds, rest = divmod(time_ns, 1_000_000_000)
        if self._second[0] != seconds:
            self._second = (seconds, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)))
        return f"{self._second[1]}.{rest // 1000:06d}Z"

    # -- the control channel -----------------------------------------------------------------------------------

    def _on_control(self) -> None:
        while True:
            try:
                message, fds = wire.receive(self._control)
            except BlockingIOError:
                return
            except ConnectionResetError:
                message, fds = None, []
            if message is None:
                self._loop.remove_reader(self._control)
                self._closing.set()
                return
            self._obey(message, fds)

    def _obey(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["op"] == "ping":
            self._tell({"ev": "pong"})
        elif message["op"] == "open":
            self._open(message["call"], dict(zip(message["fds"], fds, strict=True)))
        else:
            task = self._loop.create_task(self._close(message["call"], drain=message["drain"]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _open(self, call_id: str, fds: dict[str, int]) -> None:
        policy_fd, secrets_fd = fds.pop("policy"), fds.pop("secrets", None)
        try:
            secrets = {} if secrets_fd is None else json.loads(wire.read_memfd(secrets_fd))
            session = Session(call_id, json.loads(wire.read_memfd(policy_fd)), self, secrets)
        except (ValueError, KeyError, TypeError) as error:
            for fd in fds.values():
                os.close(fd)
            self._tell({"ev": "refused", "call": call_id, "message": f"{type(error).__name__}: {error}"[:2000]})
            return
        finally:
            os.close(policy_fd)
            if secrets_fd is not None:
                os.close(secrets_fd)
        self._sessions[call_id] = session
        session.open(fds)
        self._tell({"ev": "opened", "call": call_id})

    async def _close(self, call_id: str, *, drain: bool) -> None:
        """Answered in any case, with an empty journal for a call that was never opened."""
        session = self._sessions.pop(call_id, None)
        report: dict[str, Any] = {"items": [], "totals": {}, "denials": []}
        if session is not None:
            await session.close(drain=drain)
            report = session.report()
        fd = wire.memfd("journal", json.dumps(report).encode())
        self._tell({"ev": "closed", "call": call_id}, [fd])

    def _tell(self, message: dict[str, object], fds: list[int] | None = None) -> None:
        """Send, or queue while the supervisor does not read; descriptors are closed once they are sent."""
        self._unsent.append((message, fds or []))
        if len(self._unsent) == 1:
            self._send_queued()

    def _send_queued(self) -> None:
        while self._unsent:
            message, fds = self._unsent[0]
            try:
                wire.send(self._control, message, fds)
            except BlockingIOError:
                self._loop.add_writer(self._control, self._send_queued)
                return
            except (BrokenPipeError, ConnectionResetError):
                self._closing.set()
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        self._loop.remove_writer(self._control)


def _lock_down(uid: int) -> None:
    """Give up what the gateway does not need. `uid` -1: keep the uid, which is unprivileged already."""
    # The death signal follows our parent; it is cleared by a change of uid, so it is asked for after that.
    if uid >= 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    parent = os.getppid()
    process.die_with_parent()
    if os.getppid() != parent:
        os._exit(0)
    process.set_not_dumpable()
    process.set_no_new_privs()
    abi = landlock.abi_version()
    if abi:
        landlock.restrict([("/", ["read"])], min(abi, landlock.HIGHEST_ABI))


def _raise_fds_max() -> int:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 1 << 20) if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def main(control_fd: int, uid: int, mode: str) -> None:
    """Serve on `control_fd` until the supervisor closes it. `mode` "http": also calls with HTTP rules and secrets."""
    control = socket.socket(fileno=control_fd)
    os.umask(0o077)
    # The supervisor's control comes before the bytes that pass here.
    scheduling.take_turns(scheduling.USUAL_NS)
    fds_max = _raise_fds_max()
    # What is imported late would be read with an unprivileged uid, perhaps from a directory that it may not enter.
    with contextlib.suppress(UnicodeError):
        "x".encode("idna")
    quiet_about_names()
    reader = _reader() if mode == HTTP else None
    # What is there now stays to the end; looking through it for garbage again and again would delay calls.
    gc.freeze()
    _lock_down(uid)
    asyncio.run(_run(control, fds_max, reader))


def _reader() -> HttpRelay:
    # A gateway of its own reads HTTP, ends TLS and holds secrets: the other one never loads any of this.
    from sandbox.egress.http_relay import HttpRelay

    return HttpRelay()


async def _run(control: socket.socket, fds_max: int, reader: HttpRelay | None) -> None:
    await Gateway(control, fds_max, reader).serve()
