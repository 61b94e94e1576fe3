"""A call's network from the supervisor's side: hand the jail's listeners to the gateway, take the journal back.

The gateway starts with the first call that has an allowlist. A call that loses it is ended: what it was allowed to
reach is gone, and nobody would see what it tries.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

from sandbox.egress.client import Gateway, GatewayLost, Tie
from sandbox.errors import LauncherUnavailable, SandboxError
from sandbox.plan import LaunchPlan
from sandbox.supervisor import identity

LOST: Final = "gateway"
BREACH: Final = "network"


TRUST: Final = "trust"


class Egress:
    """The supervisor's gateways, each made when it is needed and again after it was lost.

    Calls with HTTP rules or secrets have one of their own: it reads what is sent and holds what nobody else may know.
    """

    def __init__(self) -> None:
        self._gateways: dict[bool, Gateway] = {}

    def gateway(self, policy: Mapping[str, Any]) -> Gateway:
        """The living gateway for such a call. It may still be starting."""
        reads_http = policy.get("http") is not None
        gateway = self._gateways.get(reads_http)
        if gateway is None or not gateway.is_alive:
            if gateway is not None:
                gateway.close()
            gateway = self._gateways[reads_http] = Gateway.start(identity.gateway_uid(), reads_http=reads_http)
        return gateway

    async def with_authority(self, plan: LaunchPlan, kind: str) -> tuple[LaunchPlan, str]:
        """The plan with the certificate in its step `trust`, where it has one, and the name of such plans.

        Raises LauncherUnavailable.
        """
        if plan.egress is None or all(step.name != TRUST for step in plan.steps):
            return plan, kind
        try:
            pem = await self.gateway(plan.egress).authority()
        except GatewayLost as error:
            raise LauncherUnavailable(str(error), step=TRUST) from None
        # A gateway that was started anew has another authority; jails that trust the old one are of no use.
        return plan.with_step_args(TRUST, authority=pem), f"{kind} {hashlib.sha256(pem.encode()).hexdigest()}"

    def close(self) -> None:
        for gateway in self._gateways.values():
            gateway.close()
        self._gateways.clear()


class CallEgress:
    """One call's part of it. `stop` ends the call with a reason."""

    def __init__(self, call_id: str, policy: Mapping[str, Any], egress: Egress, stop: Callable[[str], None]) -> None:
        self._policy = policy
        self._stop = stop
        self._gateway = egress.gateway(policy)
        self._tie = Tie(call_id, self._on_breach, lambda _why: stop(LOST))
        self._opening: asyncio.Task[None] | None = None
        self._is_closing = False

    def attach(self, jail_fds: dict[str, int], call_fds: dict[str, int]) -> None:
        """Hand over the listeners, taking them out of `jail_fds`. Connections wait in the backlog until they are.

        The values of secrets, which the caller sent along, go unread from `call_fds` to the gateway.
        """
        listeners = {name: jail_fds.pop(name) for name in list(jail_fds) if name.startswith("egress:")}
        if "secrets" in call_fds:
            listeners["secrets"] = call_fds.pop("secrets")
        self._opening = asyncio.get_running_loop().create_task(self._open(listeners))

    async def _open(self, listeners: dict[str, int]) -> None:
        try:
            await self._gateway.open(self._tie, self._policy, listeners)
        except (GatewayLost, SandboxError):
            self._stop(LOST)

    def _on_breach(self, _budget: str) -> None:
        if self._policy["on_breach"] == "kill":
            self._stop(BREACH)

    def begin_finish(self, *, drain: bool) -> None:
        """Have its flows ended, as nothing of the call runs any more; the gateway does so while we see to the rest.

        `drain` lets go on for a moment what was sent before the call ended by itself.
        """
        if self._opening is not None and self._opening.done():
            with contextlib.suppress(GatewayLost):  # `finish` tries again, and tells
                self._gateway.begin_close(self._tie, drain=drain)
                self._is_closing = True

    async def finish(self, *, drain: bool) -> dict[str, Any] | None:
        """End its flows, unless that was begun before; the journal, or None when it is lost."""
        if self._opening is None:
            return {"items": [], "totals": {}, "denials": []}
        with contextlib.suppress(GatewayLost):
            await self._opening
            if not self._is_closing:
                self._gateway.begin_close(self._tie, drain=drain)
            return await self._gateway.journal(self._tie)
        return None
