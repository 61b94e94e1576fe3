"""Removing the cgroups of ended jails off the loop: rmdir(2) there waits for locks that the whole host shares."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sandbox._linux import cgroup

# Several at a time: waking a thread costs more than a removal.
PAUSE_S = 0.05


class Burial:
    """Removes groups in a thread of its own, in their order. `close` waits for those that were given to it."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="burial")
        self._waiting: list[cgroup.CallGroup] = []
        self._timer: asyncio.TimerHandle | None = None

    def bury(self, group: cgroup.CallGroup) -> None:
        """Kill what is left in it and remove it, soon. What would not die in time is left for `cgroup.reap`."""
        self._waiting.append(group)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(PAUSE_S, self._start)

    def _start(self) -> None:
        self._timer = None
        groups, self._waiting = self._waiting, []
        self._thread.submit(_destroy, groups)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._start()
        self._thread.shutdown()


def _destroy(groups: list[cgroup.CallGroup]) -> None:
    for group in groups:
        group.destroy()
