"""Moving the tool's output, bounded: every byte is counted and digested, then kept or passed on.

What a tool prints is data: it is never parsed, and never reaches a terminal from here.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import os
from collections.abc import Callable

from sandbox.digests import Running, sha256

CHUNK_BYTES = 256 * 1024


@functools.cache
def _sha256_of_nothing() -> str:
    return sha256().hexdigest()


class Budget:
    """The bytes that all streams of one call may carry together."""

    def __init__(self, limit_bytes: int, on_exceeded: Callable[[], None]) -> None:
        self.left = limit_bytes
        self.exceeded = False
        self._on_exceeded = on_exceeded

    def take(self, data: bytes) -> bytes:
        """What of `data` still fits; the first byte too many ends the call."""
        if len(data) > self.left:
            data = data[: self.left]
            if not self.exceeded:
                self.exceeded = True
                self._on_exceeded()
        self.left -= len(data)
        return data


class OutputPump:
    """Reads one pipe of the jail until its end. Keeps the bytes, or passes them to `forward_fd` with back pressure.

    Owns both descriptors. `done` is set at end of file, or when `abandon` gives up on a pipe that stays open.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, budget: Budget, forward_fd: int = -1) -> None:
        self.kept = bytearray()
        self.total_bytes = 0
        self.truncated = False
        self.done = asyncio.Event()
        self.on_done: Callable[[], None] | None = None
        # Whether nothing can follow what came: then the end of the file, which comes later, is not waited for.
        self.is_whole: Callable[[bytearray], bool] | None = None
        # Made for the first byte: most streams never have one.
        self._digest: Running | None = None
        self._loop = loop
        self._fd = fd
        self._budget = budget
        self._forward_fd = forward_fd
        self._pending = b""
        os.set_blocking(fd, False)
        if forward_fd >= 0:
            os.set_blocking(forward_fd, False)
        loop.add_reader(fd, self._readable)

    @property
    def forwards(self) -> bool:
        return self._forward_fd >= 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest() if self._digest is not None else _sha256_of_nothing()

    def _readable(self) -> None:
        try:
            data = os.read(self._fd, CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            # A pseudo-terminal's master says EIO when the last slave is closed (pty(7)): that is its end of file.
            if error.errno != errno.EIO:
                raise
            data = b""
        if not data:
            self._end_of_input()
            return
        self.total_bytes += len(data)
        fits = self._budget.take(data)
        self.truncated |= len(fits) < len(data)
        if self._digest is None:
            self._digest = Running()
        self._digest.update(fits)
        if self._forward_fd < 0:
            self.kept += fits
            if self.is_whole is not None and self.is_whole(self.kept):
                self._close()
        elif fits:
            self._forward(fits)

    def _forward(self, data: bytes) -> None:
        try:
            data = data[os.write(self._forward_fd, data) :]
        except BlockingIOError:
            pass  # the reader is slow: wait below until its pipe has room
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EBADF):
                raise
            # Nobody reads any more. Closing our end lets the tool see a broken pipe, as in a shell pipeline.
            self._close()
            return
        if data:
            self._pending = data
            self._loop.remove_reader(self._fd)
            self._loop.add_writer(self._forward_fd, self._writable)

    def _writable(self) -> None:
        self._loop.remove_writer(self._forward_fd)
        data, self._pending = self._pending, b""
        self._loop.add_reader(self._fd, self._readable)
        self._forward(data)

    def _end_of_input(self) -> None:
        if not self._pending:
            self._close()

    def drain(self) -> bool:
        """Read what is there now; whether that was all. Precondition: all of the jail's processes are gone."""
        while not self.done.is_set() and not self._pending:
            before = self.total_bytes
            self._readable()
            if self.total_bytes == before:
                break
        return self.done.is_set()

    def abandon(self) -> None:
        """Stop reading; what came so far stands."""
        self._close()

    def _close(self) -> None:
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
        self._fd = -1
        if self._forward_fd >= 0:
            self._loop.remove_writer(self._forward_fd)
            os.close(self._forward_fd)
            self._forward_fd = -1
        self.done.set()
        if self.on_done is not None:
            self.on_done()


class InputPump:
    """Passes what the caller types to a pseudo-terminal's master. Owns the source, not the master."""

    def __init__(self, loop: asyncio.AbstractEventLoop, source_fd: int, master_fd: int) -> None:
        self._loop = loop
        self._source_fd = source_fd
        self._master_fd = master_fd
        self._pending = b""
        os.set_blocking(source_fd, False)
        loop.add_reader(source_fd, self._readable)

    def _readable(self) -> None:
        try:
            data = os.read(self._source_fd, 4096)
        except BlockingIOError:
            return
        if not data:
            # End of input at a terminal is its end-of-file character (termios(3)).
            data = b"\x04"
            self._loop.remove_reader(self._source_fd)
        self._pending += data
        self._flush()

    def _flush(self) -> None:
        try:
            self._pending = self._pending[os.write(self._master_fd, self._pending) :]
        except BlockingIOError:
            pass  # the terminal's input queue is full: try again when it has room
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self._pending = b""
        if self._pending:
            self._loop.call_later(0.01, self._flush)

    def close(self) -> None:
        if self._source_fd >= 0:
            self._loop.remove_reader(self._source_fd)
            os.close(self._source_fd)
            self._source_fd = -1
