"""A supervisor that is forked from a command line which is nothing else yet, instead of executed.

That saves an interpreter's start and the loading of what both need. It is for a process that has one thread and loaded
nothing but our own command's beginnings: everywhere else a supervisor is executed (`sandbox.link`), with an
interpreter of its own. What the child keeps of the command line are modules, memory that no jail is made from (the
zygote is executed in any case), and the text that ps(1) shows.
"""

from __future__ import annotations

import os
import sys
import threading

from sandbox._linux.child import Child

TYPE_CHECKING = False

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from typing import NoReturn


def is_possible() -> bool:
    """Whether this process may be copied, and an executed interpreter would read names of files as this one does."""
    return threading.active_count() == 1 and sys.getfilesystemencoding() == "utf-8" and sys.gettrace() is None


def start(control: socket.socket, state: str, environment: Mapping[str, str]) -> Child:
    """Fork the supervisor, which serves on `control`. Precondition: `is_possible`. Raises OSError."""
    pid = os.fork()
    if pid:
        return Child(pid)
    try:
        _serve(control.detach(), state, environment)
    except BaseException:  # noqa: BLE001 - told; the frames above are the command line's, which are not ours to return to
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def _serve(control_fd: int, state: str, environment: Mapping[str, str]) -> NoReturn:
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    # All of the caller's, and whatever was open when it started.
    for number in [int(name) for name in os.listdir("/proc/self/fd")]:
        if number > 2 and number != control_fd:
            try:
                os.close(number)
            except OSError:
                pass  # the directory's own, closed by now
    os.environ.clear()
    os.environ.update(environment)
    # What the interpreter and its packages bring comes before what only this command's start or environment names.
    sys.path.sort(key=lambda path: not path.startswith((sys.base_prefix, sys.prefix)))
    from sandbox.supervisor.main import run

    run([str(control_fd), state])
