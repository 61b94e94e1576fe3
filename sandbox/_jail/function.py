"""A function call in a child of a template: the sealed process itself becomes the tool.

It is pid 1 of its pid namespace. Its end is seen by the template, from outside that namespace, so nothing that the
tool does to itself can hide or forge it; what it forked and left behind dies with it.

What can be done before the call is known is done before the jail parks; a call that asks for nothing but what its kind
always has is then taken with a dozen system calls that the template has made ready.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import sys

from sandbox._jail import runner
from sandbox._linux import process, scheduling, syscalls, wire
from sandbox._linux.batch import Batch
from sandbox._linux.inbox import Inbox

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

SITE = "/run/sandbox/site"
RUNNER = "/run/sandbox/lib/sandbox/_jail/runner.py"
_STREAMS = ("stdin", "stdout", "stderr")
FDS = (*_STREAMS, "result")
# What the message of a call begins with whose environment and directory are its kind's; the request follows.
USUAL_GO = json.dumps({"op": "go", "fds": [*FDS], "call": None}, separators=(",", ":")).encode() + b"\n"
_RESULT = 3


class Seat:
    """What a parked function needs to take its call: room for it, and the calls made ready. Made by its template."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.inbox = Inbox()
        self._request = b""
        self.parking = Batch()
        # To have the core as soon as the call comes, also where others are at work.
        scheduling.add_turns(self.parking, scheduling.SHORT_NS)
        self.starting = self._make_starting(settings["cwd"])

    def _make_starting(self, cwd: str) -> Batch:
        batch = Batch()
        dup3 = syscalls.number("dup3")
        for number, name in enumerate(_STREAMS):
            batch.add(f"dup3 {name}", dup3, self.inbox.fd_argument(FDS.index(name)), number, 0)
        # EINVAL: it has this number already.
        result = self.inbox.fd_argument(FDS.index("result"))
        batch.add("dup3 result", dup3, result, _RESULT, os.O_CLOEXEC, instead={errno.EINVAL: None})
        # The status channel closes here: from now on nothing of ours is open but the result.
        batch.add("close_range", syscalls.NR_CLOSE_RANGE, _RESULT + 1, 0xFFFFFFFF, 0)
        scheduling.add_turns(batch, scheduling.USUAL_NS)
        batch.add(f"chdir {cwd}", syscalls.number("chdir"), batch.address(os.fsencode(cwd)))
        # As for any program: its own /proc entries are the tool's to use. All of this memory is the tool's.
        batch.prctl("PR_SET_DUMPABLE", process.PR_SET_DUMPABLE, 1)
        return batch

    def wait(self) -> dict[str, Any] | None:
        """Until the call comes: what is special about it. Does not return when the supervisor closes the channel."""
        while True:
            self.inbox.waiting.run()
            text = self.inbox.text()
            if text.startswith(USUAL_GO):
                self._request = text[len(USUAL_GO) :]
                return None
            if not text:
                os._exit(0)
            message: dict[str, Any] = json.loads(text)
            if message["op"] == "go":
                self._request = wire.read_memfd(self.inbox.fd(message["fds"].index("request")))
                return self._special(message)

    def _special(self, message: dict[str, Any]) -> dict[str, Any] | None:
        names = message["fds"]
        if "call" not in names:
            call: dict[str, Any] | None = message["call"]
            return call
        large: dict[str, Any] = json.loads(wire.read_memfd(self.inbox.fd(names.index("call"))))
        return large

    def request(self) -> bytes:
        """What to run, as the caller wrote it."""
        return self._request


def prepare() -> None:
    """In the child, before it is sealed: what every call would do first."""
    os.setsid()
    os.umask(0o022)
    sys.argv = [RUNNER, "3", "4"]
    _renew_randomness()
    gc.enable()


def run(launch: Launch, seat: Seat) -> None:
    """Take the call and run it. Does not return."""
    seat.inbox.socket_fd.value = launch.fds["status"]
    seat.parking.run()
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
