"""The least that a relay between two network namespaces can be: the floor beside which the gateway's cost is read.

It judges, meters and records nothing. Two ways of moving bytes: `copy` reads and writes through one buffer of 1 MiB, as
the gateway does; `splice` moves them through a pipe of 1 MiB per flow, splice(2). The client's namespace has the same
route and the same segment size as a jail's. What it costs is the kernel's share of any relay on this machine.

    python bench/bare_relay.py copy|splice PID TARGET     PID: a process in the client's user and network namespaces
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sandbox._jail.egress import SEGMENT_BYTES
from sandbox._linux import netlink, process, syscalls

PORTS = (7, 80)
CHUNK_BYTES = 1 << 20
PIPE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


def listeners_of(pid: int) -> list[socket.socket]:
    """Listening sockets made in the namespaces of `pid`, where every address is local."""
    ours, theirs = socket.socketpair()
    namespaces = [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in ("user", "net")]
    child = os.fork()
    if child == 0:
        for fd in namespaces:
            syscalls.setns(fd, 0)
        process.loopback_up()
        with netlink.open_socket(netlink.NETLINK_ROUTE) as sock:
            with contextlib.suppress(OSError):
                netlink.request(sock, netlink.set_largest_segment(SEGMENT_BYTES), 1, "link")
            netlink.request(sock, netlink.add_local_default_route("127.0.0.1"), 1, "route")
        opened = [socket.create_server(("0.0.0.0", port), backlog=512) for port in PORTS]
        socket.send_fds(theirs, [b"x"], [sock.fileno() for sock in opened])
        os._exit(0)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, len(PORTS))
    os.waitpid(child, 0)
    for fd in namespaces:
        os.close(fd)
    return [socket.socket(fileno=fd) for fd in fds]


class Half:
    """One direction. `kept`: bytes that the other side could not take yet, or in the pipe their number."""

    buffer = memoryview(bytearray(CHUNK_BYTES))

    def __init__(self, from_sock: socket.socket, to_sock: socket.socket) -> None:
        self.from_sock, self.to_sock = from_sock, to_sock
        self.kept = b""

    def read(self) -> bool:
        """Move what is there; False at the end."""
        count = self.from_sock.recv_into(self.buffer)
        self.kept = bytes(self.buffer[self._send(self.buffer[:count]) : count])
        return count > 0

    def write(self) -> None:
        self.kept = self.kept[self._send(self.kept) :]

    def _send(self, data: bytes | memoryview) -> int:
        try:
            return self.to_sock.send(data)
        except BlockingIOError:
            return 0

    @property
    def has_more(self) -> bool:
        return bool(self.kept)

    def close(self) -> None:
        return


class PipedHalf(Half):
    """The same through a pipe: no byte comes into this process."""

    def __init__(self, from_sock: socket.socket, to_sock: socket.socket) -> None:
        super().__init__(from_sock, to_sock)
        self.out_fd, self.in_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.fcntl(self.in_fd, fcntl.F_SETPIPE_SZ, CHUNK_BYTES)
        self.count = 0

    def read(self) -> bool:
        self.count = os.splice(self.from_sock.fileno(), self.in_fd, CHUNK_BYTES, flags=PIPE_FLAGS)
        is_open = self.count > 0
        self.write()
        return is_open

    def write(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.count:
                self.count -= os.splice(self.out_fd, self.to_sock.fileno(), self.count, flags=PIPE_FLAGS)

    @property
    def has_more(self) -> bool:
        return self.count > 0

    def close(self) -> None:
        os.close(self.out_fd)
        os.close(self.in_fd)


class Relay:
    """Takes connections from the listeners and moves their bytes, in one thread."""

    def __init__(self, listeners: list[socket.socket], target: str, kind: type[Half]) -> None:
        self._listeners = {sock.fileno(): sock for sock in listeners}
        self._target, self._kind = target, kind
        self._reading: dict[int, Half] = {}
        self._writing: dict[int, Half] = {}
        self._poll = select.epoll()
        for fd in self._listeners:
            self._poll.register(fd, select.EPOLLIN)

    def serve(self) -> None:
        while True:
            for fd, _ in self._poll.poll():
                if fd in self._listeners:
                    self._accept(self._listeners[fd])
                elif fd in self._writing:
                    self._write(fd)
                elif fd in self._reading:
                    self._read(fd)

    def _accept(self, listener: socket.socket) -> None:
        front, _ = listener.accept()
        back = socket.create_connection((self._target, listener.getsockname()[1]))
        for sock in (front, back):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for half in (self._kind(front, back), self._kind(back, front)):
            self._reading[half.from_sock.fileno()] = half
            self._poll.register(half.from_sock.fileno(), select.EPOLLIN)

    def _read(self, fd: int) -> None:
        half = self._reading[fd]
        try:
            is_open = half.read()
        except BlockingIOError:
            return
        except ConnectionError:
            is_open = False
        if not is_open:
            self._close(half)
        elif half.has_more:
            self._poll.modify(fd, 0)
            self._writing[half.to_sock.fileno()] = half
            self._poll.modify(half.to_sock.fileno(), select.EPOLLOUT)

    def _write(self, fd: int) -> None:
        half = self._writing[fd]
        half.write()
        if not half.has_more:
            del self._writing[fd]
            self._poll.modify(fd, select.EPOLLIN)
            self._poll.modify(half.from_sock.fileno(), select.EPOLLIN)

    def _close(self, half: Half) -> None:
        """Both ways: the bench's own client and server need no half-close."""
        other = self._reading[half.to_sock.fileno()]
        for one in (half, other):
            self._poll.unregister(one.from_sock.fileno())
            del self._reading[one.from_sock.fileno()]
            self._writing.pop(one.to_sock.fileno(), None)
            one.close()
        half.from_sock.close()
        half.to_sock.close()


def main(mode: str, pid: int, target: str) -> None:
    process.die_with_parent()
    listeners = listeners_of(pid)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    Relay(listeners, target, {"copy": Half, "splice": PipedHalf}[mode]).serve()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
