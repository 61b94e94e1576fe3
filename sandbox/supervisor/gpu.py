"""GPUs from the supervisor's side: nothing of it is loaded on a host without one but the rule on device nodes.

That rule holds for every jail: one program (or list) on the supervisor's own group refuses each node that no call was
granted. Leases, accounts and the guard are `gpu_guard`'s, which is imported where /dev has an NVIDIA node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sandbox._linux import cgroup
from sandbox._linux.devices import DeviceRules
from sandbox.errors import LaunchError
from sandbox.host import HostFacts
from sandbox.launchers.group import ContainerGroup
from sandbox.plan import LaunchPlan

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Protocol

    from sandbox.launchers.contract import Container, Group
    from sandbox.supervisor.gpu_call import CallGpu
    from sandbox.supervisor.gpu_guard import Guard
else:
    Protocol = object


class Watched(Protocol):
    """What the guard needs of a running call."""

    jail: Container

    def stop(self, reason: str) -> None: ...


class Gpus:
    """The supervisor's GPUs. `calls` without a GPU are watched too, where there is one to be used without a grant."""

    def __init__(self, facts: HostFacts, tree: cgroup.Tree | None) -> None:
        self._guard: Guard | None = None
        self.data: Mapping[str, Any] | None = None
        grantable = []
        if facts.gpu_devices:
            from sandbox.gpu import inventory
            from sandbox.supervisor.gpu_guard import Guard

            self.data = inventory.find()
            if self.data is not None and self.data["units"]:
                self._guard = Guard(self.data, tree.name if tree is not None else "")
                grantable = self._guard.grantable()
        v2, v1 = (tree.v2, tree.v1.get("devices", "")) if tree is not None else ("", "")
        self._rules = DeviceRules.open(v2, v1, grantable)

    def __repr__(self) -> str:
        return f"<Gpus {self._guard or 'none'} {self._rules}>"

    def complete(self, facts: HostFacts) -> HostFacts:
        """The host's facts with what was found here."""
        return replace(facts, gpu=self.data, device_rule=self._rules.kind)

    async def open_call(self, call_id: str, plan: LaunchPlan) -> CallGpu | None:
        """Lease what the plan asks for. None where no GPU is in sight, neither granted nor to be watched.

        Raises LaunchError when none is free.
        """
        if self._guard is None:
            if plan.gpu is not None:
                raise LaunchError("the GPUs that the plan was made for are gone", step="gpu_lease")
            return None
        return await self._guard.open_call(call_id, plan)

    def admit(self, group: Group | None, gpu: CallGpu | None) -> None:
        """Let a call's group open what was granted to it, before the tool runs. Raises OSError.

        A container of an engine's is under that engine's rule, which lists what the container was made with.
        """
        if group is not None and not isinstance(group, ContainerGroup):
            granted = gpu.device_rules() if gpu is not None else ()
            self._rules.admit(group.v2, group.v1.get("devices", ""), granted)

    def admitted(self, make: Callable[[], Container]) -> Container:
        """A jail that stands in for the one that a call was given and that died: its group is held to no GPU, too.

        Calls that were granted one never get another jail: theirs is made for them. Raises OSError.
        """
        jail = make()
        try:
            self.admit(jail.group, None)
        except BaseException:
            jail.close()
            raise
        return jail

    def close(self) -> None:
        self._rules.close()
        if self._guard is not None:
            self._guard.close()
