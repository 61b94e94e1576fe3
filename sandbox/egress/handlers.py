"""What is done with an allowed flow, by its rule's protocol.

A handler is a coroutine function of the flow. It may read the call's first bytes (`flow.read_early`), must refuse with
`Refused` what its protocol forbids, and connects (`flow.dial`) only when it has seen enough. The journal line, the
budgets, the reset and the closing are the flow's own.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from sandbox.destinations import normal_name
from sandbox.egress.flow import Flow, Refused
from sandbox.egress.hello import Hello, HelloReader, NotTls, hello_context

HELLO_TIMEOUT_S: Final = 10.0
Handler = Callable[[Flow], Awaitable[None]]


async def relay_tcp(flow: Flow) -> None:
    """Whatever it says."""
    await flow.relay(await flow.dial())


class TlsRelay:
    """TLS for the very host of the flow, by the name in the ClientHello; the rest of it is nobody's business here."""

    def __init__(self) -> None:
        self._context: ssl.SSLContext = hello_context()

    async def __call__(self, flow: Flow) -> None:
        early = await read_hello(flow, self._context)
        await flow.relay(await flow.dial(), early)


async def read_hello(flow: Flow, context: ssl.SSLContext, early: bytes = b"") -> bytes:
    """Read the ClientHello and check its name; returns the bytes that it came in. `early`: those read before."""
    reader = HelloReader(context)
    deadline = flow.started + HELLO_TIMEOUT_S
    data = early
    while True:
        try:
            hello = reader.feed(data) if data else None
        except NotTls as error:
            flow.note_first(early)
            raise Refused("not_tls", str(error)) from None
        if hello is not None:
            flow.proto = "tls"
            flow.sni = (hello.name or "")[:253]
            _check_name(flow, hello)
            return early
        try:
            data = await flow.read_early(max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Refused("hello_timeout", f"{HELLO_TIMEOUT_S:g} s") from None
        if not data:
            # Opened and closed without a word: a look at the port, which the rule allows.
            raise (
                Refused("not_tls", "it ended within the ClientHello") if early else Refused("no_data", is_denial=False)
            )
        early += data


def _check_name(flow: Flow, hello: Hello) -> None:
    """A literal address has no name to send (RFC 6066, 3); anything else must be the name that DNS gave out."""
    if not hello.name:
        if flow.name:
            raise Refused("sni_missing")
        return
    try:
        name = normal_name(hello.name)
    except ValueError:
        name = hello.name
    if name != flow.host:
        raise Refused("sni_mismatch", flow.sni)


def handlers() -> Mapping[str, Handler]:
    """One for each protocol that a rule can name."""
    return {"tcp": relay_tcp, "tls": TlsRelay()}
