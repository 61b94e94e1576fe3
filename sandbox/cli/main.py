"""`sandbox`: the entry point. It sees to streams and interrupts before the rest is loaded."""

from __future__ import annotations

import gc
import os
import signal
import sys

from sandbox.cli import FAILED, Ended

# Not from typing, which takes its time to load.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def main() -> None:
    """Entry point. Exit status: the tool's own, 124 wall time, 125 ours, 126/127 cannot run, 128+N signal."""
    _open_missing_streams()
    # Python would end an import with a traceback. Where nothing has begun the signal may as well end us as it ends any
    # program; whoever started us with interrupts ignored keeps that.
    handler = signal.getsignal(signal.SIGINT)
    is_ours = handler is signal.default_int_handler
    if is_ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Looking for garbage among what is being imported costs and finds nothing.
    gc.disable()
    try:
        run = _quick_run() or _usual_run()
        # `run` and `shell` take it back themselves, where there is something to close.
        if is_ours and sys.argv[1:2] not in (["run"], ["shell"]):
            signal.signal(signal.SIGINT, handler)
        run()
    except Ended as end:
        leave(end)
    except KeyboardInterrupt:
        leave(Ended(128 + signal.SIGINT))


def _quick_run() -> Callable[[], None] | None:
    """`run` where its plan was kept; it comes back when it has to be done the usual way after all."""
    if sys.argv[1:2] != ["run"]:
        return None
    from sandbox.cli import quick
    from sandbox.errors import SandboxError

    ready = quick.prepare(sys.argv[2:])
    if ready is None:
        return None

    def run() -> None:
        try:
            status = ready.run()
        except SandboxError as error:
            from sandbox.cli.complain import complain

            complain(error)
            raise Ended(FAILED) from None
        if status is not None:
            raise Ended(status)
        _usual_run()()

    return run


def _usual_run() -> Callable[[], None]:
    from sandbox.cli import app

    loaded = app.load(sys.argv)
    gc.freeze()
    gc.enable()
    return lambda: app.run(loaded, sys.argv)


def leave(end: Ended) -> NoReturn:
    """End with a tool's status, without taking the interpreter apart: that costs more than the rest of our part.

    What was begun is closed by now, apart from a supervisor that turned out not to be needed. Whoever cannot write
    out what they printed ends as Python does, which says so.
    """
    loaded = sys.modules.get("sandbox.link")
    if loaded is not None:
        loaded.close_all()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        raise end from None
    os._exit(end.code if isinstance(end.code, int) else FAILED)


def _open_missing_streams() -> None:
    """Started with a standard stream closed, the next descriptor that we open would stand in its place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one: all below are open by now.
            os.open(os.devnull, os.O_RDWR)


if __name__ == "__main__":
    main()
