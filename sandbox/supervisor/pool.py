"""Where calls get their jails: from the shelf of their kind, or made on the spot.

Shelves exist only for plans that hold nothing of one call (`planner._is_general`), at most KEYS_MAX of them, and only
while calls come: an idle runtime keeps neither standbys nor templates.
"""

from __future__ import annotations

import asyncio
import time

from sandbox.launchers.contract import Container, Launcher
from sandbox.plan import LaunchPlan
from sandbox.supervisor.shelf import Shelf

KEYS_MAX = 8
IDLE_S = 10.0


class Pool:
    """One launcher's containers, each handed out once. `close` it, or they outlive the supervisor's loop."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self._shelves: dict[str, Shelf] = {}
        self._timer: asyncio.TimerHandle | None = None

    def take(self, plan: LaunchPlan, kind: str) -> Container:
        """A jail for one call, parked already or being made. Close it after the call.

        `kind` names what the plan has in common with other calls' plans: jails are made for kinds.

        Raises OSError or LauncherUnavailable.
        """
        if not is_poolable(plan):
            return self.make(plan)
        shelf = self._shelves.get(kind)
        if shelf is None:
            if len(self._shelves) >= KEYS_MAX:
                oldest = min(self._shelves, key=lambda name: self._shelves[name].used_at)
                self._shelves.pop(oldest).close()
            shelf = self._shelves[kind] = Shelf(self.launcher.kind(plan), self.launcher)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S / 2, self._shrink)
        return shelf.take()

    def answered(self, kind: str) -> None:
        """A call of this kind has had its answer: what it took may be replaced without being in its way."""
        shelf = self._shelves.get(kind)
        if shelf is not None:
            shelf.answered()

    def make(self, plan: LaunchPlan) -> Container:
        """A jail of a builder's making, whatever stands on a shelf. Raises OSError or LauncherUnavailable."""
        return self.launcher.make(self.launcher.kind(plan))

    def _shrink(self) -> None:
        self._timer = None
        now = time.monotonic()
        for key, shelf in list(self._shelves.items()):
            if now - shelf.used_at > IDLE_S:
                self._shelves.pop(key).close()
            else:
                shelf.shrink()
        if self._shelves:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S / 2, self._shrink)

    def close(self) -> None:
        """End every standby and what the launcher started."""
        if self._timer is not None:
            self._timer.cancel()
        for shelf in self._shelves.values():
            shelf.close()
        self._shelves.clear()
        self.launcher.close()


def is_poolable(plan: LaunchPlan) -> bool:
    """Whether a jail for this plan may be made before its call is known: the planner says so by its template."""
    return plan.template is not None
