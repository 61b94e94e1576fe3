"""A flow to a host with HTTP rules: requests are read, judged one by one, and written anew to the server. h11 reads.

Plain HTTP, or TLS that is ended here (see `authority`) and begun anew to the server, whose certificate is verified.
One request after another, also when the call sends several at once. Bodies stream both ways, a piece at a time, so
that the slower side sets the pace. A refused request is answered with why; the server hears nothing of it.

The server is connected to only when the first permitted request is there. Source: RFC 9110, RFC 9112.
"""

from __future__ import annotations

import ssl
import time
from typing import Final

from sandbox.egress.authority import Authority
from sandbox.egress.flow import Flow, Refused
from sandbox.egress.handlers import read_hello
from sandbox.egress.hello import hello_context
from sandbox.egress.http_exchange import HEAD_TIMEOUT_S, Exchanges
from sandbox.egress.http_request import Place
from sandbox.egress.http_upstream import HANDSHAKE_TIMEOUT_S, Contexts
from sandbox.egress.streams import Metered, Stream, Tls
from sandbox.http_rules import NOT_INSPECTED, Group

TLS_RECORD: Final = 0x16
TLS_REJECTED: Final = "tls_rejected"


class HttpRelay:
    """The handler of flows to hosts with HTTP rules."""

    def __init__(self) -> None:
        self.authority = Authority()
        self.contexts = Contexts()
        self.contexts.get("")
        self._hello = hello_context()

    async def __call__(self, flow: Flow) -> None:
        group = flow.session.http.group(flow.host)
        assert group is not None, "no rule governs this flow"
        early = b""
        is_tls = flow.verdict.protocol == "tls"
        if not is_tls:
            early = await _first_bytes(flow)
            is_tls = early[0] == TLS_RECORD
        front: Stream = Metered(flow.front, flow.meters)
        if is_tls:
            front, early = await self._end_tls(flow, group, front, early), b""
        flow.proto = "https" if is_tls else "http"
        place = Place(flow.host, flow.port, is_tls)
        exchanges = Exchanges(flow, group, front, place, self._context(flow) if is_tls else None)
        try:
            await exchanges.serve(early)
        except ssl.SSLError as error:
            # TLS 1.3 clients look at the certificate only after the handshake is over for us.
            raise Refused(TLS_REJECTED, error.reason or "", is_denial=False) from None
        finally:
            exchanges.close()

    def _context(self, flow: Flow) -> ssl.SSLContext:
        return self.contexts.get(flow.session.http.extra_roots)

    async def _end_tls(self, flow: Flow, group: Group, front: Stream, early: bytes) -> Tls:
        early = await read_hello(flow, self._hello, early)
        if not group.inspects:
            raise Refused(NOT_INSPECTED)
        tls = Tls(front, self.authority.context(flow.host), early=early)
        try:
            await tls.handshake(HANDSHAKE_TIMEOUT_S)
        except TimeoutError:
            raise Refused("hello_timeout", f"{HANDSHAKE_TIMEOUT_S:g} s") from None
        except ssl.SSLError as error:
            # Most often a program that does not look for authorities where everyone else does.
            raise Refused(TLS_REJECTED, error.reason or "", is_denial=False) from None
        return tls


async def _first_bytes(flow: Flow) -> bytes:
    try:
        early = await flow.read_early(max(0.0, flow.started + HEAD_TIMEOUT_S - time.monotonic()))
    except TimeoutError:
        raise Refused("no_data", f"{HEAD_TIMEOUT_S:g} s", is_denial=False) from None
    if not early:
        raise Refused("no_data", is_denial=False)
    return early
