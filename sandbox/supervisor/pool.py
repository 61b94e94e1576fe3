"""Where calls get their jails: from a standby that fits, or made on the spot.

A standby is a jail like any other, built, limited and sealed by the same steps, parked before its one call. Only what
does not depend on the call may be parked: a private workspace and no host path. A grant's deny rules and
sockets are looked for when it is mounted, and a file that appears later would be missed.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from sandbox._linux import cgroup
from sandbox.errors import LauncherUnavailable
from sandbox.launchers.jail import Jail, Zygote
from sandbox.plan import LaunchPlan
from sandbox.seccomp import compile as seccomp_compile
from sandbox.supervisor import identity
from sandbox.supervisor.limits import cgroup_limits, io_devices

STANDBYS_MAX = 8
KEYS_MAX = 8
IDLE_S = 10.0


class _Shelf:
    """The standbys of one kind of jail, and how many are wanted: more after each call that found none."""

    def __init__(self, plan: LaunchPlan) -> None:
        self.plan = plan
        self.parked: deque[Jail] = deque()
        self.wanted = 0
        self.used_at = 0.0


class Pool:
    """Makes jails, and keeps standbys of the kinds that were asked for lately."""

    def __init__(self, state: Path, tree: cgroup.Tree | None) -> None:
        self._state = state
        self._tree = tree
        self._host_uids: Iterator[int] | None = identity.host_uids()
        self._serial = itertools.count(1)
        self._filters: dict[str, bytes] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.zygote = Zygote.start()

    @property
    def own_user_namespace(self) -> bool:
        """Whether jails are built inside a user namespace of ours, as for every ordinary user."""
        return self._host_uids is None

    def take(self, plan: LaunchPlan) -> Jail:
        """A jail for one call, parked already or being made. It is handed out once; close it after the call.

        Raises OSError or LauncherUnavailable.
        """
        if not is_poolable(plan):
            return self._make(plan)
        shelf = self._shelf(plan)
        shelf.used_at = time.monotonic()
        jail = None
        while shelf.parked and jail is None:
            jail = shelf.parked.popleft()
            if jail.gone.is_set() or jail.failure:
                jail.close()
                jail = None
        if jail is None:
            shelf.wanted = min(STANDBYS_MAX, shelf.wanted * 2 or 1)
            jail = self._make(plan)
        asyncio.get_running_loop().call_soon(self._refill, shelf)
        self._watch_idle()
        return jail

    def _shelf(self, plan: LaunchPlan) -> _Shelf:
        key = kind_of(plan)
        shelf = self._shelves.get(key)
        if shelf is None:
            if len(self._shelves) >= KEYS_MAX:
                oldest = min(self._shelves, key=lambda name: self._shelves[name].used_at)
                self._drop(self._shelves.pop(oldest))
            shelf = self._shelves[key] = _Shelf(plan)
        return shelf

    def _refill(self, shelf: _Shelf) -> None:
        """One at a time, each started when the last is sealed, so that refilling does not crowd out calls."""
        if self._closed or len(shelf.parked) >= shelf.wanted:
            return
        if shelf.parked and not shelf.parked[-1].ready.is_set():
            return
        try:
            jail = self._make(shelf.plan)
        except (OSError, LauncherUnavailable):
            shelf.wanted = 0  # the next call makes its own, and says why it cannot
            return
        shelf.parked.append(jail)
        task = asyncio.get_running_loop().create_task(jail.ready.wait())
        task.add_done_callback(lambda _: self._refill(shelf))

    def _watch_idle(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(IDLE_S / 2, self._shrink)

    def _shrink(self) -> None:
        """An idle kind keeps no standbys."""
        self._timer = None
        now = time.monotonic()
        for key, shelf in list(self._shelves.items()):
            if now - shelf.used_at > IDLE_S:
                self._drop(self._shelves.pop(key))
        if self._shelves:
            self._watch_idle()

    def _drop(self, shelf: _Shelf) -> None:
        shelf.wanted = 0
        while shelf.parked:
            shelf.parked.popleft().close()

    def _make(self, plan: LaunchPlan) -> Jail:
        name = f"jail-{next(self._serial)}"
        limits = cgroup_limits(plan)
        group = None
        if self._tree is not None:
            group = self._tree.create(name, limits, io_devices(self._state, plan))
        elif limits:
            raise LauncherUnavailable("the plan names cgroups that this supervisor does not have", step="join_cgroup")
        host_uid = next(self._host_uids) if self._host_uids is not None else None
        jail = Jail(name, group, host_uid)
        steps = json.dumps({"steps": plan.to_json()["steps"]}, separators=(",", ":")).encode()
        try:
            jail.launch(
                self._live_zygote(), {"host_uid": host_uid, "mnt": str(self._state / "mnt")}, steps, self._filter(plan)
            )
        except BaseException:
            jail.close()
            raise
        return jail

    def _live_zygote(self) -> Zygote:
        """The zygote, a new one if the old was killed: its jails died with it, the next call need not."""
        if not self.zygote.is_alive():
            self.zygote.close()
            self.zygote = Zygote.start()
        return self.zygote

    def _filter(self, plan: LaunchPlan) -> bytes:
        key = json.dumps(plan.seccomp, sort_keys=True)
        if key not in self._filters:
            self._filters[key] = seccomp_compile.program(plan.seccomp, cache_dir=self._state / "cache")
        return self._filters[key]

    def close(self) -> None:
        """End every standby and the zygote."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for shelf in self._shelves.values():
            self._drop(shelf)
        self._shelves.clear()
        self.zygote.close()


def is_poolable(plan: LaunchPlan) -> bool:
    """Whether a jail for this plan may be made before its call is known: the planner says so by where `scratch` is."""
    return not plan.tty and any(step.name == "scratch" and step.where == "call" for step in plan.steps)


def kind_of(plan: LaunchPlan) -> str:
    """What two plans must have in common for one jail to serve either: every step, limit and the filter."""
    data = plan.to_json()
    kind = {name: data[name] for name in ("steps", "limits", "seccomp")}
    return hashlib.sha256(json.dumps(kind, sort_keys=True).encode()).hexdigest()
