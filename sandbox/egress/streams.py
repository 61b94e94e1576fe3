"""The two ends of a flow that is read and not only relayed: bytes in and out, within the budgets, inside TLS or not.

What counts against budgets is what crosses the call's own socket. TLS is OpenSSL's, over memory buffers. One task may
read while another writes. Every wait can be cancelled, after which the stream is good for closing only.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Final, Protocol

from sandbox.egress.budget import DOWN, UP, Meter, used_up
from sandbox.egress.flow import Refused

CHUNK_BYTES: Final = 128 * 1024


class Stream(Protocol):
    """Bytes both ways. `finish`: no more from here; `recv` then still gives what the other side has to say."""

    async def recv(self) -> bytes: ...
    async def send(self, data: bytes | bytearray | memoryview) -> None: ...
    async def finish(self) -> None: ...


class Plain:
    """A socket without budgets: the server's side."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def recv(self) -> bytes:
        return await self._loop.sock_recv(self._sock, CHUNK_BYTES)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await self._loop.sock_sendall(self._sock, data)

    async def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)


class Metered:
    """The call's side: what is read is upload, what is written download. Raises Refused at the end of a budget.

    Budgets are asked and spent in one go with the read or write that they are for, so that they stay exact.
    """

    def __init__(self, sock: socket.socket, meters: Sequence[Meter]) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._meters = meters
        self._rated = tuple(meter for meter in meters if meter.has_rate)
        self._chunk = min((CHUNK_BYTES, *(meter.chunk_bytes for meter in self._rated)))
        self._loop = asyncio.get_running_loop()

    async def recv(self) -> bytes:
        while True:
            await self._throttle()
            room = min(self._chunk, *(meter.left(UP) for meter in self._meters))
            try:
                # With the budget spent, an end of file may still come; one more byte ends the flow.
                data = self._sock.recv(room) if room > 0 else self._sock.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                await self._ready(reading=True)
                continue
            if data and room <= 0:
                raise Refused("budget", used_up(self._meters, UP))
            for meter in self._meters:
                meter.spend(UP, len(data))
            return data

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            await self._throttle()
            room = min(self._chunk, *(meter.left(DOWN) for meter in self._meters))
            if room <= 0:
                raise Refused("budget", used_up(self._meters, DOWN))
            try:
                sent = self._sock.send(rest[:room])
            except BlockingIOError:
                await self._ready(reading=False)
                continue
            for meter in self._meters:
                meter.spend(DOWN, sent)
            rest = rest[sent:]

    async def finish(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def _throttle(self) -> None:
        while self._rated and (wait_s := max(meter.wait_s(time.monotonic()) for meter in self._rated)) > 0:
            await asyncio.sleep(wait_s)

    async def _ready(self, *, reading: bool) -> None:
        ready = self._loop.create_future()
        add, remove = (
            (self._loop.add_reader, self._loop.remove_reader)
            if reading
            else (self._loop.add_writer, self._loop.remove_writer)
        )
        add(self._sock, lambda: None if ready.done() else ready.set_result(None))
        try:
            await ready
        finally:
            remove(self._sock)


class Tls:
    """TLS over another stream. `early`: bytes that were read from it before."""

    def __init__(
        self, raw: Stream, context: ssl.SSLContext, *, server_name: str | None = None, early: bytes = b""
    ) -> None:
        self._raw = raw
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._in.write(early)
        is_server = server_name is None
        self._ssl = context.wrap_bio(self._in, self._out, server_side=is_server, server_hostname=server_name)
        self._sending = asyncio.Lock()

    async def handshake(self, timeout_s: float) -> None:
        """Raises ssl.SSLError, OSError, TimeoutError. What OpenSSL wants to say is said first, alerts too."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    self._ssl.do_handshake()
                except ssl.SSLWantReadError:
                    await self._flush()
                    await self._more()
                except ssl.SSLError:
                    with contextlib.suppress(OSError):
                        await self._flush()
                    raise
                else:
                    await self._flush()
                    return

    async def recv(self) -> bytes:
        """Empty at the end, also where the other side has left without saying so: HTTP knows its own ends."""
        while True:
            try:
                return self._read_all()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._more()
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return b""

    def _read_all(self) -> bytes:
        """All records that are here, up to a chunk: one at a time they would be passed on in pieces of 16 KiB."""
        parts = [self._ssl.read(CHUNK_BYTES)]
        room = CHUNK_BYTES - len(parts[0])
        # Whatever ends it, the next read says so again.
        with contextlib.suppress(ssl.SSLError):
            while room > 0 and parts[-1]:
                parts.append(self._ssl.read(room))
                room -= len(parts[-1])
        return b"".join(parts)

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        async with self._sending:
            while rest:
                self._ssl.write(rest[:CHUNK_BYTES])
                rest = rest[CHUNK_BYTES:]
                await self._raw.send(self._out.read())

    async def finish(self) -> None:
        with contextlib.suppress(OSError):
            with contextlib.suppress(ssl.SSLWantReadError):
                self._ssl.unwrap()
            await self._flush()
        await self._raw.finish()

    async def _more(self) -> None:
        data = await self._raw.recv()
        if data:
            self._in.write(data)
        else:
            self._in.write_eof()

    async def _flush(self) -> None:
        if self._out.pending:
            async with self._sending:
                await self._raw.send(self._out.read())
