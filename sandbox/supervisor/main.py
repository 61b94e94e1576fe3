"""Entry of the supervisor process: `python -I -c ... CONTROL_FD STATE`, started by `sandbox.link`, or forked."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys

from sandbox._linux import probes, process, scheduling, wire
from sandbox.errors import SandboxError
from sandbox.launchers.zygote import Zygote
from sandbox.supervisor import loading

TYPE_CHECKING = False

if TYPE_CHECKING:
    from pathlib import Path
    from typing import NoReturn


def run(argv: list[str]) -> NoReturn:
    """`main` as a process of its own, which ends without being taken apart: that costs a tenth of a short run."""
    status = main(argv)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a command line that was started without it
            stream.flush()
    os._exit(status)


def main(argv: list[str]) -> int:
    """Serve until the caller is gone. Exit status 1 when the start failed; the caller has been told why."""
    # What is imported and made until we serve stays: the collector would look through it again and again for nothing.
    gc.disable()
    control = socket.socket(fileno=int(argv[0]))
    os.umask(0o077)
    # Each call holds a dozen descriptors. The soft limit is a default for programs that use select(2); we do not.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The caller's terminal sends these to every process of its group; what they mean is the caller's to decide.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # First of all: they take their time while we load our part. The trials fork, which costs the less the less we hold.
    zygote = Zygote.begin()
    trials = probes.Trials.begin(as_root=probes.is_root_like())
    loading.load()
    trials.go_on()
    import asyncio
    import pathlib

    from sandbox.supervisor.loop import Loop

    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            return runner.run(_run(control, pathlib.Path(argv[1]), zygote, trials))
    except SandboxError as error:
        wire.send(control, {"ev": "failed", "type": type(error).__name__, "message": error.message, "hint": error.hint})
        return 1
    finally:
        control.close()


async def _run(control: socket.socket, state: Path, zygote: Zygote, trials: probes.Trials) -> int:
    from sandbox import host
    from sandbox.supervisor.server import Supervisor

    supervisor = Supervisor(control, state, zygote, host.probe(trials))
    # Only now: a process that is not dumpable cannot write the id maps of the trials' child.
    process.set_not_dumpable()
    supervisor.prepare()
    # What we do is short and others wait for it. What we start takes the usual turns again.
    scheduling.take_turns(scheduling.SHORT_NS)
    # What is here now stays: looking through all of it for garbage again and again would cost a share of each call.
    gc.freeze()
    gc.set_threshold(5000, 20, 20)
    gc.enable()
    await supervisor.serve()
    return 0


if __name__ == "__main__":
    run(sys.argv[1:])
