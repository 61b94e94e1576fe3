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

from sandbox._jail import pid1, runner
from sandbox._linux import landlock, mounts, seccomp, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

# CPython specialises code that has run eight times; a few more settle its caches.
ROUNDS = 12
_MOUNTING = ("scratch", "proc", "terminals", "queues")
_HARMLESS = ("hostname", "loopback", "keyring")


def rehearse(launch: Launch) -> None:
    """Leaves nothing mounted or open. What the host refuses here it will refuse the first jail, which reports it."""
    is_function = launch.plan["template"]["function"]
    steps = {step["name"]: step["args"] for step in launch.plan["steps"] if step["where"] == "call"}
    requests = _requests() if is_function else []
    for _ in range(ROUNDS):
        with contextlib.suppress(OSError):
            _walk(launch, steps)
        for request in requests:
            runner.finish(request, os.open("/dev/null", os.O_WRONLY))


def _walk(launch: Launch, steps: dict[str, Any]) -> None:
    """The steps of a jail that can be taken back, or change nothing."""
    applied, status, fds = launch.applied, launch.status, launch.fds
    launch.applied, launch.fds, launch.out_fds = [], {}, {}
    mounted = []
    try:
        for name in _MOUNTING:
            if name in steps:
                pid1.STEPS[name](launch, {**steps[name], "tty": False} if name == "terminals" else steps[name])
                mounted += _mounted_by(name, steps[name])
        for name in _HARMLESS:
            if name in steps:
                pid1.STEPS[name](launch, steps[name])
        if "landlock" in steps:
            os.close(landlock.ruleset(steps["landlock"]["rules"], steps["landlock"]["abi"], missing_ok=True))
        with contextlib.suppress(OSError):
            seccomp.install(bytes(8))  # no program: refused
        launch.run_steps("call", dict.fromkeys(pid1.STEPS, _nothing))
        _park(launch)
    finally:
        for fd in {*launch.fds.values(), *launch.out_fds.values()}:
            with contextlib.suppress(OSError):
                os.close(fd)
        launch.applied, launch.status, launch.fds, launch.out_fds, launch.call = applied, status, fds, {}, {}
        for place in reversed(mounted):
            mounts.unmount_detached(place)


def _mounted_by(name: str, args: dict[str, Any]) -> list[str]:
    if name == "scratch":
        return list(args["directories"])
    return {"proc": ["/proc"], "terminals": ["/dev/pts"], "queues": ["/dev/mqueue"]}[name]


def _nothing(_launch: Launch, _args: dict[str, Any]) -> None:
    return


def _park(launch: Launch) -> None:
    """Park before a supervisor that has sent the call already."""
    ours, launch.status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    names = ["stdin", "stdout", "stderr", "request", "result"]
    call = {"argv": ["true"], "env": {"PATH": "/usr/bin"}, "cwd": "/"}
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
