"""Messages between supervisor, zygote and jail: one JSON object per SOCK_SEQPACKET message, with descriptors.

Message boundaries are the kernel's, so there is no framing to get wrong; what is large travels in a memfd.
"""

from __future__ import annotations

import fcntl
import os
import struct

from sandbox._linux.bare import dumps, loads, socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

MESSAGE_MAX_BYTES = 128 * 1024
# What is larger goes into a memory file.
INLINE_MAX_BYTES = 32 * 1024
FDS_MAX = 32
_FD_BYTES = struct.calcsize("=i")
# As numbers: each operation on the enumeration's members makes another of them.
_CUT_OFF = int(socket.MSG_TRUNC | socket.MSG_CTRUNC)
_CONTROL_BYTES = socket.CMSG_SPACE(FDS_MAX * _FD_BYTES)
# Room for messages that nobody is receiving into: to map, clear and unmap it each time takes ten times as long as the
# message. Whoever waits has taken his, so threads and signal handlers do not meet in one.
_rooms: list[bytearray] = []
_ROOMS_MAX = 4


def send(sock: socket.socket, message: dict[str, object], fds: Sequence[int] = ()) -> None:
    """Send one message. Raises OSError (EPIPE, ECONNRESET) when the other side is gone."""
    send_encoded(sock, dumps(message).encode(), fds)


def send_encoded(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """As `send`, of a message that is bytes already."""
    if fds:
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))])
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[dict[str, object] | None, list[int]]:
    """The next message and its descriptors (close-on-exec); (None, []) when the other side has closed."""
    data, fds = receive_encoded(sock)
    if not data:
        return None, []
    message: dict[str, object] = loads(data)
    return message, fds


def receive_encoded(sock: socket.socket) -> tuple[bytes, list[int]]:
    """As `receive`, without reading the message; empty at the end."""
    try:
        room = _rooms.pop()
    except IndexError:
        room = bytearray(MESSAGE_MAX_BYTES)
    try:
        # Not socket.recv_fds: it takes flags and drops them (Python 3.11). What is not close-on-exec ends up in the
        # tool.
        size, control, flags, _ = sock.recvmsg_into([room], _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
        data = bytes(memoryview(room)[:size])
    finally:
        if len(_rooms) < _ROOMS_MAX:
            _rooms.append(room)
    fds = [fd for item in control for fd in _descriptors(*item)]
    if flags & _CUT_OFF:
        for fd in fds:
            os.close(fd)
        raise OSError(90, "recvmsg: message truncated")
    return data, fds


def send_with_parts(
    sock: socket.socket, message: dict[str, object], parts: Mapping[str, bytes], fds: Sequence[int] = ()
) -> None:
    """A message with bytes beside it, by name: behind it in the same datagram, or, if large, in a memory file."""
    body = b"".join(parts.values())
    is_inline = len(body) <= INLINE_MAX_BYTES
    sizes = {name: len(data) for name, data in parts.items()}
    head = dumps({**message, "parts": sizes, "inline": is_inline}).encode()
    if is_inline:
        # JSON has no line break of its own.
        send_encoded(sock, head + b"\n" + body, fds)
        return
    fd = memfd("parts", body)
    try:
        send_encoded(sock, head, [*fds, fd])
    finally:
        os.close(fd)


def receive_with_parts(sock: socket.socket) -> tuple[dict[str, object] | None, dict[str, bytes], list[int]]:
    """The next message of `send_with_parts` or `send`, its parts and its descriptors; (None, {}, []) at the end."""
    data, fds = receive_encoded(sock)
    if not data:
        return None, {}, []
    head, _, body = data.partition(b"\n")
    message: dict[str, Any] = loads(head)
    sizes: dict[str, int] = message.pop("parts", {})
    if not message.pop("inline", True):
        fd = fds.pop()
        try:
            body = read_memfd(fd)
        finally:
            os.close(fd)
    parts, at = {}, 0
    for name, size in sizes.items():
        parts[name] = body[at : at + size]
        at += size
    return message, parts, fds


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


def read_only(fd: int) -> int:
    """The same memory file as a descriptor that cannot write; closes `fd`. Seals hold even where it is opened anew."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


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
