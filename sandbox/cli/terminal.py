"""Carrying a jail's streams to and from this process: through pipes, or between a real terminal and the jail's own.

No descriptor of ours ever goes into the jail: a file on standard input could be opened anew for writing through
/proc/self/fd, a terminal could be typed into.
"""

from __future__ import annotations

import contextlib
import os
import select
import selectors
import signal
import sys
import termios
import threading
import tty
from collections.abc import Callable, Iterator

from sandbox.cli import Ended
from sandbox.cli.progress import Progress
from sandbox.errors import SandboxError
from sandbox.link import Pending

TYPE_CHECKING = False

if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_CHUNK_BYTES = 1 << 16


class Streams:
    """Pipes between this process and the call: `fds` are the ends to hand over.

    `started` is the end of a pipe which the supervisor closes when the tool runs.
    """

    def __init__(self, *, terminal: bool) -> None:
        self.terminal = terminal
        self.fds: dict[str, int] = {}
        self._reads: dict[int, int] = {}
        self.is_started = False
        self.fds["stdin"], self._stdin_write = os.pipe2(os.O_CLOEXEC)
        self._started_read, self.fds["started"] = os.pipe2(os.O_CLOEXEC)
        targets = {"terminal_to": 1} if terminal else {"stdout_to": 1, "stderr_to": 2}
        for name, target in targets.items():
            read_end, self.fds[name] = os.pipe2(os.O_CLOEXEC)
            self._reads[read_end] = target

    def close_theirs(self) -> None:
        """After the call was handed over: the ends that are its own."""
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()

    def carry(self, pending: Pending, on_start: Callable[[], None]) -> None:
        """Move bytes until the call's output has ended. Signals go to the tool as soon as it runs.

        A signal before that raises Ended: there is nobody yet who could decide what it means.
        """
        threading.Thread(target=self._feed, daemon=True).start()
        with self._signals(pending), _raw(self.terminal):
            self._drain(on_start)

    def _feed(self) -> None:
        try:
            while data := _read_blocking(0):
                view = memoryview(data)
                while view:
                    view = view[os.write(self._stdin_write, view) :]
        except OSError:
            pass  # the tool closed its input or has ended, or we have none: either way there is nothing more to carry
        with contextlib.suppress(OSError):
            os.close(self._stdin_write)

    def _drain(self, on_start: Callable[[], None]) -> None:
        with selectors.DefaultSelector() as selector:
            for fd in (*self._reads, self._started_read):
                selector.register(fd, selectors.EVENT_READ)
            while self._reads:
                for key, _ in selector.select():
                    fd = key.fd
                    data = os.read(fd, _CHUNK_BYTES)
                    if not self.is_started and (data or fd == self._started_read):
                        self.is_started = True
                        on_start()
                    if data and _write(self._reads[fd], data):
                        continue
                    self._reads.pop(fd, None)
                    selector.unregister(fd)
                    os.close(fd)

    @contextlib.contextmanager
    def _signals(self, pending: Pending) -> Iterator[None]:
        def pass_on(number: int, _frame: FrameType | None) -> None:
            if not self.is_started:
                raise Ended(128 + number)
            pending.signal(number)

        def resize(_number: int, _frame: FrameType | None) -> None:
            # Asked of the terminal itself: the variables COLUMNS and LINES say what it was.
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(1)
                pending.resize(rows, columns)

        before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
        if self.terminal:
            before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, resize)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def carried(hand_over: Callable[[dict[str, int]], Pending], progress: Progress, *, tty: bool) -> dict[str, Any]:
    """Hand a call over with streams of its own, carry them to its end, and give what the supervisor says of it."""
    streams = Streams(terminal=tty)
    try:
        pending = hand_over(streams.fds)
    finally:
        streams.close_theirs()
    with pending:
        streams.carry(pending, progress.stop)
        with Progress("finishing"):
            message = pending.take()
    progress.stop()
    return message


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """An interrupt where no tool runs ends us as it would end any program, and the call with us.

    Outside of it an interrupt may well be left to the kernel: there is nothing yet, or any more, to close.
    """
    is_kernels = signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    try:
        if is_kernels:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        if is_kernels:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    except KeyboardInterrupt:
        raise Ended(128 + signal.SIGINT) from None


def _read_blocking(fd: int) -> bytes:
    while True:
        try:
            return os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            # Somebody who shares it (a parent, a terminal's other programs) has made it non-blocking.
            select.select([fd], [], [])


def _write(fd: int, data: bytes) -> bool:
    """Write it all; False when nobody reads any more, so that the tool can be told by a broken pipe.

    Raises SandboxError when it cannot be written for another reason, such as a full disk: output must not get lost
    unnoticed.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except BrokenPipeError:
            return False
        except OSError as error:
            name = "standard output" if fd == 1 else "standard error"
            raise SandboxError(f"cannot write to {name}: {error.strerror}; the call was ended") from error
    return True


@contextlib.contextmanager
def _raw(terminal: bool) -> Iterator[None]:
    """Our terminal in raw mode: the jail's own does the editing and the signals."""
    if not terminal or not os.isatty(0):
        yield
        return
    saved = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        yield
    finally:
        # Unread input goes: a tool can make the terminal type answers, which would be the shell's next command.
        termios.tcsetattr(0, termios.TCSAFLUSH, saved)


def is_interactive() -> bool:
    """Whether both ends are terminals."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty()
