"""Passing what the caller sends on into a named pipe of a container, without holding up the loop."""

from __future__ import annotations

import asyncio
import os
import stat

_CHUNK_BYTES = 64 * 1024


class Feed:
    """From `source` (a pipe, a file, a terminal) to `target`, a named pipe that was opened for both sides.

    Owns both descriptors. It may write before the other side has opened the pipe, but lets go only after `start`: with
    nobody at the other side, closing would lose what was written.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, source_fd: int, target_fd: int) -> None:
        self._loop = loop
        self._source_fd = source_fd
        self._target_fd = target_fd
        self._pending = b""
        self._offset = 0
        # Always readable, and refused by epoll (EPERM).
        self._is_file = stat.S_ISREG(os.fstat(source_fd).st_mode)

    def start(self) -> None:
        """The other side is there."""
        if self._target_fd < 0:
            return
        if self._is_file:
            self._loop.add_writer(self._target_fd, self._writable)
        else:
            self._loop.add_reader(self._source_fd, self._readable)

    def _readable(self) -> None:
        self._pending = os.read(self._source_fd, _CHUNK_BYTES)
        if not self._pending:
            self.close()
            return
        # No more is read before this has gone, so that a tool that does not read holds its caller up, as a pipe does.
        self._loop.remove_reader(self._source_fd)
        self._loop.add_writer(self._target_fd, self._writable)

    def _writable(self) -> None:
        if not self._pending and self._is_file:
            self._pending = os.pread(self._source_fd, _CHUNK_BYTES, self._offset)
            self._offset += len(self._pending)
            if not self._pending:
                self.close()
                return
        try:
            self._pending = self._pending[os.write(self._target_fd, self._pending) :]
        except BlockingIOError:
            return
        if not self._pending and not self._is_file:
            self._loop.remove_writer(self._target_fd)
            self._loop.add_reader(self._source_fd, self._readable)

    def close(self) -> None:
        if self._target_fd < 0:
            return
        self._loop.remove_writer(self._target_fd)
        if not self._is_file:
            self._loop.remove_reader(self._source_fd)
        os.close(self._source_fd)
        os.close(self._target_fd)
        self._source_fd = self._target_fd = -1
