"""Entry of the supervisor process: `python -I -c ... CONTROL_FD STATE`, started by `sandbox.runtime`."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from sandbox._linux import process, wire
from sandbox.errors import SandboxError
from sandbox.supervisor.server import Supervisor


def main(argv: list[str]) -> int:
    """Serve until the caller is gone. Exit status 1 when the start failed; the caller has been told why."""
    control = socket.socket(fileno=int(argv[0]))
    os.umask(0o077)
    # Each call holds a dozen descriptors. The soft limit is a default for programs that use select(2); we do not.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The caller's terminal sends these to every process of its group; what they mean is the caller's to decide.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        return asyncio.run(_run(control, Path(argv[1])))
    except SandboxError as error:
        wire.send(control, {"ev": "failed", "type": type(error).__name__, "message": error.message, "hint": error.hint})
        return 1


async def _run(control: socket.socket, state: Path) -> int:
    supervisor = Supervisor(control, state)
    # Only now: the probes fork, and a process that is not dumpable cannot write its own id maps.
    process.set_not_dumpable()
    supervisor.prepare()
    # What is here now stays: looking through all of it for garbage again and again would cost a share of each call.
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 20)
    await supervisor.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
