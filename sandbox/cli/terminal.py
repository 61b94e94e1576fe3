"""Carrying a jail's streams to and from this process: through pipes, or between a real terminal and the jail's own.

No descriptor of ours ever goes into the jail: a file on standard input could be opened anew for writing through
/proc/self/fd, a terminal could be typed into.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from types import FrameType

from sandbox.link import Pending

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK_BYTES = 1 << 16


class Streams:
    """Pipes between this process and the call: `fds` are the ends to hand over."""

    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        self.fds: dict[str, int] = {}
        self._reads: dict[int, int] = {}
        self.fds["stdin"], self._stdin_write = os.pipe2(os.O_CLOEXEC)
        targets = {"terminal_to": 1} if terminal else {"stdout_to": 1, "stderr_to": 2}
        for name, target in targets.items():
            read_end, self.fds[name] = os.pipe2(os.O_CLOEXEC)
            self._reads[read_end] = target

    def close_theirs(self) -> None:
        """After the call was handed over: the ends that are its own."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def carry(self, pending: Pending) -> None:
        """Move bytes until the call's output has ended. Signals go to the tool meanwhile."""
        threading.Thread(target=self._feed, daemon=True).start()
        with _signals(pending, terminal=self.terminal), _raw(self.terminal):
            self._drain()

    def _feed(self) -> None:
        try:
            while data := os.read(0, _CHUNK_BYTES):
                view = memoryview(data)
                while view:
                    view = view[os.write(self._stdin_write, view) :]
        except OSError:
            pass  # the tool closed its input or has ended, or we have none: either way there is nothing more to carry
        with contextlib.suppress(OSError):
            os.close(self._stdin_write)

    def _drain(self) -> None:
        with selectors.DefaultSelector() as selector:
            for fd in self._reads:
                selector.register(fd, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    data = os.read(key.fd, _CHUNK_BYTES)
                    if not data or not _write(self._reads[key.fd], data):
                        selector.unregister(key.fd)
                        os.close(key.fd)


def _write(fd: int, data: bytes) -> bool:
    """Write it all; False when nobody reads any more, so that the tool can be told by a broken pipe."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BrokenPipeError:
            return False
    return True


@contextlib.contextmanager
def _signals(pending: Pending, *, terminal: bool) -> Iterator[None]:
    """Hand the signals that we get to the tool; it decides what they mean."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        pending.signal(number)

    def resize(_number: int, _frame: FrameType | None) -> None:
        columns, rows = shutil.get_terminal_size()
        pending.resize(rows, columns)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    if terminal:
        before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resize)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _raw(terminal: bool) -> Iterator[None]:
    """Our terminal in raw mode: the jail's own does the editing and the signals."""
    if not terminal:
        yield
        return
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)


def is_interactive() -> bool:
    """Whether both ends are terminals."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
