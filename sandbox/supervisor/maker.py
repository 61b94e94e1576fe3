"""Makes jails: names them, gives them a uid and a cgroup, and has the zygote or a template give birth to them."""

from __future__ import annotations

import itertools
import json
from functools import cached_property

from sandbox.errors import LauncherUnavailable
from sandbox.launchers.burial import Burial
from sandbox.launchers.contract import Setting
from sandbox.launchers.jail import Jail, mount_point
from sandbox.launchers.zygote import Zygote
from sandbox.plan import LaunchPlan
from sandbox.seccomp import shipped
from sandbox.supervisor import identity
from sandbox.supervisor.limits import cgroup_limits, io_devices

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


class Kind:
    """What jails of one plan have in common, worked out once."""

    def __init__(self, plan: LaunchPlan, program: bytes, disks: tuple[str, ...]) -> None:
        self.plan = plan
        self.program = program
        self.disks = disks

    @cached_property
    def limits(self) -> dict[str, float | int]:
        limits = cgroup_limits(self.plan)
        if not self.devices:
            limits.pop("io_bytes_per_s", None)
        return limits

    @cached_property
    def devices(self) -> list[str]:
        limited = any(limit.control == "io" and limit.applied is not None for limit in self.plan.limits)
        return io_devices(self.plan, self.disks) if limited else []

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = self.plan.to_json()["steps"]
        return steps

    def content(self, *, template: bool) -> bytes:
        """What builder, template and pid 1 need of the plan."""
        content: dict[str, Any] = {"steps": self.steps}
        if template:
            content["template"] = self.plan.template
        return json.dumps(content, separators=(",", ":")).encode()


class Maker:
    """The native launcher. Owns the zygote, the uids and the filters. What it makes belongs to who asked for it."""

    name = "jail"

    def __init__(self, setting: Setting, zygote: Zygote | None = None) -> None:
        """`zygote`: one that has been begun. Raises LauncherUnavailable when it does not come up."""
        self._state = setting.state
        self._tree = setting.tree
        self._disks = setting.disks
        self._host_uids = setting.host_uids
        self._serial = itertools.count(1)
        self._filters: dict[str, bytes] = {}
        self._burial = Burial()
        self.zygote = zygote or Zygote.begin()
        self.zygote.wait_ready()

    @property
    def own_user_namespace(self) -> bool:
        """Whether jails are built inside a user namespace of ours, as for every ordinary user."""
        return self._host_uids is None

    def kind(self, plan: LaunchPlan) -> Kind:
        return Kind(plan, self._filter(plan), self._disks)

    def make(self, kind: Kind, *, template: bool = False) -> Jail:
        """A jail, or a template, of a builder's making. Raises OSError or LauncherUnavailable."""
        host_uid = next(self._host_uids) if self._host_uids is not None else None
        jail = self._new(kind, host_uid)
        message: dict[str, object] = {"mnt": str(mount_point(self._state)), "host_uid": host_uid}
        if template and host_uid is not None:
            message["uid_count"] = identity.BLOCK
        try:
            jail.launch(self._live_zygote(), message, kind.content(template=template), kind.program)
        except BaseException:
            jail.close()
            raise
        return jail

    def fork(self, kind: Kind, template: Jail, index: int) -> Jail:
        """A jail from a template that serves. Raises OSError when the template is gone."""
        base = template.host_uid
        jail = self._new(kind, None if base is None else base + index)
        settings = kind.plan.template or {}
        if settings.get("function"):
            jail.usual = (settings["env"], settings["cwd"])
        try:
            jail.launch_from(template, 0 if base is None else index)
        except BaseException:
            jail.close()
            raise
        return jail

    def _new(self, kind: Kind, host_uid: int | None) -> Jail:
        """A jail's name and group; nothing of it runs yet."""
        name = f"jail-{next(self._serial)}"
        group = None
        if self._tree is not None:
            group = self._tree.create(name, kind.limits, kind.devices)
        elif kind.limits:
            raise LauncherUnavailable("the plan names cgroups that this supervisor does not have", step="join_cgroup")
        jail = Jail(name, group, host_uid)
        jail.bury = self._burial.bury
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
            self._filters[key] = shipped.program(plan.seccomp, self._state / "cache")
        return self._filters[key]

    def close(self) -> None:
        """End the zygote, and with it whatever it gave birth to; remove the groups of jails that were closed."""
        self.zygote.end()
        try:
            self._burial.close()
        finally:
            self.zygote.close()
