"""The server's side of a flow that is read: connect, verify, and speak HTTP/1.1 with it by h11."""

from __future__ import annotations

import hashlib
import socket
import ssl
from typing import Final

import h11

from sandbox._linux import roots
from sandbox.egress.flow import Flow, Refused
from sandbox.egress.pump import reset
from sandbox.egress.streams import Plain, Stream, Tls

HEAD_MAX_BYTES: Final = 64 * 1024
HANDSHAKE_TIMEOUT_S: Final = 10.0
CERTIFICATE: Final = "upstream_certificate"
FAILED: Final = "upstream_failed"


class UpstreamFailed(Exception):
    """The server broke off or speaks no HTTP. What it said is not repeated: it may hold what the gateway added."""


class Upstream:
    """One connection to a server."""

    def __init__(self, sock: socket.socket, stream: Stream) -> None:
        self._sock = sock
        self.stream = stream
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_MAX_BYTES)

    @classmethod
    async def connect(cls, flow: Flow, context: ssl.SSLContext | None) -> Upstream:
        """Dial, and begin TLS where there is a `context`. Raises Refused."""
        sock = await flow.dial()
        try:
            stream: Stream = Plain(sock)
            if context is not None:
                stream = Tls(stream, context, server_name=flow.host)
                await _begin_tls(stream)
        except BaseException:
            reset(sock)
            raise
        return cls(sock, stream)

    @property
    def is_stale(self) -> bool:
        """Whether the server has closed, or said something that nobody asked for, between two requests."""
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    @property
    def early(self) -> bytes:
        """What came behind the head of an upgrade's answer."""
        return self._http.trailing_data[0]

    async def send(self, event: h11.Request | h11.Data | h11.EndOfMessage) -> None:
        """Raises UpstreamFailed."""
        try:
            await self.stream.send(self._http.send(event))
        except OSError as error:
            raise UpstreamFailed(error.strerror or "it broke off") from None

    async def wait(self) -> None:
        """Read on. Raises UpstreamFailed."""
        try:
            self._http.receive_data(await self.stream.recv())
        except OSError as error:
            raise UpstreamFailed(error.strerror or "it broke off") from None

    def event(self) -> h11.Event | None:
        """What the server says next, None when that is not here yet. Raises UpstreamFailed, also at an early end."""
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError:
            raise UpstreamFailed("it is not HTTP/1.1, or breaks off") from None
        if event is h11.NEED_DATA:
            return None
        if isinstance(event, h11.Response) and {name for name, _ in event.headers}.issuperset(_TWO_LENGTHS):
            raise UpstreamFailed("an answer with two lengths")
        if not isinstance(event, h11.Event) or isinstance(event, h11.ConnectionClosed):
            raise UpstreamFailed("it closed without an answer")
        return event

    def next(self) -> bool:
        """Get ready for another request; False when this connection is used up."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def close(self) -> None:
        reset(self._sock)


_TWO_LENGTHS: Final = frozenset((b"content-length", b"transfer-encoding"))


async def _begin_tls(stream: Tls) -> None:
    try:
        await stream.handshake(HANDSHAKE_TIMEOUT_S)
    except TimeoutError:
        raise Refused(FAILED, f"no TLS handshake in {HANDSHAKE_TIMEOUT_S:g} s", is_denial=False) from None
    except ssl.SSLCertVerificationError as error:
        raise Refused(CERTIFICATE, error.verify_message.rstrip("."), is_denial=False) from None
    except ssl.SSLError as error:
        raise Refused(FAILED, f"TLS: {error.reason or 'it broke off'}", is_denial=False) from None
    except OSError as error:
        raise Refused(FAILED, error.strerror or "it broke off", is_denial=False) from None


class Contexts:
    """TLS to servers: the system's authorities and those of the manifest, TLS 1.2 or later, HTTP/1.1."""

    def __init__(self) -> None:
        self._made: dict[str, ssl.SSLContext] = {}

    def get(self, extra_roots: str) -> ssl.SSLContext:
        """`extra_roots`: certificates in PEM. Raises ssl.SSLError for what is none."""
        key = hashlib.sha256(extra_roots.encode()).hexdigest()
        context = self._made.get(key)
        if context is None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["http/1.1"])
            if path := roots.system_file():
                context.load_verify_locations(path)
            else:
                context.load_default_certs()
            if extra_roots:
                context.load_verify_locations(cadata=extra_roots)
            self._made[key] = context
        return context
