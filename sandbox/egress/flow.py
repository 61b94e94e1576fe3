"""One connection of a call, from the accept to its line in the journal.

A flow has a verdict before anything else happens. A refused one is reset. An allowed one is given to the handler of
its rule's protocol (see `handlers`), which may look at the first bytes, dials when it has seen enough, and relays.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from typing import TYPE_CHECKING, Final

from sandbox.egress.addresses import Address
from sandbox.egress.budget import UP, Meter, used_up
from sandbox.egress.dial import dial
from sandbox.egress.guess import FIRST_BYTES, guess
from sandbox.egress.journal import Attempt
from sandbox.egress.pump import Pump, reset
from sandbox.egress.resolver import LookupFailed
from sandbox.egress.rules import CLOSED, DENIED, Verdict

if TYPE_CHECKING:
    from sandbox.egress.session import Session

# A refused connection is reset at once, but for the first of its kind: a moment in which its first bytes may tell what
# it was going to be.
GUESS_S: Final = 0.03
GUESSING_MAX: Final = 32


class Refused(Exception):
    """The flow must not go on: `reason` is a word of the journal, `detail` adds to it. `is_denial`: by the rules."""

    def __init__(
        self, reason: str, detail: str = "", *, is_denial: bool = True, verdict: Verdict | None = None
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.is_denial = is_denial
        self.verdict = verdict


class Flow:
    """One accepted connection. `name` is empty when the call connected to a literal address."""

    def __init__(self, session: Session, front: socket.socket, address: Address, port: int) -> None:
        self.session = session
        self.front = front
        self.address = address
        self.port = port
        self.name = session.names.name_of(address) or ""
        self.verdict = Verdict(False)
        self.sni = ""
        self.proto = ""
        self.meter = Meter(session.flow_limits)
        self.meters: tuple[Meter, ...] = (self.meter, session.meter)
        self.resolved: Address | None = None
        self.is_dialled = False
        self.pump: Pump | None = None
        self.idle_since = self.started = time.monotonic()
        self._t = session.now()
        self._seen = 0
        self._cut: tuple[str, str] | None = None
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Flow {self.host}:{self.port} {self.verdict.rule or '-'} up={self.meter.up} down={self.meter.down}>"

    @property
    def host(self) -> str:
        return self.name or str(self.address)

    # -- what a handler uses -----------------------------------------------------------------------------------

    async def read_early(self, timeout_s: float, max_bytes: int = 16384) -> bytes:
        """The next bytes of the call's, within the budgets; empty at its end. Raises TimeoutError, OSError, Refused."""
        room = min(max_bytes, *(meter.left(UP) for meter in self.meters))
        if room <= 0:
            raise Refused("budget", used_up(self.meters, UP))
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            data = await loop.sock_recv(self.front, room)
        for meter in self.meters:
            meter.spend(UP, len(data))
        return data

    def note_first(self, data: bytes) -> None:
        """What a handler read before it refused, for the journal's guess."""
        self.proto = guess(data)

    async def dial(self) -> socket.socket:
        """Connect to an address of the flow's host that was judged and found open. Raises Refused."""
        addresses = await self._judged_addresses()
        self.resolved = addresses[0]
        try:
            back, self.resolved = await dial(addresses, self.port)
        except TimeoutError:
            raise Refused("connect_failed", "timed out", is_denial=False) from None
        except OSError as error:
            raise Refused("connect_failed", error.strerror or str(error), is_denial=False) from None
        self.is_dialled = True
        return back

    async def relay(self, back: socket.socket, early: bytes = b"") -> None:
        """Move bytes both ways until both sides have ended. Raises Refused when the flow was cut."""
        if self._cut is not None:
            reset(back)
            raise Refused(*self._cut)
        self.pump = Pump(self.front, back, self.meters)
        self.pump.start(early)
        reason, detail = await self.pump.done
        if reason:
            raise Refused(reason, detail, is_denial=reason not in ("reset", "call_ended"))

    # -- its life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def cut(self, reason: str, detail: str = "") -> None:
        """End the flow from outside: a budget, or the end of the call."""
        if self._cut is None:
            self._cut = (reason, detail)
        if self.pump is not None:
            self.pump.end(reason, detail)
        elif self._task is not None:
            self._task.cancel()

    @property
    def is_sent(self) -> bool:
        """Whether everything that the call has said is on its way."""
        if self.pump is not None and self.pump.up.finished:
            return True
        return self._task is None or self._task.done()

    async def wait_closed(self) -> None:
        if self._task is not None:
            await asyncio.wait([self._task])

    def idle_s(self, now: float) -> float:
        """How long nothing has moved, in seconds. Asked once a second, so that moving bytes costs nothing for it."""
        moved = self.meter.up + self.meter.down
        if moved != self._seen:
            self._seen = moved
            self.idle_since = now
        return now - self.idle_since

    async def _run(self) -> None:
        try:
            self._judge()
            await self.session.handle(self)
        except Refused as refused:
            await self._refuse(refused)
        except asyncio.CancelledError:
            await self._refuse(Refused(*(self._cut or ("call_ended", "")), is_denial=self._is_cut_by_budget()))
        except OSError as error:
            await self._refuse(Refused("reset", error.strerror or "", is_denial=False))
        except BaseException:
            # A bug of ours: the flow ends closed and on record, and the traceback goes where the gateway's errors go.
            await self._refuse(Refused("internal_error"))
            raise
        else:
            self._log("allow", "", "")
        finally:
            self.front.close()
            self.session.forget(self)

    def _is_cut_by_budget(self) -> bool:
        return self._cut is not None and self._cut[0] == "budget"

    def _judge(self) -> None:
        """The verdict, by name where DNS gave the address out, else by the address itself. Raises Refused."""
        session = self.session
        if self.name:
            self.verdict = session.rules.judge_name(self.name, self.port)
        elif self.address.is_loopback:
            raise Refused("loopback_of_gateway")
        elif session.is_synthetic(self.address):
            raise Refused("unknown_synthetic")
        else:
            self.verdict = session.rules.judge_address(self.address, self.port, session.own_addresses())
        if not self.verdict.allowed:
            raise Refused(self.verdict.reason, self.verdict.detail)
        if session.is_cut:
            raise Refused("call_ended", is_denial=False)
        self.meters = (self.meter, session.meter, *session.admit(self))

    async def _judged_addresses(self) -> tuple[Address, ...]:
        if not self.name:
            return (self.address,)
        session = self.session
        try:
            addresses = session.resolver.kept(self.name) or await session.lookup(self.name)
        except LookupFailed as error:
            raise Refused("resolve_failed", str(error), is_denial=False) from None
        own = session.own_addresses()
        verdicts = [session.rules.judge_resolved(found, self.port, own, self.verdict) for found in addresses]
        open_ones = tuple(found for found, verdict in zip(addresses, verdicts, strict=True) if verdict.allowed)
        if not open_ones:
            self.resolved = addresses[0]
            reason = DENIED if verdicts[0].reason == DENIED else CLOSED
            raise Refused(reason, verdicts[0].detail, verdict=verdicts[0])
        return open_ones

    async def _refuse(self, refused: Refused) -> None:
        if refused.verdict is not None:
            self.verdict = refused.verdict
        session = self.session
        is_new = refused.is_denial and session.journal.is_new_denial(self.host, self.port, refused.reason)
        if self.pump is None and self.meter.up == 0 and is_new and session.guessing < GUESSING_MAX:
            session.guessing += 1
            try:
                await self._look_at_first_bytes()
            finally:
                session.guessing -= 1
        reset(self.front)
        self._log("deny" if refused.is_denial else "allow", refused.reason, refused.detail)

    async def _look_at_first_bytes(self) -> None:
        loop = asyncio.get_running_loop()
        # Cancelled when the call ends meanwhile: the attempt is still put on record.
        with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(GUESS_S):
                self.proto = guess(await loop.sock_recv(self.front, FIRST_BYTES))

    def _log(self, decision: str, reason: str, detail: str) -> None:
        if not self.proto and self.pump is not None:
            self.proto = guess(self.pump.up.first) or guess(self.pump.down.first)
        attempt = Attempt(
            t=self._t,
            transport="tcp",
            proto=self.proto,
            host=self.host,
            port=self.port,
            decision=decision,
            rule=self.verdict.rule,
            reason=reason,
            detail=detail,
            sni=self.sni,
            resolved_ip=str(self.resolved or ("" if self.name else self.address)),
            # What was read to be looked at and went nowhere is no byte that left.
            bytes_out=self.meter.up if self.is_dialled else 0,
            bytes_in=self.meter.down,
            duration_s=round(time.monotonic() - self.started, 6),
        )
        self.session.ended(attempt)
