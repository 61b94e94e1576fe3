"""`sandbox`: the entry point. It sees to streams and interrupts before the rest is loaded."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point. Exit status: the tool's own, 124 wall time, 125 ours, 126/127 cannot run, 128+N signal."""
    _open_missing_streams()
    # Python would end an import with a traceback. Where nothing has begun the signal may as well end us as it ends any
    # program; whoever started us with interrupts ignored keeps that.
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from sandbox.cli import app

    loaded = app.load(sys.argv)
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    app.run(loaded, sys.argv)


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
