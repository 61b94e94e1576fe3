"""A child process of ours by its pid: as much of subprocess.Popen as is needed, without what that loads."""

from __future__ import annotations

import os
import select
import signal


class Child:
    """A process that was forked or spawned here, and that nobody else waits for."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal's number; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        """Its exit status, when it has ended. Raises TimeoutError."""
        if self.returncode is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                poll = select.poll()
                poll.register(pidfd, select.POLLIN)
                if not poll.poll(None if timeout_s is None else timeout_s * 1000):
                    raise TimeoutError(f"process {self.pid} still runs after {timeout_s} s")
            finally:
                os.close(pidfd)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        # As long as it has not been waited for its pid is its own.
        if self.returncode is None:
            os.kill(self.pid, signal.SIGKILL)


def spawn(argv: list[str], env: dict[str, str], fd: int) -> Child:
    """Execute a program that leads a session of its own and gets null, our output and, by its last argument, `fd`.

    It keeps our directory. Raises OSError.
    """
    number = 4 if fd == 3 else 3
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
        # What we were started with and is open to every program that is executed; ours are not.
        *((os.POSIX_SPAWN_CLOSE, other) for other in _inheritable()),
        (os.POSIX_SPAWN_DUP2, fd, number),
    ]
    ignored = (signal.SIGPIPE, signal.SIGXFSZ)  # by our interpreter
    pid = os.posix_spawn(argv[0], [*argv, str(number)], env, file_actions=actions, setsid=True, setsigdef=ignored)
    return Child(pid)


def _inheritable() -> list[int]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and os.get_inheritable(int(name)):
                found.append(int(name))
        except OSError:
            pass  # the directory's own, closed by now
    return found
