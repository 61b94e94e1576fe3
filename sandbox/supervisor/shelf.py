"""One kind of jail: its template, and its standbys.

A standby is a jail like any other, limited and sealed by the same steps, parked before its one call. How many are
wanted follows demand: more after each call that found none, fewer when fewer calls came lately.

A template that fails or is killed costs nobody a call: the next ones get jails of a builder's making, and a new
template is tried after a while, the longer the more often it failed.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque

from sandbox.errors import LauncherUnavailable
from sandbox.launchers.contract import Container, Launcher
from sandbox.launchers.jail import Jail
from sandbox.supervisor import identity
from sandbox.supervisor.maker import Kind, Maker

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

STANDBYS_MAX = 8
TEMPLATE_TIMEOUT_S = 60.0
# Refilling starts when the call that took the standby has been answered, and its caller has had time to take the
# answer: until then they would compete. Of a call that takes longer the end is not waited for.
REFILL_DELAY_S = 0.01
ANSWERED_DELAY_S = 0.0005
# A kind's first call makes its own way, and a template in the making would take its core: it comes when that call is
# answered, or with the second call.
FIRST_DELAY_S = 0.2
RETRY_S = 0.25
RETRY_MAX_S = 60.0
LOST_MAX = 3


class Template:
    """A template and the jails that were forked from it: it has to stay until the last of them has ended.

    `is_proven`: one of them was sealed, so that calls may be given its jails before they are.
    """

    def __init__(self, jail: Jail) -> None:
        self.jail = jail
        self.is_proven = False
        self.is_retired = False
        self._children: set[Jail] = set()
        self._index = itertools.cycle(range(identity.BLOCK))

    def fork(self, maker: Maker, kind: Kind) -> Jail:
        """Raises OSError when it is gone."""
        child = maker.fork(kind, self.jail, next(self._index))
        child.on_closed = self._closed
        self._children.add(child)
        return child

    def _closed(self, child: Jail) -> None:
        self._children.discard(child)
        self._end_if_unused()

    def retire(self) -> None:
        """Fork no more; end with the last child."""
        self.is_retired = True
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        if self.is_retired and not self._children:
            self.jail.close()


class Shelf:
    """Hands out jails of one kind, each once."""

    def __init__(self, kind: Any, launcher: Launcher) -> None:
        self.kind = kind
        self.used_at = time.monotonic()
        self._launcher = launcher
        # The native launcher alone has templates.
        self._maker = launcher if isinstance(launcher, Maker) else None
        self._loop = asyncio.get_running_loop()
        self._parked: deque[Container] = deque()
        self._wanted = 0
        self._taken = 0
        self._template: Template | None = None
        self._failures = 0
        self._lost = 0
        self._not_before = 0.0
        self._is_making = False
        self._is_closed = False
        self._refill_timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Shelf parked={len(self._parked)} wanted={self._wanted} failures={self._failures}>"

    def take(self) -> Container:
        """A standby, or else a jail that is made now. Raises OSError or LauncherUnavailable."""
        self.used_at = time.monotonic()
        self._taken += 1
        is_first = self._wanted == 0 and self._template is None
        self._refill_in(FIRST_DELAY_S if is_first else REFILL_DELAY_S)
        while self._parked:
            jail = self._parked.popleft()
            if jail.is_usable():
                return jail
            jail.close()
        self._wanted = min(STANDBYS_MAX, self._wanted * 2 or 1)
        if self._maker is not None and self._template is not None and self._template.is_proven:
            try:
                return self._template.fork(self._maker, self.kind)
            except OSError:
                self._template_failed(self._template)
        return self._launcher.make(self.kind)

    def answered(self) -> None:
        """A call that was given a jail from here has had its answer."""
        if not self._is_closed:
            self._refill_in(ANSWERED_DELAY_S)

    def _refill_in(self, delay_s: float) -> None:
        """Refill then, or sooner if that is intended already; after a failure no sooner than is intended."""
        if self._refill_timer is not None:
            now = self._loop.time()
            if self._refill_timer.when() <= now + delay_s or now < self._not_before:
                return
            self._refill_timer.cancel()
        self._refill_timer = self._loop.call_later(delay_s, self._refill)

    def shrink(self) -> None:
        """Keep no more standbys than there were calls since the last look."""
        self._wanted = min(self._wanted, self._taken)
        self._taken = 0
        while len(self._parked) > self._wanted:
            self._parked.pop().close()

    def close(self) -> None:
        """Keep nothing. Jails that were handed out live on, and their template with them."""
        self._is_closed = True
        if self._refill_timer is not None:
            self._refill_timer.cancel()
        while self._parked:
            self._parked.popleft().close()
        if self._template is not None:
            self._template.retire()
            self._template = None

    def _refill(self) -> None:
        """One at a time, each started when the last is sealed, so that refilling does not crowd out calls."""
        self._refill_timer = None
        if self._is_closed or self._is_making:
            return
        if self._parked and isinstance(self._parked[0], Jail) and self._parked[0].steps_applied:
            # The next to be taken. Not all of them: each would hold seven descriptors more.
            self._parked[0].prepare()
        if len(self._parked) >= self._wanted:
            return
        try:
            if self._maker is not None and self._template is None and time.monotonic() >= self._not_before:
                self._start_template(self._maker)
                return
            # Without a template standbys are made as any other jail.
            template = self._template if self._template is not None and self._template.jail.is_serving else None
            jail: Container
            if self._maker is not None and template is not None:
                jail = template.fork(self._maker, self.kind)
            else:
                jail = self._launcher.make(self.kind)
        except (OSError, LauncherUnavailable):
            self._failed()
            return
        self._is_making = True
        self._parked.append(jail)
        jail.when_settled(lambda: self._standby_settled(jail, template))

    def _start_template(self, maker: Maker) -> None:
        self._is_making = True
        try:
            template = self._template = Template(maker.make(self.kind, template=True))
        except BaseException:
            self._is_making = False
            raise
        timer = self._loop.call_later(TEMPLATE_TIMEOUT_S, template.jail.kill)

        def settled() -> None:
            timer.cancel()
            self._is_making = False
            if not template.jail.is_serving:
                self._template_failed(template)
            self._refill()

        template.jail.when_settled(settled)
        template.jail.on_end = lambda: self._template_failed(template)

    def _standby_settled(self, jail: Container, template: Template | None) -> None:
        self._is_making = False
        if jail.steps_applied and not jail.failure:
            self._lost = 0
            if template is not None:
                template.is_proven = True
        elif jail.failure or self._lost >= LOST_MAX:
            self._template_failed(template) if template is not None else self._failed()
        elif not (jail.is_closed or jail.is_killed):
            self._lost += 1
        self._refill()

    def _template_failed(self, template: Template) -> None:
        """It could not be made, makes no jails, or was killed. Known already when it is not the current one."""
        if template is not self._template:
            return
        self._template = None
        if template.is_proven:
            self._failures = 0
        template.retire()
        self._failed()

    def _failed(self) -> None:
        delay_s = min(RETRY_S * 2**self._failures, RETRY_MAX_S)
        self._failures += 1
        self._not_before = time.monotonic() + delay_s
        if self._refill_timer is None and not self._is_closed:
            self._refill_timer = self._loop.call_later(delay_s, self._refill)
