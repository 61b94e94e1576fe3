"""Where calls get their jails: from a standby that fits, or made on the spot.

A standby is a jail like any other, limited and sealed by the same steps, parked before its one call. Standbys are
forked from a template: a process that holds the root view and, for functions, what the tool imports. Both
exist only for plans that hold nothing of one call (`planner._is_general`).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sandbox._linux import cgroup
from sandbox.errors import LauncherUnavailable
from sandbox.launchers.jail import Jail, Zygote, mount_point
from sandbox.plan import LaunchPlan
from sandbox.seccomp import compile as seccomp_compile
from sandbox.supervisor import identity
from sandbox.supervisor.limits import cgroup_limits, io_devices

STANDBYS_MAX = 8
KEYS_MAX = 8
IDLE_S = 10.0


class _Shelf:
    """One kind of jail: its template, its standbys, and how many are wanted: more after each call that found none.

    `is_proven`: a jail from the template was sealed, so the template may serve calls directly.
    """

    def __init__(self, plan: LaunchPlan) -> None:
        self.plan = plan
        self.parked: deque[Jail] = deque()
        self.wanted = 0
        self.used_at = 0.0
        self.template: Jail | None = None
        self.is_proven = False
        self.is_hopeless = False
        self.index = itertools.cycle(range(identity.BLOCK))
        self.children: set[Jail] = set()


class Pool:
    """Makes jails, and keeps standbys of the kinds that were asked for lately."""

    def __init__(self, state: Path, tree: cgroup.Tree | None, disks: tuple[str, ...]) -> None:
        self._state = state
        self._tree = tree
        self._disks = disks
        self._host_uids: Iterator[int] | None = identity.host_uids()
        self._serial = itertools.count(1)
        self._filters: dict[str, bytes] = {}
        self._shelves: dict[str, _Shelf] = {}
        self._retired: list[_Shelf] = []
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self.zygote = Zygote.start()

    @property
    def own_user_namespace(self) -> bool:
        """Whether jails are built inside a user namespace of ours, as for every ordinary user."""
        return self._host_uids is None

    def take(self, plan: LaunchPlan, kind: str) -> Jail:
        """A jail for one call, parked already or being made. It is handed out once; put it back after the call.

        `kind` names what the plan has in common with other calls' plans: jails are made for kinds.

        Raises OSError or LauncherUnavailable.
        """
        if not is_poolable(plan):
            return self._make(plan)
        shelf = self._shelf(plan, kind)
        shelf.used_at = time.monotonic()
        jail = self._parked(shelf)
        if jail is None:
            shelf.wanted = min(STANDBYS_MAX, shelf.wanted * 2 or 1)
            jail = self._fork(shelf) if shelf.is_proven else self._make(plan)
        asyncio.get_running_loop().call_soon(self._refill, shelf)
        self._watch_idle()
        return jail

    def _parked(self, shelf: _Shelf) -> Jail | None:
        while shelf.parked:
            jail = shelf.parked.popleft()
            if not jail.gone.is_set() and not jail.failure:
                return jail
            self.put_back(jail)
        return None

    def put_back(self, jail: Jail) -> None:
        """End of a jail's one use: everything of it is given back."""
        jail.close()
        for shelf in (*self._shelves.values(), *self._retired):
            shelf.children.discard(jail)
        self._forget_empty()

    def _shelf(self, plan: LaunchPlan, key: str) -> _Shelf:
        shelf = self._shelves.get(key)
        if shelf is None:
            if len(self._shelves) >= KEYS_MAX:
                oldest = min(self._shelves, key=lambda name: self._shelves[name].used_at)
                self._drop(self._shelves.pop(oldest))
            shelf = self._shelves[key] = _Shelf(plan)
        return shelf

    def _refill(self, shelf: _Shelf) -> None:
        """One at a time, each started when the last is sealed, so that refilling does not crowd out calls."""
        if self._closed or shelf.wanted == 0 or len(shelf.parked) >= shelf.wanted:
            return
        if shelf.parked and not shelf.parked[-1].ready.is_set():
            return
        loop = asyncio.get_running_loop()
        try:
            if shelf.template is None and not shelf.is_hopeless:
                shelf.template = self._make(shelf.plan, template=True)
                task = loop.create_task(shelf.template.ready.wait())
                task.add_done_callback(lambda _: self._refill(shelf))
                return
            if shelf.template is not None and not shelf.template.ready.is_set():
                return
            jail = self._make(shelf.plan) if shelf.is_hopeless else self._fork(shelf)
        except (OSError, LauncherUnavailable):
            self._give_up(shelf)
            return
        shelf.parked.append(jail)
        task = loop.create_task(jail.ready.wait())
        task.add_done_callback(lambda _: self._sealed(shelf, jail))

    def _sealed(self, shelf: _Shelf, jail: Jail) -> None:
        if jail.failure or (jail.gone.is_set() and not jail.steps_applied):
            self._give_up(shelf)
        elif shelf.template is not None:
            shelf.is_proven = True
        self._refill(shelf)

    def _give_up(self, shelf: _Shelf) -> None:
        """This kind's template does not work here (or was killed): its calls get jails of a builder's making."""
        shelf.is_hopeless, shelf.is_proven, shelf.wanted = True, False, 0
        while shelf.parked:
            self.put_back(shelf.parked.popleft())
        if shelf.template is not None:
            self._retired.append(_retire(shelf))
            self._forget_empty()

    def _forget_empty(self) -> None:
        for shelf in [shelf for shelf in self._retired if not shelf.children]:
            self._retired.remove(shelf)
            if shelf.template is not None:
                shelf.template.close()

    def _fork(self, shelf: _Shelf) -> Jail:
        """A jail from the kind's template. Raises OSError when the template is gone."""
        assert shelf.template is not None
        base = shelf.template.host_uid
        index = 0 if base is None else next(shelf.index)
        jail = self._new(shelf.plan, None if base is None else base + index)
        try:
            jail.launch_from(shelf.template, index)
        except BaseException:
            jail.close()
            raise
        shelf.children.add(jail)
        return jail

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
        """Keep no standbys of this kind; its template goes when its last child has ended."""
        shelf.wanted = 0
        while shelf.parked:
            self.put_back(shelf.parked.popleft())
        if shelf.template is not None:
            self._retired.append(_retire(shelf))
            self._forget_empty()

    def _new(self, plan: LaunchPlan, host_uid: int | None) -> Jail:
        """A jail's name and group; nothing of it runs yet. Raises OSError or LauncherUnavailable."""
        name = f"jail-{next(self._serial)}"
        limits = cgroup_limits(plan)
        group = None
        if self._tree is not None:
            devices = io_devices(plan, self._disks) if "io_bytes_per_s" in limits else []
            if not devices:
                limits.pop("io_bytes_per_s", None)
            group = self._tree.create(name, limits, devices)
        elif limits:
            raise LauncherUnavailable("the plan names cgroups that this supervisor does not have", step="join_cgroup")
        return Jail(name, group, host_uid)

    def _make(self, plan: LaunchPlan, *, template: bool = False) -> Jail:
        """A jail, or a template, of a builder's making."""
        host_uid = next(self._host_uids) if self._host_uids is not None else None
        jail = self._new(plan, host_uid)
        message: dict[str, object] = {"mnt": str(mount_point(self._state)), "host_uid": host_uid}
        if template and host_uid is not None:
            message["uid_count"] = identity.BLOCK
        content: dict[str, Any] = {"steps": plan.to_json()["steps"]}
        if template:
            content["template"] = plan.template
        try:
            data = json.dumps(content, separators=(",", ":")).encode()
            jail.launch(self._live_zygote(), message, data, self._filter(plan))
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
        for shelf in self._retired:
            if shelf.template is not None:
                shelf.template.close()
        self._retired.clear()
        self.zygote.close()


def _retire(shelf: _Shelf) -> _Shelf:
    """Split off what has to live until the children have ended, so that the shelf can be used anew."""
    old = _Shelf(shelf.plan)
    old.template, old.children = shelf.template, shelf.children
    shelf.template, shelf.children = None, set()
    return old


def is_poolable(plan: LaunchPlan) -> bool:
    """Whether a jail for this plan may be made before its call is known: the planner says so by its template."""
    return plan.template is not None
