"""Moves the bytes of one connection between its two sockets, both ways, and counts them. No threads, no copies kept.

Each direction reads only when everything before has been passed on, so a slow reader slows its writer and nothing
piles up here. An end of file is passed on as a half-close once all before it is out; a reset of either side resets the
other. Source: tcp(7), shutdown(2), socket(7) on SO_LINGER.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

from sandbox.egress.budget import DOWN, UP, Meter, used_up
from sandbox.egress.guess import FIRST_BYTES

# A wake-up and two system calls cost the same for much as for little: with 1 MiB a gigabyte takes a quarter less
# processor time than with 256 KiB.
CHUNK_BYTES: Final = 1 << 20
# What slow readers make us keep, over all flows, until reads become small ones.
KEPT_MAX_BYTES: Final = 64 << 20
SMALL_CHUNK_BYTES: Final = 64 * 1024
_RESET: Final = struct.pack("ii", 1, 0)


def reset(sock: socket.socket) -> None:
    """Close with a reset, at once: what is unsent is dropped, the other side gets ECONNRESET."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


class Half:
    """One direction. `pending` is what was read and the other side could not take yet: one chunk at most."""

    __slots__ = ("direction", "finished", "first", "from_fd", "from_sock", "pending", "to_fd", "to_sock")

    def __init__(self, direction: str, from_sock: socket.socket, to_sock: socket.socket) -> None:
        self.direction = direction
        self.from_sock = from_sock
        self.to_sock = to_sock
        # The loop is given numbers: for an object it does not know yet, it would make its whole repr first.
        self.from_fd = from_sock.fileno()
        self.to_fd = to_sock.fileno()
        self.pending = b""
        self.finished = False
        self.first = b""


class Pump:
    """Both directions of one flow. `done` gets (reason, detail) of its end, ("", "") when both sides have ended."""

    # One buffer for all: its bytes are passed on, or copied to `pending`, before anything else runs in this thread.
    _buffer: Final = memoryview(bytearray(CHUNK_BYTES))
    _kept_bytes = 0

    def __init__(self, front: socket.socket, back: socket.socket, meters: Sequence[Meter]) -> None:
        self._loop = asyncio.get_running_loop()
        self._meters = meters
        self._rated = tuple(meter for meter in meters if meter.has_rate)
        self._chunk = min((CHUNK_BYTES, *(meter.chunk_bytes for meter in self._rated)))
        self._front, self._back = front, back
        self.up = Half(UP, front, back)
        self.down = Half(DOWN, back, front)
        self.done: asyncio.Future[tuple[str, str]] = self._loop.create_future()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self, early: bytes = b"") -> None:
        """Begin. `early`: bytes from the front that were read, and accounted for, before."""
        for half in (self.up, self.down):
            half.to_sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(self.down.from_fd, self._on_readable, self.down)
        if early:
            self.up.first = early[:FIRST_BYTES]
            self._keep(self.up, early)
            self._loop.add_writer(self.up.to_fd, self._on_writable, self.up)
        else:
            self._loop.add_reader(self.up.from_fd, self._on_readable, self.up)
            # The call has usually said something by now, as it was connected before we were.
            self._on_readable(self.up)

    def end(self, reason: str, detail: str = "") -> None:
        """Stop both ways and reset both sides; the first reason counts."""
        if self.done.done():
            return
        self._forget()
        reset(self._front)
        if self.up.finished:
            # All that was sent, and its end, are with the kernel: a reset would take back what is not yet delivered.
            self._back.close()
        else:
            reset(self._back)
        self.done.set_result((reason, detail))

    def _forget(self) -> None:
        self._keep(self.up, b"")
        self._keep(self.down, b"")
        for fd in (self.up.from_fd, self.down.from_fd):
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()

    def _on_readable(self, half: Half) -> None:
        room = self._chunk if Pump._kept_bytes < KEPT_MAX_BYTES else min(self._chunk, SMALL_CHUNK_BYTES)
        for meter in self._meters:
            room = min(room, meter.left(half.direction))
        if room <= 0:
            self._at_the_limit(half)
            return
        if self._rated and self._is_throttled(half):
            return
        try:
            count = half.from_sock.recv_into(self._buffer, room)
        except BlockingIOError:
            return
        except OSError as error:
            self.end("reset", error.strerror or "")
            return
        if count == 0:
            self._at_end(half)
            return
        chunk = self._buffer[:count]
        for meter in self._meters:
            meter.spend(half.direction, count)
        if not half.first:
            half.first = bytes(chunk[:FIRST_BYTES])
        sent = self._send(half, chunk)
        if 0 <= sent < count:
            self._keep(half, bytes(chunk[sent:]))
            self._loop.remove_reader(half.from_fd)
            self._loop.add_writer(half.to_fd, self._on_writable, half)

    def _on_writable(self, half: Half) -> None:
        sent = self._send(half, half.pending)
        if sent < 0:
            return
        self._keep(half, half.pending[sent:])
        if not half.pending:
            self._loop.remove_writer(half.to_fd)
            self._loop.add_reader(half.from_fd, self._on_readable, half)

    @staticmethod
    def _keep(half: Half, rest: bytes) -> None:
        Pump._kept_bytes += len(rest) - len(half.pending)
        half.pending = rest

    def _send(self, half: Half, chunk: bytes | memoryview) -> int:
        """How much was taken; -1 when the flow has ended over it."""
        try:
            return half.to_sock.send(chunk)
        except BlockingIOError:
            return 0
        except OSError as error:
            self.end("reset", error.strerror or "")
            return -1

    def _at_the_limit(self, half: Half) -> None:
        """The budget is spent: an end of file may still pass, one more byte ends the flow."""
        try:
            is_end = not half.from_sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return
        except OSError as error:
            self.end("reset", error.strerror or "")
            return
        if is_end:
            self._at_end(half)
        else:
            self.end("budget", used_up(self._meters, half.direction))

    def _is_throttled(self, half: Half) -> bool:
        now = time.monotonic()
        wait_s = max(meter.wait_s(now) for meter in self._rated)
        if wait_s <= 0:
            return False
        self._loop.remove_reader(half.from_fd)
        self._timers[half.direction] = self._loop.call_later(wait_s, self._resume, half)
        return True

    def _resume(self, half: Half) -> None:
        del self._timers[half.direction]
        self._loop.add_reader(half.from_fd, self._on_readable, half)

    def _at_end(self, half: Half) -> None:
        """Everything of this direction is out: say so to the other side, and end when both directions are."""
        self._loop.remove_reader(half.from_fd)
        half.finished = True
        try:
            half.to_sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.end("reset", error.strerror or "")
            return
        if self.up.finished and self.down.finished:
            self._forget()
            self._front.close()
            self._back.close()
            self.done.set_result(("", ""))
