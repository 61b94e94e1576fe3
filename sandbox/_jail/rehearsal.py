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
ROUNDS = 12
_PR_GET_DUMPABLE = 3


def rehearse(launch: Launch, rounds: int = ROUNDS) -> None:
    """Leaves nothing mounted or open, and takes no step of a jail."""
    batch = Batch()
    for _ in range(20):
        batch.prctl("PR_GET_DUMPABLE", _PR_GET_DUMPABLE)
    applied, status, fds = launch.applied, launch.status, launch.fds
    for _ in range(rounds):
        launch.applied, launch.fds, launch.out_fds = [], {}, {}
        launch.take_ready([("", batch)] * 4)
        _park(launch)
        if not launch.plan["template"]["function"]:
            # What it names cannot be run, which shows only when all else is done.
            with contextlib.suppress(PermissionError):
                pid1.spawn(launch)
        for fd in launch.fds.values():
            os.close(fd)
    launch.applied, launch.status, launch.fds, launch.call, launch.step = applied, status, fds, {}, "template"


def rehearse_calls(seat: function.Seat, rounds: int = ROUNDS) -> None:
    """Take calls as a parked function does, but for what cannot be taken back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        for _ in range(rounds):
            for request in _requests():
                null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
                socket.send_fds(ours, [function.USUAL_GO + request], [null] * len(function.FDS))
                seat.inbox.socket_fd.value = theirs.fileno()
                seat.wait()
                runner.finish(seat.request(), null)
                for index in range(len(function.FDS)):
                    os.close(seat.inbox.fd(index))


def _park(launch: Launch) -> None:
    """Park before a supervisor that has sent the call already."""
    ours, launch.status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    names = ["stdin", "stdout", "stderr", "request", "result"]
    call = {"argv": ["/"], "env": {"PATH": "/usr/bin"}, "cwd": "/"}
    try:
        wire.send(ours, {"op": "go", "fds": names, "call": call}, [null] * len(names))
        pid1.park(launch)
        wire.receive(ours)
    finally:
        os.close(null)
        ours.close()
        launch.status.close()


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
