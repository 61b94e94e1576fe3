"""A call's network from the supervisor's side: hand the jail's listeners to the gateway, take the journal back.

The gateway starts with the first call that has an allowlist. A call that loses it is ended: what it was allowed to
reach is gone, and nobody would see what it tries.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from sandbox.egress.client import Gateway, GatewayLost, Tie
from sandbox.errors import SandboxError
from sandbox.supervisor import identity

LOST: Final = "gateway"
BREACH: Final = "network"


class Egress:
    """The supervisor's one gateway, made when it is needed and again after it was lost."""

    def __init__(self) -> None:
        self._gateway: Gateway | None = None

    def gateway(self) -> Gateway:
        """The living gateway. It may still be starting."""
        if self._gateway is None or not self._gateway.is_alive:
            self.close()
            self._gateway = Gateway.start(identity.gateway_uid())
        return self._gateway

    def close(self) -> None:
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None


class CallEgress:
    """One call's part of it. `stop` ends the call with a reason."""

    def __init__(self, call_id: str, policy: Mapping[str, Any], egress: Egress, stop: Callable[[str], None]) -> None:
        self._policy = policy
        self._stop = stop
        self._gateway = egress.gateway()
        self._tie = Tie(call_id, self._on_breach, lambda _why: stop(LOST))
        self._opening: asyncio.Task[None] | None = None

    def attach(self, jail_fds: dict[str, int]) -> None:
        """Hand over the listeners, taking them out of `jail_fds`. Connections wait in the backlog until they are."""
        listeners = {name: jail_fds.pop(name) for name in list(jail_fds) if name.startswith("egress:")}
        self._opening = asyncio.get_running_loop().create_task(self._open(listeners))

    async def _open(self, listeners: dict[str, int]) -> None:
        try:
            await self._gateway.open(self._tie, self._policy, listeners)
        except (GatewayLost, SandboxError):
            self._stop(LOST)

    def _on_breach(self, _budget: str) -> None:
        if self._policy["on_breach"] == "kill":
            self._stop(BREACH)

    async def finish(self) -> dict[str, Any] | None:
        """The journal (`items`, `totals`, `denials`) when nothing of the call runs any more; None when it is lost."""
        if self._opening is None:
            return {"items": [], "totals": {}, "denials": []}
        with contextlib.suppress(GatewayLost):
            await self._opening
            return await self._gateway.close_call(self._tie)
        return None
