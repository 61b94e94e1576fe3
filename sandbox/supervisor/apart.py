"""Work that may block for as long as a driver likes, done in a daemon thread of its own, given up when it hangs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import queue
import threading
from collections.abc import Callable
from typing import Final, TypeVar

HANG_S: Final = 5.0
T = TypeVar("T")


class Apart:
    """One daemon thread for what may block for as long as the driver likes."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def do(self, work: Callable[[], T]) -> T:
        """Run `work` there. Raises what it raises, and TimeoutError when it hangs: then the thread is given up."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, args=(self._work,), daemon=True, name="nvml")
            self._thread.start()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - handed over to whoever waits
                _post(loop, done, functools.partial(done.set_exception, error))
            else:
                _post(loop, done, functools.partial(done.set_result, result))

        self._work.put(run)
        try:
            return await asyncio.wait_for(done, HANG_S)
        except TimeoutError:
            self.close()
            raise

    @staticmethod
    def _serve(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
        while (item := work.get()) is not None:
            item()

    def close(self) -> None:
        """Let the thread end when it can; the next piece of work gets a new one."""
        self._work.put(None)
        self._work, self._thread = queue.SimpleQueue(), None


def _post(loop: asyncio.AbstractEventLoop, done: asyncio.Future[T], settle: Callable[[], None]) -> None:
    # The loop may be closed by the time that a hung driver answers.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(lambda: None if done.done() else settle())
