"""Removing the cgroups of ended jails off the loop: rmdir(2) there waits for locks that the whole host shares."""

from __future__ import annotations

import asyncio
import sys

from sandbox._linux import cgroup

TYPE_CHECKING = False

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# Several at a time: waking a thread costs more than a removal.
PAUSE_S = 0.05


class Burial:
    """Removes groups in a thread of its own, in their order. `close` waits for those that were given to it."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: list[cgroup.CallGroup] = []
        self._timer: asyncio.TimerHandle | None = None

    def bury(self, group: cgroup.CallGroup) -> None:
        """Kill what is left in it and remove it, soon. What would not die in time is left for `cgroup.reap`."""
        self._waiting.append(group)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._start)

    def _start(self) -> None:
        # Not before: who makes a single call ends sooner.
        from concurrent.futures import ThreadPoolExecutor

        self._timer = None
        groups, self._waiting = self._waiting, []
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="burial")
        self._thread.submit(_destroy, groups)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._thread is not None:
            self._thread.shutdown()
        _destroy(self._waiting)
        self._waiting.clear()


def _destroy(groups: list[cgroup.CallGroup]) -> None:
    for group in groups:
        try:
            group.destroy()
        except OSError as error:
            # Others depend on what comes after us; `cgroup.reap` will find it.
            print(f"sandbox: the group {group.name} was not removed: {error}", file=sys.stderr)
