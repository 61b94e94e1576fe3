"""The launcher `docker`: a fresh container per call, made by a Docker daemon from the plan and completed from outside.

The daemon makes namespaces, cgroup, capabilities, seccomp filter and the image's read-only root; its own first program
waits at a gate. A child of our keeper then enters it and puts in what the daemon cannot: sized private places, granted
trees checked by inode, denials, the gateway's sockets. Only after that the gate opens.
Not defended against: whoever else may command the daemon, who is root on this host anyway.
"""

from __future__ import annotations

import itertools
import os
import platform
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from sandbox._linux import cgroup
from sandbox.errors import LauncherUnavailable
from sandbox.launchers import docker_config as config
from sandbox.launchers.contract import Setting
from sandbox.launchers.docker_container import Crew, DockerContainer
from sandbox.launchers.docker_daemons import Daemons, is_alive
from sandbox.launchers.docker_making import Kind, Making, Site
from sandbox.launchers.docker_own_kernel import OwnKernelMaking, has_own_kernel
from sandbox.launchers.gate import remove_tree
from sandbox.launchers.keeper import Keeper
from sandbox.plan import LaunchPlan
from sandbox.seccomp import policy as seccomp_policy
from sandbox.seccomp.docker import to_docker_json, to_docker_names

THREADS: Final = 8


class DockerLauncher:
    """One per supervisor. Blocking work is done by its own threads, which `close` waits for."""

    name = "docker"
    own_user_namespace = False

    def __init__(self, setting: Setting) -> None:
        if setting.host_uids is None:
            raise LauncherUnavailable("the launcher docker enters its containers, which takes root", step="launcher")
        self._uids = setting.host_uids
        self._serial = itertools.count(1)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="docker")
        base = _gates(setting.state)
        for left in base.iterdir():
            if not is_alive(left.name):
                remove_tree(left)
        directory = base / setting.owner
        directory.mkdir(mode=0o700, exist_ok=True)
        nodes = _disk_nodes(directory, setting.disks)
        self._site = Site(setting, cgroup.detect(), Daemons(setting.owner), directory, Keeper.start(), nodes)
        self._crew = Crew(self._site.keeper, self._pool.submit)

    def kind(self, plan: LaunchPlan) -> Kind:
        found = seccomp_policy.resolve(plan.seccomp)
        written = to_docker_names if has_own_kernel(plan) else to_docker_json
        return Kind(plan, written(found, platform.machine()))

    def make(self, kind: Kind) -> DockerContainer:
        """A container on its way. Raises OSError when its directory cannot be made."""
        made_by = OwnKernelMaking if has_own_kernel(kind.plan) else Making
        making = made_by(self._site, kind, f"container-{next(self._serial)}", next(self._uids))
        container = DockerContainer(self._crew, making)
        container.launch()
        return container

    def close(self) -> None:
        """Wait until what was begun is cleaned up, and let the keeper go."""
        self._pool.shutdown(wait=True)
        self._crew.keeper.close()
        remove_tree(self._site.directory)


def _disk_nodes(directory: Path, disks: Sequence[str]) -> tuple[str, ...]:
    """Nodes of our own, outside of every gate: where /dev is not the host's, it has none of the host's disks.

    Nobody opens them; the daemon asks for their numbers. `disks`: as "major:minor". Raises OSError.
    """
    found = []
    for number in disks:
        path = directory / f"disk-{number}"
        os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(*map(int, number.split(":"))))
        found.append(str(path))
    return tuple(found)


def _gates(state: Path) -> Path:
    """Where the directories of gates are, by supervisor: in memory where there is such a place, closed to others."""
    base = (Path("/run") if os.access("/run", os.W_OK) else state) / config.LABEL
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(base, 0o700)
    return base
