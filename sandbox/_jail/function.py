"""A function call in a child of a template: the sealed process itself becomes the tool.

It is pid 1 of its pid namespace. Its end is seen by the template, from outside that namespace, so nothing that the
tool does to itself can hide or forge it; what it forked and left behind dies with it.
"""

from __future__ import annotations

import gc
import os
import sys

from sandbox._jail import runner
from sandbox._linux import process, syscalls, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from sandbox._jail.launch import Launch

SITE = "/run/sandbox/site"
RUNNER = "/run/sandbox/lib/sandbox/_jail/runner.py"
_STREAMS = ("stdin", "stdout", "stderr")


def run(launch: Launch) -> None:
    """Take the call's streams and run it. Does not return."""
    os.setsid()
    for number, name in enumerate(_STREAMS):
        os.dup2(launch.fds[name], number)
    request = wire.read_memfd(launch.fds["request"])
    result = os.dup2(launch.fds["result"], 3, inheritable=False)
    # The status channel closes here: from now on nothing of ours is open but the result.
    syscalls.close_range(4, 0xFFFFFFFF)
    os.environ.clear()
    os.environ.update(launch.call["env"])
    os.chdir(launch.call["cwd"])
    os.umask(0o022)
    # As for any program: its own /proc entries are the tool's to use. All of this memory is the tool's.
    process.set_dumpable(dumpable=True)
    sys.argv = [RUNNER, "3", "4"]
    _renew_randomness()
    gc.enable()
    os._exit(runner.finish(request, result))


def _renew_randomness() -> None:
    """Two children of one template must not draw the same numbers.

    `random` sees to it at fork; OpenSSL and others draw anew when the pid has changed (`template._leave_init`).
    """
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
