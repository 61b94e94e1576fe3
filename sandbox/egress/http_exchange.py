"""The requests of one connection, one after another: read, judge, carry or refuse, and note each in the journal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final

import h11

from sandbox.egress.explain import denial
from sandbox.egress.flow import Flow, Refused
from sandbox.egress.http_request import FRAMING, MALFORMED, Judged, Place, judge, without_hop_headers
from sandbox.egress.http_upstream import CERTIFICATE, FAILED, HEAD_MAX_BYTES, Upstream, UpstreamFailed
from sandbox.egress.journal import Attempt
from sandbox.egress.streams import CHUNK_BYTES, Stream
from sandbox.http_rules import Group

HEAD_TIMEOUT_S: Final = 30.0
# How long a call may take to read an answer after which we close: a reset would take the answer away from it.
LINGER_S: Final = 2.0
_BAD_FORM: Final = frozenset((MALFORMED, FRAMING))


class BodyBroken(Exception):
    """The call's own request breaks off, or is no HTTP any more, within its body."""


class Exchanges:
    """All that passes between one connection of the call and its server."""

    def __init__(self, flow: Flow, group: Group, front: Stream, place: Place, context: ssl.SSLContext | None) -> None:
        self._flow = flow
        self._session = flow.session
        self._group = group
        self._front = front
        self._place = place
        self._context = context
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
        self._upstream: Upstream | None = None
        self._up = flow.meter.up
        self._begin()

    def close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
            self._upstream = None

    async def serve(self, early: bytes) -> None:
        """Until the call has no more requests, or a connection has to end. Raises Refused, OSError."""
        if early:
            self._up -= len(early)
            self._http.receive_data(early)
        while True:
            try:
                request, head = await self._next_request()
            except h11.RemoteProtocolError as error:
                await self._refuse(self._unread(error))
                await self._part()
                return
            if request is None:
                await self._front.finish()
                return
            judged = judge(request, head, self._place, self._group, self._session.http.secrets)
            if judged.onward is None:
                await self._refuse(judged)
            else:
                await self._carry(judged)
            if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
                await self._part()
                return
            self._http.start_next_cycle()

    # -- reading -------------------------------------------------------------------------------------------------

    async def _next_request(self) -> tuple[h11.Request | None, bytes]:
        """The next request and the bytes it was read from; None at the end. Raises h11.RemoteProtocolError."""
        seen = self._http.trailing_data[0]
        deadline: float | None = None
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if seen and deadline is None:
                deadline = time.monotonic() + HEAD_TIMEOUT_S
            try:
                async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    data = await self._front.recv()
            except TimeoutError:
                raise Refused("head_timeout", f"{HEAD_TIMEOUT_S:g} s") from None
            seen += data
            self._http.receive_data(data)
        if not isinstance(event, h11.Request):
            return None, b""
        self._begin()
        return event, seen[: len(seen) - len(self._http.trailing_data[0])]

    async def _body_event(self) -> h11.Event | type:
        """What comes next of the request's body. Raises BodyBroken."""
        try:
            while (event := self._http.next_event()) is h11.NEED_DATA:
                self._http.receive_data(await self._front.recv())
        except h11.RemoteProtocolError as error:
            raise BodyBroken(str(error)[:100]) from None
        return event

    # -- refusing ------------------------------------------------------------------------------------------------

    def _unread(self, error: h11.RemoteProtocolError) -> Judged:
        """What came is no request; h11 says why, in the call's own words, so that is cut short."""
        text = str(error)[:100]
        reason = FRAMING if "content-length" in text.lower() or "transfer-encoding" in text.lower() else MALFORMED
        return Judged("", "", None, str(self._group.host), reason, text)

    async def _refuse(self, judged: Judged) -> None:
        """Answer in the server's place. A body that is on its way would be read as the next request: then we close."""
        has_body = judged.reason in _BAD_FORM or not isinstance(self._http.next_event(), h11.EndOfMessage)
        await self._say(400 if judged.reason in _BAD_FORM else 403, judged, close=has_body)

    async def _say(self, status: int, judged: Judged, *, close: bool = True, is_denial: bool = True) -> None:
        """Note a request that was not carried, and answer it where HTTP still permits an answer."""
        attempt = self._note(judged, status, "deny" if is_denial else "allow")
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        text = denial(attempt, self._session.http.permitted(self._flow.host))
        body = json.dumps({"error": "refused by the sandbox", "reason": judged.reason, "message": text}) + "\n"
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        headers += [("Connection", "close")] if close else []
        data = self._http.send(h11.Response(status_code=status, headers=headers, reason=b"Refused by the sandbox"))
        if judged.method != "HEAD":
            data += self._http.send(h11.Data(data=body.encode()))
        await self._front.send(data + self._http.send(h11.EndOfMessage()))

    async def _part(self) -> None:
        """Let the call read what was said before its connection goes."""
        await self._front.finish()
        with contextlib.suppress(TimeoutError, OSError, Refused):
            async with asyncio.timeout(LINGER_S):
                while await self._front.recv():
                    continue

    # -- carrying ------------------------------------------------------------------------------------------------

    async def _carry(self, judged: Judged) -> None:
        """Send one permitted request on, and its answer back."""
        status = [0]
        try:
            upstream = await self._connected()
            assert judged.onward is not None
            await upstream.send(judged.onward)
            await self._both_ways(upstream, status)
        except Refused as refused:
            failed = judged._replace(onward=None, reason=refused.reason, detail=refused.detail)
            # A certificate is refused to the request; whatever else is refused here, is to the connection.
            is_denial = refused.reason == CERTIFICATE
            if self._http.our_state is h11.SEND_RESPONSE and refused.reason != "budget":
                await self._say(403 if refused.is_denial or is_denial else 502, failed, is_denial=is_denial)
                await self._part()
            else:
                self._note(failed, status[0], "allow")
            raise
        except BodyBroken as broken:
            await self._say(400, judged._replace(onward=None, reason=MALFORMED, detail=str(broken)))
            await self._part()
            raise Refused(MALFORMED, "in a request's body") from None
        except (OSError, asyncio.CancelledError):
            self._note(judged._replace(reason="cut"), status[0], "allow")
            raise
        self._note(judged, status[0], "allow")
        if self._upstream is not None and not self._upstream.next():
            self.close()

    async def _connected(self) -> Upstream:
        if self._upstream is not None and self._upstream.is_stale:
            self.close()
        if self._upstream is None:
            self._upstream = await Upstream.connect(self._flow, self._context)
        return self._upstream

    async def _both_ways(self, upstream: Upstream, status: list[int]) -> None:
        """The request's body and the answer, at the same time; the answer's end is the end of both."""
        try:
            event = self._http.next_event()
            if isinstance(event, h11.EndOfMessage):
                await upstream.send(h11.EndOfMessage())
                await self._return(upstream, status)
            else:
                await _until_first(self._return(upstream, status), self._send_body(upstream, event))
        except h11.RemoteProtocolError as error:
            raise BodyBroken(str(error)[:100]) from None
        except UpstreamFailed as failed:
            raise Refused(FAILED, str(failed), is_denial=False) from None

    async def _send_body(self, upstream: Upstream, event: Any) -> None:
        """Raises BodyBroken. A server that takes no more may still answer, so that is no error here."""
        with contextlib.suppress(UpstreamFailed):
            while True:
                if isinstance(event, h11.Data):
                    await upstream.send(h11.Data(data=event.data))
                elif isinstance(event, h11.EndOfMessage):
                    # Trailers end here: some servers merge them into the headers, where they were not looked at.
                    await upstream.send(h11.EndOfMessage())
                    return
                elif event is not h11.NEED_DATA:
                    raise BodyBroken("the request breaks off")
                event = await self._body_event()

    async def _return(self, upstream: Upstream, status: list[int]) -> None:
        """The server's answer to the call: what is here goes on at once, in one piece. Raises UpstreamFailed."""
        here = bytearray()
        while True:
            event = upstream.event()
            if event is None or len(here) > CHUNK_BYTES:
                await self._front.send(here)
                here = bytearray()
            if event is None:
                await upstream.wait()
            elif isinstance(event, h11.Data):
                here += self._http.send(h11.Data(data=event.data))
            elif isinstance(event, h11.EndOfMessage):
                await self._front.send(here + self._http.send(h11.EndOfMessage()))
                return
            elif isinstance(event, h11.Response):
                status[0] = event.status_code
                here += self._http.send(_onward(event, close=self._http.they_are_waiting_for_100_continue))
            elif isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                status[0] = 101
                await self._front.send(here)
                await self._switch(upstream, event)
                return
            elif self._http.their_http_version != b"1.0":
                here += self._http.send(_onward(event))

    async def _switch(self, upstream: Upstream, event: h11.InformationalResponse) -> None:
        """A WebSocket from here on: bytes both ways."""
        headers = [*without_hop_headers(event.headers.raw_items()), (b"Connection", b"Upgrade")]
        answer = h11.InformationalResponse(
            status_code=101, headers=[*headers, (b"Upgrade", b"websocket")], reason=event.reason
        )
        await self._front.send(self._http.send(answer))
        up, down = self._http.trailing_data[0], upstream.early
        await _until_all(
            _move(self._front, upstream.stream, up),
            _move(upstream.stream, self._front, down),
        )

    # -- the journal ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._t = self._session.now()
        self._started = time.monotonic()
        self._down = self._flow.meter.down

    def _note(self, judged: Judged, status: int, decision: str) -> Attempt:
        """One line for a request. Its bytes are those that left for the server, as the call sent them."""
        up, self._up = self._up, self._flow.meter.up
        hide = self._session.http.hide
        attempt = Attempt(
            t=self._t,
            transport="http",
            proto=self._place.scheme,
            host=self._flow.host,
            port=self._flow.port,
            decision=decision,
            rule=judged.rule,
            reason=judged.reason,
            detail=hide(judged.detail),
            resolved_ip=str(self._flow.resolved or ""),
            bytes_out=self._up - up if judged.onward is not None else 0,
            bytes_in=self._flow.meter.down - self._down,
            duration_s=round(time.monotonic() - self._started, 6),
            method=hide(judged.method),
            path=hide(judged.asked),
            status=status,
        )
        self._session.journal.add(attempt)
        return attempt


def _onward(event: Any, *, close: bool = False) -> Any:
    """The server's head without what concerns its own connection. Its `reason` may hold anything, also nothing."""
    headers = without_hop_headers(event.headers.raw_items())
    if close:
        headers.append((b"Connection", b"close"))
    return type(event)(status_code=event.status_code, headers=headers, reason=event.reason)


async def _move(source: Stream, sink: Stream, first: bytes) -> None:
    if first:
        await sink.send(first)
    while data := await source.recv():
        await sink.send(data)
    await sink.finish()


async def _until_first(main: Coroutine[Any, Any, None], beside: Coroutine[Any, Any, None]) -> None:
    """Run both until `main` ends; whichever fails fails both."""
    tasks = [asyncio.ensure_future(main), asyncio.ensure_future(beside)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            tasks[1].result()
            await asyncio.wait(tasks[:1])
        tasks[0].result()
    finally:
        await _cancel(tasks)


async def _until_all(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run all to their ends; whichever fails fails all."""
    tasks = [asyncio.ensure_future(one) for one in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await _cancel(tasks)


async def _cancel(tasks: Sequence[asyncio.Future[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: the first failure is the one that counts
