"""A line on standard error for what takes longer than a second, when standard error is a terminal."""

from __future__ import annotations

import sys
import threading

TYPE_CHECKING = False

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

AFTER_S = 1.0


class Progress:
    """Shows `text` with a spinner from one second on until `stop`, which may be called from anywhere and repeatedly.

    rich is loaded only when there is something to show: most calls are over by then.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._lock = threading.Lock()
        self._stopped = False
        self._shown: Any = None
        self._timer = threading.Timer(AFTER_S, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _show(self) -> None:
        from rich.console import Console

        with self._lock:
            if not self._stopped:
                # No redirection: what the tool prints meanwhile goes to the descriptors and not through Python.
                self._shown = Console(stderr=True).status(f"sandbox: {self._text}")
                self._shown.start()

    def update(self, text: str) -> None:
        """Say something else from now on."""
        with self._lock:
            self._text = text
            if self._shown is not None:
                self._shown.update(f"sandbox: {text}")

    def stop(self) -> None:
        """Clear the line. What is printed afterwards stands alone."""
        self._timer.cancel()
        with self._lock:
            self._stopped = True
            shown, self._shown = self._shown, None
        if shown is not None:
            shown.stop()
