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
    from typing import NoReturn


def main() -> None:
    """Entry point. Exit status: the tool's own, 124 wall time, 125 ours, 126/127 cannot run, 128+N signal."""
    _open_missing_streams()
    # Looking for garbage among what is being imported costs and finds nothing.
    gc.disable()
    # Python would end an import with a traceback. Where nothing has begun the signal may as well end us as it ends any
    # program; whoever started us with interrupts ignored keeps that.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sandbox.cli import app

    loaded = app.load(sys.argv)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    gc.freeze()
    gc.enable()
    try:
        app.run(loaded, sys.argv)
    except Ended as end:
        leave(end)


def leave(end: Ended) -> NoReturn:
    """End with a tool's status, without taking the interpreter apart: that costs more than the rest of our part.

    By now the supervisor has ended and what was begun is closed. Whoever cannot write out what they printed ends as
    Python does, which says so.
    """
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
