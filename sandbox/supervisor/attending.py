"""The launchers whose containers are made around our own view (`oci`, `nsjail`), as the supervisor sees them.

Each has a zygote of its own, started with the first container and on the loop's thread, which its death signal follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from sandbox.errors import LauncherUnavailable
from sandbox.launchers import attended, nsjail, oci
from sandbox.launchers.contract import Setting
from sandbox.launchers.jail import Jail
from sandbox.launchers.zygote import Zygote
from sandbox.plan import LaunchPlan
from sandbox.seccomp import shipped
from sandbox.supervisor import maker


@dataclass(frozen=True)
class Kind:
    """What containers of one plan have in common: limits as for a jail, and what is written for the runtime."""

    limited: maker.Kind
    made: attended.Kind


class Attending:
    """Makes containers by one of several runtimes: the plan says by which."""

    def __init__(self, name: str, flavours: Mapping[str, attended.Flavour], setting: Setting) -> None:
        self.name = name
        self._flavours = flavours
        self._setting = setting
        self._serial = itertools.count(1)
        self._zygote: Zygote | None = None

    @property
    def own_user_namespace(self) -> bool:
        """Whether views are built inside a user namespace of ours, as for every ordinary user."""
        return self._setting.host_uids is None

    def kind(self, plan: LaunchPlan) -> Kind:
        flavour = self._flavours[plan.isolation.get("runtime", "")]
        program = shipped.program(plan.seccomp, self._setting.state / "cache")
        return Kind(maker.Kind(plan, program, self._setting.disks), attended.Kind(plan, flavour, program))

    def make(self, kind: Kind) -> Jail:
        """A container on its way to being sealed. Raises OSError or LauncherUnavailable."""
        setting = self._setting
        host_uid = next(setting.host_uids) if setting.host_uids is not None else None
        name = f"{kind.made.flavour.name}-{next(self._serial)}"
        group = None
        if setting.tree is not None:
            group = setting.tree.create(name, _roomy(kind), kind.limited.devices)
        elif kind.limited.limits:
            raise LauncherUnavailable("the plan names cgroups that this supervisor does not have", step="join_cgroup")
        jail = Jail(name, group, host_uid)
        if "pids" in kind.limited.limits and kind.made.flavour.making_tasks:
            jail.when_settled(lambda: _tighten(jail, int(kind.limited.limits["pids"])))
        try:
            attended.launch(jail, self._live_zygote(), kind.made, setting.state)
        except BaseException:
            jail.close()
            raise
        return jail

    def _live_zygote(self) -> Zygote:
        if self._zygote is None or not self._zygote.is_alive():
            if self._zygote is not None:
                self._zygote.close()
            self._zygote = Zygote.start()
        return self._zygote

    def close(self) -> None:
        """End the zygote, and with it whatever it gave birth to."""
        if self._zygote is not None:
            self._zygote.close()


def _roomy(kind: Kind) -> dict[str, float | int]:
    """The call's limits with room for the runtime's own threads."""
    limits, flavour = dict(kind.limited.limits), kind.made.flavour
    if "pids" in limits:
        limits["pids"] += flavour.own_tasks + flavour.making_tasks
    return limits


def _tighten(jail: Jail, pids: int) -> None:
    """The container is made and nothing of the call runs yet: what the runtime needed is taken away."""
    if jail.group is None:
        return
    try:
        jail.group.apply({"pids": pids})
    except OSError as error:
        jail.failure = {"step": "join_cgroup", "errno": error.errno or 0, "message": str(error)}
        jail.kill()


def open_oci(setting: Setting) -> Attending:
    return Attending("oci", oci.FLAVOURS, setting)


def open_nsjail(setting: Setting) -> Attending:
    return Attending("nsjail", {"": nsjail.NSJAIL}, setting)
