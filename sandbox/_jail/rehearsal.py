"""What a template does before it serves, so that its children need not: it goes their way, as far as nothing changes.

An interpreter learns while it runs: attribute caches, specialised code, resolved symbols. What it has learned before
a fork is shared by all children. What a child has to learn costs time in each of them, and a copy of every page that it
is written to.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import sys

from sandbox._jail import function, pid1, runner
from sandbox._linux import wire
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

# CPython specialises code that has run eight times; a few more settle its caches.
_ROUNDS = 12
_PR_GET_DUMPABLE = 3
_NAMES = ("stdin", "stdout", "stderr", "request", "result")


def rehearse(launch: Launch, settings: dict[str, Any]) -> None:
    """Go the way of a child often enough. Leaves nothing mounted or open, and takes no step of a jail."""
    kept = launch.applied, launch.status, launch.fds
    seat = function.Seat(settings) if settings["function"] else None
    for _ in range(_ROUNDS):
        stage = Stage(launch, seat)
        stage.play()
        stage.close()
    launch.applied, launch.status, launch.fds = kept
    launch.call, launch.step = {}, "template"


class Stage:
    """One round: what it takes besides a child's own doing is here before the child begins."""

    def __init__(self, launch: Launch, seat: function.Seat | None) -> None:
        self._launch = launch
        self._seat = seat
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._batch = Batch()
        for _ in range(20):
            self._batch.prctl("PR_GET_DUMPABLE", _PR_GET_DUMPABLE)
        self._calls = _requests() if seat is not None else []
        # From a supervisor that has sent the calls already.
        for request in self._calls:
            socket.send_fds(self._ours, [function.USUAL_GO + request], [self._null] * len(function.FDS))
        if seat is None:
            # What it names cannot be run, which shows only when all else is done.
            call = {"argv": ["/"], "env": {"PATH": "/usr/bin"}, "cwd": "/"}
            wire.send(self._ours, {"op": "go", "fds": [*_NAMES], "call": call}, [self._null] * len(_NAMES))

    def play(self) -> None:
        """Do as a child does, but for what cannot be taken back."""
        launch = self._launch
        launch.applied, launch.fds, launch.out_fds, launch.status = [], {}, {}, self._theirs
        launch.take_ready([("", self._batch)] * 4)
        if self._seat is not None:
            self._play_function(self._seat)
            return
        pid1.park(launch)
        with contextlib.suppress(PermissionError):
            pid1.spawn(launch)
        for fd in launch.fds.values():
            os.close(fd)

    def _play_function(self, seat: function.Seat) -> None:
        pid1.tell_sealed(self._launch)
        seat.inbox.socket_fd.value = self._theirs.fileno()
        for _ in self._calls:
            seat.wait()
            result = function.FDS.index("result")
            runner.finish(seat.request(), seat.inbox.fd(result))
            for index in range(result):
                os.close(seat.inbox.fd(index))

    def close(self) -> None:
        os.close(self._null)
        self._ours.close()
        self._theirs.close()


def _requests() -> list[bytes]:
    """A call of a function by its name, and one of a function that comes along, as the caller's codec writes them."""
    header: dict[str, Any] = {"by": "reference", "module": "builtins", "qualname": "dict", "unwrap": 0, "sys_path": []}
    requests = [json.dumps(header).encode() + b"\n" + pickle.dumps(((), {"a": 1}), protocol=5)]
    cloudpickle = sys.modules.get("cloudpickle")
    if cloudpickle is not None:

        def given(number: int, text: str = "") -> list[Any]:
            return [number, text, 1.5, None]

        # Of no module that the runner would have to make up.
        given.__module__ = "builtins"
        by_value = {"by": "value", "async": False, "sys_path": []}
        data = cloudpickle.dumps((given, (1,), {"text": "x"}), protocol=5)
        requests.append(json.dumps(by_value).encode() + b"\n" + data)
    return requests
