"""One message with descriptors, received by calls made ready beforehand: see `batch`. Source: recvmsg(2), cmsg(3)."""

from __future__ import annotations

import ctypes

from sandbox._linux import syscalls, wire
from sandbox._linux.bare import socket
from sandbox._linux.batch import Batch, slot

_FD_BYTES = ctypes.sizeof(ctypes.c_int)


class _Buffer(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Header(ctypes.Structure):
    """struct msghdr"""

    _fields_ = [
        ("name", ctypes.c_void_p),
        ("name_size", ctypes.c_uint),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_size", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    ]


class Inbox:
    """Room for a message of `wire`. Set `socket_fd`; then running `waiting` fills it, or empties it at the end."""

    def __init__(self) -> None:
        self.socket_fd = slot()
        self._received = slot()
        self._message = ctypes.create_string_buffer(wire.MESSAGE_MAX_BYTES)
        self._control = ctypes.create_string_buffer(socket.CMSG_SPACE(wire.FDS_MAX * _FD_BYTES))
        self.waiting = self._waiting()

    def _waiting(self) -> Batch:
        batch = Batch()
        header = _Header(
            buffers=batch.address(_Buffer(ctypes.addressof(self._message), ctypes.sizeof(self._message))),
            buffer_count=1,
            control=ctypes.addressof(self._control),
            control_size=ctypes.sizeof(self._control),
        )
        args = (self.socket_fd, batch.address(header), int(socket.MSG_CMSG_CLOEXEC))
        batch.add("recvmsg", syscalls.number("recvmsg"), *args, into=self._received)
        return batch

    def text(self) -> bytes:
        """The message; empty at the end."""
        return ctypes.string_at(self._message, self._received.value)

    def fd(self, index: int) -> int:
        """A descriptor that came. Precondition: so many did."""
        return ctypes.c_int.from_buffer(self._control, socket.CMSG_LEN(0) + _FD_BYTES * index).value

    def fd_argument(self, index: int) -> ctypes.c_long:
        """The same as the argument of a call. The kernel looks at the lower half, which comes first, alone."""
        return ctypes.c_long.from_buffer(self._control, socket.CMSG_LEN(0) + _FD_BYTES * index)
