"""Messages between supervisor, zygote and jail: one JSON object per SOCK_SEQPACKET message, with descriptors.

Message boundaries are the kernel's, so there is no framing to get wrong; what is large travels in a memfd.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct

_encode = json.JSONEncoder(separators=(",", ":")).encode
MESSAGE_MAX_BYTES = 128 * 1024
# What is larger goes into a memory file.
INLINE_MAX_BYTES = 32 * 1024
FDS_MAX = 32
_FD_BYTES = struct.calcsize("=i")


def send(sock: socket.socket, message: dict[str, object], fds: tuple[int, ...] | list[int] = ()) -> None:
    """Send one message. Raises OSError (EPIPE, ECONNRESET) when the other side is gone."""
    data = _encode(message).encode()
    if fds:
        socket.send_fds(sock, [data], list(fds))
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[dict[str, object] | None, list[int]]:
    """The next message and its descriptors (close-on-exec); (None, []) when the other side has closed."""
    # Not socket.recv_fds: it takes flags and drops them (Python 3.11). What is not close-on-exec ends up in the tool.
    space = socket.CMSG_SPACE(FDS_MAX * _FD_BYTES)
    data, control, flags, _ = sock.recvmsg(MESSAGE_MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for item in control for fd in _descriptors(*item)]
    if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
        for fd in fds:
            os.close(fd)
        raise OSError(90, "recvmsg: message truncated")
    if not data:
        return None, []
    message: dict[str, object] = json.loads(data)
    return message, fds


def _descriptors(level: int, kind: int, data: bytes) -> tuple[int, ...]:
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return ()
    count = len(data) // _FD_BYTES
    return struct.unpack(f"={count}i", data[: count * _FD_BYTES])


def memfd(name: str, data: bytes) -> int:
    """A sealed memory file holding `data`, positioned at its start: no one can change it afterwards."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
    return fd


def read_memfd(fd: int) -> bytes:
    """The whole content of a memory file, whatever its position."""
    size = os.fstat(fd).st_size
    chunks = []
    offset = 0
    while offset < size:
        chunk = os.pread(fd, min(1 << 20, size - offset), offset)
        if not chunk:
            break
        chunks.append(chunk)
        offset += len(chunk)
    return b"".join(chunks)
