"""A supervisor that is forked from a command line which is nothing else yet, instead of executed.

That saves an interpreter's start and the loading of what both need. It is for a process that has one thread and loaded
nothing but our own command's beginnings: everywhere else a supervisor is executed (`sandbox.link`), with an
interpreter of its own. What the child keeps of the command line are modules, memory that no jail is made from (the
zygote is executed in any case), and the text that ps(1) shows.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading

TYPE_CHECKING = False

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping
    from typing import NoReturn


class Forked:
    """A child of ours, with as much of `subprocess.Popen` as a link needs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(None if timeout is None else timeout * 1000):
                    raise subprocess.TimeoutExpired("supervisor", timeout or 0.0)
            finally:
                os.close(pidfd)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        # Nobody else waits for it: as long as it has not been waited for its pid is its own.
        if self.returncode is None:
            os.kill(self.pid, 9)


def is_possible() -> bool:
    """Whether this process may be copied, and an executed interpreter would read names of files as this one does."""
    return threading.active_count() == 1 and sys.getfilesystemencoding() == "utf-8" and sys.gettrace() is None


def start(control: socket.socket, state: str, environment: Mapping[str, str]) -> Forked:
    """Fork the supervisor, which serves on `control`. Precondition: `is_possible`. Raises OSError."""
    pid = os.fork()
    if pid:
        return Forked(pid)
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
