"""How one container of the launcher `docker` comes to be, and how nothing of it is left: what blocks, in threads.

What was made is known at once, in this object, so that `dispose` finds it however far the making has come.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sandbox._linux import cgroup, etc
from sandbox.errors import LaunchError
from sandbox.launchers import docker_config as config
from sandbox.launchers.contract import Setting
from sandbox.launchers.docker_daemons import Daemons
from sandbox.launchers.docker_engine import Engine, refuse_devices
from sandbox.launchers.gate import Gate
from sandbox.launchers.group import ContainerGroup, common_path, remove_everywhere
from sandbox.launchers.keeper import Keeper
from sandbox.plan import LaunchPlan

_CDI_HINT: Final = (
    "use Docker 25 or newer with {'features': {'cdi': true}} in its daemon.json, and write the specification: "
    "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml"
)


@dataclass(frozen=True)
class Kind:
    """What containers of one plan have in common."""

    plan: LaunchPlan
    seccomp: Mapping[str, Any]


@dataclass(frozen=True)
class Site:
    """Where a supervisor's containers are made. `directory`: that of their gates, closed to others.

    `disk_nodes`: a node of each of the host's disks, for a daemon that asks it for its number.
    """

    setting: Setting
    layout: cgroup.Layout
    daemons: Daemons
    directory: Path
    keeper: Keeper
    disk_nodes: tuple[str, ...] = ()


class Making:
    """One container on its way. `uid`: its own on this host. `is_given_up`: it is not to be started any more.

    `is_built`: what is mounted in it was put together before, and `fds` came out of that.
    """

    is_built = False

    def __init__(self, site: Site, kind: Kind, name: str, uid: int) -> None:
        self.plan = kind.plan
        self.name = name
        self.uid = uid
        self.layout = site.layout
        self.group = ContainerGroup(name, None)
        self.engine: Engine | None = None
        self.gate: Gate | None = None
        self.id = ""
        self.pid = -1
        self.python = ""
        self.details: dict[str, Any] = {}
        self.notes: list[str] = []
        self.pipes: dict[str, int] = {}
        self.fds: dict[str, int] = {}
        self.is_given_up = False
        self._site = site
        self._seccomp = kind.seccomp

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name} id={self.id[:12] or '-'} pid={self.pid}>"

    def make(self) -> None:
        """Directory, container, start. Raises LaunchError, or OSError when the directory cannot be made."""
        container = config.step(self.plan, "container")
        self.engine = engine = self._site.daemons.engine(container["engine"])
        self.check(engine)
        image = engine.image(container["image"])
        if container["function"]:
            self.python = self._site.daemons.python(engine, image["Id"], container)
        self.plan = self._complete_plan(image["Id"])
        self.gate = self._make_gate()
        # Held open from here on: when we are gone, the waiting shell reads the end of it and goes too.
        self.pipes["go"] = self.gate.open_both("go")
        # A shell that opens it only when we are gone would wait for ever.
        self._site.keeper.expect(self.name, f"{self.gate.pipes}/go")
        wanted = self._wanted(image, self._make_group())
        self.details |= {"image_digest": image["Id"], "repo_digests": list(image.get("RepoDigests") or ())}
        if wanted.volumes:
            self.notes.append(f"volumes of the image are empty and read-only: {', '.join(wanted.volumes)}")
        self.prepare()
        name = f"{config.LABEL}-{self._site.setting.owner}-{self.name}-{os.urandom(3).hex()}"
        self.id = engine.create(self.body(wanted), name)
        self.details["container_id"] = self.id
        if not self.is_given_up:
            self.pid = engine.start(self.id)
            self.started()

    def check(self, engine: Engine) -> None:
        """Whether this daemon gives what the plan wants of it. Raises LaunchError."""
        _check_devices(engine, config.step(self.plan, "container").get("devices", ()))

    def prepare(self) -> None:
        """What has to be there before the engine makes the container: for most, only what the gate holds."""

    def started(self) -> None:
        """The engine has made it and runs it."""

    def body(self, wanted: config.Wanted) -> dict[str, Any]:
        return config.create_body(wanted)

    def _wanted(self, image: Mapping[str, Any], parent: str) -> config.Wanted:
        assert self.gate is not None
        if config.step(self.plan, "container").get("devices") and not parent:
            # What a process does on a GPU is told by its group: elsewhere its limits would be nobody's.
            message = "a GPU is given to containers below a group of ours only, and this daemon makes its own"
            raise LaunchError(message, step="gpu", hint="run it with --exec-opt native.cgroupdriver=cgroupfs")
        return config.Wanted(
            self.plan,
            str(self.gate.path),
            self.uid,
            self._seccomp,
            self._site.daemons.labels("call"),
            cgroup_parent=parent,
            volumes=tuple((image.get("Config") or {}).get("Volumes") or ()),
            disks=self._site.disk_nodes,
        )

    def _complete_plan(self, image_id: str) -> LaunchPlan:
        """The plan with the image's digest, and for each grant whether it is a directory: its place is made so."""
        plan = self.plan.with_step_args("container", image_id=image_id)
        links = {real: asked for asked, real in config.step(plan, "grants").get("links", ())}
        for name in ("grants", "inner_grants"):
            paths = [
                {**grant, "is_directory": os.path.isdir(grant["host_path"])}
                for grant in config.step(plan, name).get("paths", ())
            ]
            paths += [{**grant, "jail_path": links[at]} for grant in paths if (at := grant["jail_path"]) in links]
            plan = plan.with_step_args(name, paths=paths)
        return plan

    def _make_gate(self) -> Gate:
        settings = config.step(self.plan, "etc_files")
        files = etc.files(settings["hostname"], settings["home"], settings["nameserver"], self.uid)
        path = self._site.directory / self.name
        return Gate.make(path, files, config.step(self.plan, "system_view")["runtime_files"])

    def _make_group(self) -> str:
        """A group of ours around the container, where the daemon can be told of one path for every tree."""
        assert self.engine is not None
        tree = self._site.setting.tree
        if tree is None or self.engine.info.get("CgroupDriver") != "cgroupfs":
            return ""
        below = tree.create(self.name, {})
        path = common_path(below, self.layout)
        if not path:
            below.destroy()
            return ""
        self.group.below = below
        return path

    def check_io(self) -> None:
        """A daemon leaves a limit that it cannot set away, with a warning in place of an error. Raises LaunchError."""
        limit = self.plan.limit("io")
        if limit is None or limit.applied is None:
            return
        if without := set(self._site.setting.disks) - self.group.io_limited():
            raise LaunchError(f"the daemon has not limited the traffic of disk {', '.join(sorted(without))}", step="io")

    def dispose(self) -> None:
        """Remove container, group and directory. What a dead daemon keeps, the next start removes.

        Precondition: `make` has come back, or was never called.
        """
        for left in (self.pipes, self.fds):  # opened after the container was closed
            for fd in left.values():
                os.close(fd)
            left.clear()
        if self.engine is not None and self.id:
            with contextlib.suppress(LaunchError):
                self.engine.remove(self.id)
        if self.group.below is not None:
            path = common_path(self.group.below, self.layout)
            remove_everywhere(path, self.layout)
            self.group.below.destroy()
        if self.gate is not None:
            self.gate.remove()


def _check_devices(engine: Engine, names: Sequence[str]) -> None:
    if why := refuse_devices(engine.info, names) if names else "":
        raise LaunchError(f"docker at {engine.address}: {why}", step="gpu", hint=_CDI_HINT)
