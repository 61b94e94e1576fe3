"""One call in the gateway: its listeners, its names, its flows, its budgets, its journal.

Nothing is shared between sessions but the resolver's answers and the handlers: a flow is judged by the rules of the
session whose listener accepted it, and listeners live in the network namespace of one jail each.
"""

from __future__ import annotations

import asyncio
import ipaddress
import select
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from sandbox._linux import netfilter
from sandbox.egress import dns, explain
from sandbox.egress.addresses import SYNTHETIC_V4, SYNTHETIC_V6, Address
from sandbox.egress.budget import Limits, Meter
from sandbox.egress.datagrams import Datagram, read_packet
from sandbox.egress.flow import Flow, Refused
from sandbox.egress.handlers import Handler
from sandbox.egress.http_policy import HttpPolicy
from sandbox.egress.journal import Attempt, Journal
from sandbox.egress.names import Answered, NameTable
from sandbox.egress.pump import reset
from sandbox.egress.resolver import Resolver
from sandbox.egress.rules import compile_rules

DNS_PORT: Final = 53
HTTP: Final = "http"
ACCEPTS_AT_ONCE: Final = 64
LOOKUPS_AT_ONCE: Final = 8
WAITING_MAX: Final = 4096
DRAIN_S: Final = 0.5
TICK_S: Final = 0.5
DNS_IDLE_S: Final = 10.0
_IP_PKTINFO: Final = 8
_PKTINFO_SPACE: Final = 128


class Host(Protocol):
    """What a session needs of the gateway that it lives in."""

    resolver: Resolver
    handlers: Mapping[str, Handler]

    def own_addresses(self) -> frozenset[Address]: ...
    def take_flow(self) -> bool: ...
    def give_flow(self) -> None: ...
    def tell_breach(self, session: Session, budget: str) -> None: ...
    def now(self) -> str: ...


class Session:
    """One call's connections."""

    def __init__(self, call_id: str, policy: Mapping[str, Any], host: Host, secrets: Mapping[str, str]) -> None:
        """`secrets`: the values of those that the policy names. Raises ValueError, KeyError, without any value."""
        self.call_id = call_id
        self.http = HttpPolicy(policy, secrets)
        if self.http and HTTP not in host.handlers:
            raise ValueError("this gateway does not read HTTP")
        self.rules = compile_rules(tuple(policy["allow"]), tuple(policy["deny"]))
        self.names = NameTable(self.rules)
        self.journal = Journal()
        self.meter = Meter(Limits.from_json(policy["call"]))
        self.flow_limits = Limits()
        self.guessing = 0
        self._host = host
        self._host_limits = Limits.from_json(policy["host"])
        self._host_meters: dict[str, Meter] = {}
        self._admitted: dict[Flow, tuple[Meter, ...]] = {}
        self._flows: set[Flow] = set()
        self._listeners: list[socket.socket] = []
        self._readers: dict[socket.socket, Callable[[socket.socket], None]] = {}
        self.is_cut = False
        self._dns_tasks: set[asyncio.Task[None]] = set()
        self._lookups = asyncio.Semaphore(LOOKUPS_AT_ONCE)
        self._told: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._tick: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Session {self.call_id} flows={len(self._flows)} {self.rules!r}>"

    def open(self, listeners: Mapping[str, int]) -> None:
        """Take over the sockets that the jail's step made: `egress:KIND:INDEX` to descriptor."""
        for name, fd in listeners.items():
            sock = socket.socket(fileno=fd)
            sock.setblocking(False)
            self._listeners.append(sock)
            readers = {"dns": self._on_queries, "log": self._on_refused_datagrams}
            self._readers[sock] = readers.get(name.split(":")[1], self._on_connects)
            # By number: for an object that it does not know yet, the loop would make its whole repr first.
            self._loop.add_reader(fd, self._readers[sock], sock)
        self._tick = self._loop.call_later(TICK_S, self._look_at_times)

    async def close(self, *, drain: bool = False) -> None:
        """Let go of the listeners and end every flow. The journal is complete afterwards.

        `drain`: the call ended by itself, so what it has sent goes on for a moment, as a kernel would send it after
        the end of a process. Otherwise nothing more passes.
        """
        if self._tick is not None:
            self._tick.cancel()
        self.is_cut = not drain
        self._take_what_waits()
        self._close_listeners()
        if self._flows:
            # A task that is cancelled before its first turn would do nothing at all, not even its line in the journal.
            await asyncio.sleep(0)
        deadline = time.monotonic() + DRAIN_S
        while drain and time.monotonic() < deadline and not all(flow.is_sent for flow in self._flows):
            await asyncio.sleep(0.002)
        self.is_cut = True
        for task in self._dns_tasks:
            task.cancel()
        flows = list(self._flows)
        for flow in flows:
            flow.cut("call_ended")
        for flow in flows:
            await flow.wait_closed()

    def _take_what_waits(self) -> None:
        """Connections, queries and datagrams that nobody has looked at yet: the jail is dead, no more can come."""
        for sock in self._listeners:
            poller = select.poll()
            poller.register(sock, select.POLLIN)
            for _ in range(WAITING_MAX // ACCEPTS_AT_ONCE):
                if not poller.poll(0):
                    break
                self._readers[sock](sock)

    def report(self) -> dict[str, Any]:
        """The journal, as the supervisor wants it."""
        allowed = [str(rule) for rule in self.rules.allow]
        return {
            "items": self.journal.items(),
            "totals": self.journal.totals,
            "denials": explain.denials(self.journal.denials.values(), allowed, self.http.permitted),
        }

    # -- what flows ask ----------------------------------------------------------------------------------------

    @property
    def resolver(self) -> Resolver:
        return self._host.resolver

    async def handle(self, flow: Flow) -> None:
        protocol = flow.verdict.protocol if self.http.group(flow.host) is None else HTTP
        await self._host.handlers[protocol](flow)

    async def lookup(self, name: str) -> tuple[Address, ...]:
        """Raises LookupFailed. A call keeps only some of the lookup threads busy."""
        async with self._lookups:
            return await self.resolver.lookup(name)

    def own_addresses(self) -> frozenset[Address]:
        return self._host.own_addresses()

    def now(self) -> str:
        return self._host.now()

    def is_synthetic(self, address: Address) -> bool:
        return address in (SYNTHETIC_V4 if address.version == 4 else SYNTHETIC_V6)

    def admit(self, flow: Flow) -> tuple[Meter, ...]:
        """Count the flow against the budgets; returns the meters of its host. Raises Refused."""
        host = self._host_meters.get(flow.host)
        if host is None:
            host = self._host_meters[flow.host] = Meter(self._host_limits, "host_")
        for meter in (self.meter, host):
            if budget := meter.refusal():
                self._breach(budget)
                raise Refused("budget", budget)
        if not self._host.take_flow():
            raise Refused("gateway_busy")
        self._admitted[flow] = (self.meter, host)
        for meter in (self.meter, host):
            meter.connections += 1
            meter.at_once += 1
        return (host,)

    def forget(self, flow: Flow) -> None:
        """The flow is over: its sockets are closed and its attempt is in the journal."""
        self._flows.discard(flow)
        meters = self._admitted.pop(flow, None)
        if meters is not None:
            self._host.give_flow()
            for meter in meters:
                meter.at_once -= 1

    def ended(self, attempt: Attempt) -> None:
        self.journal.add(attempt)
        if attempt.reason == "budget":
            self._breach(attempt.detail)

    # -- connections -------------------------------------------------------------------------------------------

    def _on_connects(self, listener: socket.socket) -> None:
        """Take some connections, not all that wait: other calls are served in between."""
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                front, _ = listener.accept()
            except BlockingIOError:
                return
            except OSError:
                # EMFILE and the like: the connection stays in the backlog, and the kernel asks again.
                return
            front.setblocking(False)
            self._take(front)

    def _take(self, front: socket.socket) -> None:
        try:
            where = front.getsockname()
        except OSError:
            front.close()
            return
        address, port = ipaddress.ip_address(where[0]), where[1]
        if port == DNS_PORT and not address.is_loopback:
            self._spawn_dns(front)
            return
        flow = Flow(self, front, address, port)
        self._flows.add(flow)
        flow.start()

    def _breach(self, budget: str) -> None:
        if budget in self._told:
            return
        self._told.add(budget)
        self._host.tell_breach(self, budget)
        if budget == "connections_max":
            # From here on the kernel refuses: a flood costs the gateway nothing any more.
            self._close_listeners(keep_dns=True)

    def _close_listeners(self, *, keep_dns: bool = False) -> None:
        kept = []
        for sock in self._listeners:
            if keep_dns and sock.type != socket.SOCK_STREAM:
                kept.append(sock)
                continue
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._listeners = kept

    def _look_at_times(self) -> None:
        """Cut flows that have idled or lasted too long."""
        self._tick = self._loop.call_later(TICK_S, self._look_at_times)
        limits = self.meter.limits
        now = time.monotonic()
        for flow in list(self._flows):
            if limits.flow_time_s is not None and now - flow.started > limits.flow_time_s:
                flow.cut("budget", "flow_time")
            elif limits.idle_time_s is not None and flow.idle_s(now) > limits.idle_time_s:
                flow.cut("budget", "idle_time")

    # -- DNS ---------------------------------------------------------------------------------------------------

    def _on_queries(self, sock: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                data, ancillary, _, peer = sock.recvmsg(dns.MESSAGE_MAX_BYTES + 1, _PKTINFO_SPACE)
            except BlockingIOError:
                return
            except OSError:
                continue  # an ICMP error of an earlier answer, to a socket that its owner has closed
            reply = self._reply(data)
            if reply:
                try:
                    sock.sendmsg([reply], _answer_from(ancillary), 0, peer)
                except OSError:
                    continue  # the asker is gone, or its buffer is full; it asks again

    def _reply(self, data: bytes) -> bytes:
        try:
            query = dns.parse_query(data)
        except dns.BadQuery as error:
            self._log_lookup(Answered(error.reply, "", "", "", "not_named", str(error)))
            return error.reply
        answered = self.names.answer(query, time.monotonic())
        self._log_lookup(answered)
        return answered.reply

    def _log_lookup(self, answered: Answered) -> None:
        decision = "deny" if answered.reason else "allow"
        self.journal.add(
            Attempt(
                self.now(),
                "dns",
                "dns",
                answered.name,
                DNS_PORT,
                decision,
                answered.rule,
                answered.reason,
                answered.detail or answered.kind,
            )
        )

    # -- datagrams, which the kernel has refused already -------------------------------------------------------

    def _on_refused_datagrams(self, sock: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                data = sock.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                continue  # ENOBUFS: more came than were read
            for packet in netfilter.logged_packets(data):
                datagram = read_packet(packet)
                if datagram is not None:
                    self._log_datagram(datagram)

    def _log_datagram(self, datagram: Datagram) -> None:
        host = self.names.name_of(datagram.address) or str(datagram.address)
        attempt = Attempt(self.now(), "udp", datagram.proto, host, datagram.port, "deny", reason="not_tcp")
        self.journal.add(attempt._replace(resolved_ip=str(datagram.address)))

    def _spawn_dns(self, front: socket.socket) -> None:
        if len(self._dns_tasks) >= ACCEPTS_AT_ONCE:
            reset(front)
            return
        task = self._loop.create_task(self._serve_dns(front))
        self._dns_tasks.add(task)
        task.add_done_callback(self._dns_tasks.discard)

    async def _serve_dns(self, front: socket.socket) -> None:
        """DNS over TCP: each message after its length (RFC 1035, 4.2.2)."""
        data = b""
        with front:
            try:
                while True:
                    async with asyncio.timeout(DNS_IDLE_S):
                        chunk = await self._loop.sock_recv(front, 4096)
                    if not chunk:
                        return
                    data += chunk
                    while len(data) >= 2 and len(data) >= 2 + int.from_bytes(data[:2], "big"):
                        size = int.from_bytes(data[:2], "big")
                        reply = self._reply(data[2 : 2 + size])
                        data = data[2 + size :]
                        async with asyncio.timeout(DNS_IDLE_S):
                            await self._loop.sock_sendall(front, struct.pack(">H", len(reply)) + reply)
                    if len(data) > 2 + dns.MESSAGE_MAX_BYTES:
                        return
            except (OSError, TimeoutError):
                return


def _answer_from(ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Send from the address that was asked: a resolver that answers from elsewhere is not believed."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
            # struct in_pktinfo: interface, local address, header destination. The answer's source is the second.
            return [(level, kind, struct.pack("=I4s4s", 0, data[8:12], bytes(4)))]
        if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            return [(level, kind, data[:16] + struct.pack("=I", 0))]
    return []
