"""The zygote: a small, single-threaded process, the only one that forks jails.

It holds nothing of any call: it receives a message with the call's descriptors, forks a builder, closes its copies.
It dies with the supervisor (PDEATHSIG, and end of file on its socket), and the builders die with it.
"""

from __future__ import annotations

import gc
import os
import select
import sys

from sandbox._jail import builder
from sandbox._linux import process, scheduling, wire
from sandbox._linux.bare import signal, socket, suppress

# Somebody who makes a single call has made it by then.
_IDLE_MS = 250


def main(control_fd: int) -> None:
    """Serve launch requests on `control_fd` until the supervisor closes it."""
    parent = os.getppid()
    process.die_with_parent()
    if os.getppid() != parent:
        os._exit(0)
    control = socket.socket(fileno=control_fd)
    os.umask(0o022)
    os.chdir("/")
    scheduling.take_turns(scheduling.USUAL_NS)
    _take_back_ignored_signals()
    # Its children live for milliseconds; a collection in one of them would only copy pages that they share.
    gc.disable()
    gc.freeze()
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(control, select.POLLIN)
    poller.register(wake_read, select.POLLIN)
    try:
        wire.send(control, {"ev": "ready", "pid": os.getpid()})
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor could not start, says why itself, and has closed its end before it is gone
    idle_ms: int | None = _IDLE_MS
    while True:
        ready = {fd for fd, _ in poller.poll(idle_ms)}
        if not ready:
            idle_ms = None
            _load_the_rest()
        if wake_read in ready:
            with suppress(BlockingIOError):
                os.read(wake_read, 4096)
            _reap()
        if control_fd in ready:
            try:
                message, fds = wire.receive(control)
            except ConnectionResetError:
                message = None  # closed as well, with something that we sent unread (unix(7))
            if message is None:
                os._exit(0)  # there is nothing to take apart, and that would take longer than our start
            _launch(control, message, fds, (wake_read, wake_write))


def _load_the_rest() -> None:
    """What only some jails need (`cover`). Without this each of them would load it; a start does not wait for it."""
    import fnmatch  # noqa: F401

    gc.freeze()


def _take_back_ignored_signals() -> None:
    """An ignored signal stays ignored across exec, down to the tool (the supervisor ignores the terminal's; `nohup`
    may have come before it), and a shell cannot even trap what was ignored when it started."""
    own = (signal.SIGPIPE, signal.SIGXFSZ)  # the interpreter's, reset when the tool starts
    for number in signal.valid_signals():
        if number not in own and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _launch(control: socket.socket, message: dict[str, object], fds: list[int], own_fds: tuple[int, int]) -> None:
    zygote_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for fd in own_fds:
            os.close(fd)
        control.close()
        if "runtime" in message:
            from sandbox._jail import container, userspace

            kind = userspace.Attendant if message["runtime"] == "runsc" else container.SharedKernel
            container.run(message, fds, zygote_pid, kind)
        builder.run(message, fds, zygote_pid)
        os._exit(0)
    for fd in fds:
        os.close(fd)


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
