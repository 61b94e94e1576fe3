"""The server name in a TLS ClientHello, read by OpenSSL itself through memory buffers: no parser of ours.

The handshake is never carried out: OpenSSL is fed what the client said until it has asked for the name, and stopped
there. It reads hellos that come in pieces, over several records. Source: ssl, "Memory BIO Support".
"""

from __future__ import annotations

import ssl
import sys
from typing import Any, NamedTuple

# OpenSSL takes hellos up to 128 KiB; honest ones have 200 bytes to 4 KiB, also with post-quantum key shares.
HELLO_MAX_BYTES = 64 * 1024


class Hello(NamedTuple):
    """A ClientHello that was read to its end. `name` as the client wrote it, None when it gave none."""

    name: str | None


class NotTls(Exception):
    """The bytes are no TLS that OpenSSL here would answer: `str()` says what it said."""


class HelloReader:
    """Feed it what came; it answers with the hello as soon as that is complete."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._ssl: Any = context.wrap_bio(self._incoming, ssl.MemoryBIO(), server_side=True)
        self._fed = 0

    def feed(self, data: bytes) -> Hello | None:
        """None: more is needed. Raises NotTls."""
        self._fed += len(data)
        if self._fed > HELLO_MAX_BYTES:
            raise NotTls(f"the ClientHello is longer than {HELLO_MAX_BYTES} bytes")
        self._incoming.write(data)
        try:
            self._ssl.do_handshake()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as error:
            found: Hello | None = getattr(self._ssl, "hello", None)
            if found is not None:
                return found
            raise NotTls(f"{error.reason or error}") from None
        raise NotTls("the handshake ended by itself")  # unreachable: the context has no certificate


def hello_context() -> ssl.SSLContext:
    """A context that reads names and answers every handshake with an alert that nobody sees."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    def on_name(ssl_object: Any, name: str | None, _context: ssl.SSLContext) -> int:
        ssl_object.hello = Hello(name)
        return ssl.ALERT_DESCRIPTION_HANDSHAKE_FAILURE

    # The type stubs know only of callbacks that may return None.
    context.sni_callback = on_name
    return context


def quiet_about_names() -> None:
    """Say nothing on standard error about server names that are no ASCII: the call chooses them, and how many.

    The ssl module cannot hand such a name to the callback; it refuses the handshake and reports past every `except`.
    """
    usual = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, UnicodeDecodeError):
            usual(unraisable)

    sys.unraisablehook = hook
