"""A function call in a child of a template: the sealed process itself becomes the tool.

It is pid 1 of its pid namespace. Its end is seen by the template, from outside that namespace, so nothing that the
tool does to itself can hide or forge it; what it forked and left behind dies with it.

What can be done before the call is known is done before the jail parks; a call that asks for nothing but what its kind
always has is then taken with a dozen system calls that the template has made ready.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import os
import socket
import sys

from sandbox._jail import runner
from sandbox._linux import process, syscalls, wire
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

SITE = "/run/sandbox/site"
RUNNER = "/run/sandbox/lib/sandbox/_jail/runner.py"
_STREAMS = ("stdin", "stdout", "stderr")
FDS = (*_STREAMS, "request", "result")
# The message of a call whose environment and directory are its kind's.
USUAL_GO = json.dumps({"op": "go", "fds": [*FDS], "call": None}, separators=(",", ":")).encode()
REQUEST_BYTES = 64 * 1024
_RESULT = 3
_FD_BYTES = 4


class _Buffer(ctypes.Structure):
    """struct iovec"""

    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class _Message(ctypes.Structure):
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


class Seat:
    """What a parked function needs to take its call: buffers, and the calls made ready. Made by its template."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.status = ctypes.c_long(-1)
        self.received = ctypes.c_long(-1)
        self.request_bytes = ctypes.c_long(-1)
        self._message = ctypes.create_string_buffer(wire.MESSAGE_MAX_BYTES)
        self._control = ctypes.create_string_buffer(socket.CMSG_SPACE(wire.FDS_MAX * _FD_BYTES))
        self._request = ctypes.create_string_buffer(REQUEST_BYTES)
        first = socket.CMSG_LEN(0)
        self.fds = {
            name: ctypes.c_int.from_buffer(self._control, first + _FD_BYTES * index) for index, name in enumerate(FDS)
        }
        self.waiting = self._waiting()
        self.reading = self._reading()
        self.starting = self._starting(settings["cwd"])

    def _waiting(self) -> Batch:
        batch = Batch()
        size = ctypes.sizeof(self._message)
        header = _Message(
            buffers=batch.address(_Buffer(ctypes.addressof(self._message), size)),
            buffer_count=1,
            control=ctypes.addressof(self._control),
            control_size=ctypes.sizeof(self._control),
        )
        args = (self.status, batch.address(header), int(socket.MSG_CMSG_CLOEXEC))
        batch.add("recvmsg", syscalls.number("recvmsg"), *args, into=self.received)
        return batch

    def _reading(self) -> Batch:
        batch = Batch()
        args = (self._argument("request"), ctypes.addressof(self._request), REQUEST_BYTES, 0)
        batch.add("pread64", syscalls.number("pread64"), *args, into=self.request_bytes)
        return batch

    def _starting(self, cwd: str) -> Batch:
        batch = Batch()
        dup3 = syscalls.number("dup3")
        for number, name in enumerate(_STREAMS):
            batch.add(f"dup3 {name}", dup3, self._argument(name), number, 0)
        # EINVAL: it has this number already.
        batch.add("dup3 result", dup3, self._argument("result"), _RESULT, os.O_CLOEXEC, instead={errno.EINVAL: None})
        # The status channel closes here: from now on nothing of ours is open but the result.
        batch.add("close_range", syscalls.NR_CLOSE_RANGE, _RESULT + 1, 0xFFFFFFFF, 0)
        batch.add(f"chdir {cwd}", syscalls.number("chdir"), batch.address(os.fsencode(cwd)))
        # As for any program: its own /proc entries are the tool's to use. All of this memory is the tool's.
        batch.prctl("PR_SET_DUMPABLE", process.PR_SET_DUMPABLE, 1)
        return batch

    def wait(self) -> dict[str, Any] | None:
        """Until the call comes: what is special about it. Does not return when the supervisor closes the channel."""
        while True:
            self.waiting.run()
            count = self.received.value
            if count == len(USUAL_GO) and self._came() == USUAL_GO:
                return None
            if count == 0:
                os._exit(0)
            message: dict[str, Any] = json.loads(self._came())
            if message["op"] == "go":
                return self._special(message)

    def _argument(self, name: str) -> ctypes.c_long:
        """A received descriptor where it was received. The kernel looks at the lower half, which comes first, alone."""
        return ctypes.c_long.from_buffer(self._control, socket.CMSG_LEN(0) + _FD_BYTES * FDS.index(name))

    def _came(self) -> bytes:
        return ctypes.string_at(self._message, self.received.value)

    def _special(self, message: dict[str, Any]) -> dict[str, Any] | None:
        names = message["fds"]
        if "call" not in names:
            call: dict[str, Any] | None = message["call"]
            return call
        at = socket.CMSG_LEN(0) + _FD_BYTES * names.index("call")
        large: dict[str, Any] = json.loads(wire.read_memfd(ctypes.c_int.from_buffer(self._control, at).value))
        return large

    def request(self) -> bytes:
        """What to run, as the caller wrote it."""
        self.reading.run()
        if self.request_bytes.value < REQUEST_BYTES:
            return ctypes.string_at(self._request, self.request_bytes.value)
        return wire.read_memfd(self.fds["request"].value)


def prepare() -> None:
    """In the child, before it is sealed: what every call would do first."""
    os.setsid()
    os.umask(0o022)
    sys.argv = [RUNNER, "3", "4"]
    _renew_randomness()
    gc.enable()


def run(launch: Launch, seat: Seat) -> None:
    """Take the call and run it. Does not return."""
    seat.status.value = launch.fds["status"]
    special = seat.wait()
    request = seat.request()
    seat.starting.run()
    if special is not None:
        os.environ.clear()
        os.environ.update(special["env"])
        os.chdir(special["cwd"])
    os._exit(runner.finish(request, _RESULT))


def _renew_randomness() -> None:
    """Two children of one template must not draw the same numbers.

    `random` sees to it at fork; OpenSSL and others draw anew when the pid has changed (`template._leave_init`).
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
