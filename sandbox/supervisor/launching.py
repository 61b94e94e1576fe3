"""Which launcher makes a plan's containers: the native one from the start, any other with the first call that names it.

A launcher that could not be opened is tried again with the next call: a daemon that was stopped may be back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from sandbox._linux import cgroup
from sandbox.errors import LauncherUnavailable
from sandbox.launchers.contract import Launcher, Setting
from sandbox.launchers.zygote import Zygote
from sandbox.supervisor import identity
from sandbox.supervisor.maker import Maker
from sandbox.supervisor.pool import Pool

_Open = Callable[[Setting], Launcher]


def _openers() -> dict[str, _Open]:
    """What opens each launcher beside the native one. Its module, and what that needs, is loaded only here."""
    from sandbox.supervisor import attending

    return {"docker": _open_docker, "oci": attending.open_oci, "nsjail": attending.open_nsjail}


def _open_docker(setting: Setting) -> Launcher:
    from sandbox.launchers.docker import DockerLauncher

    return DockerLauncher(setting)


class Launchers:
    """The pools of one supervisor, by launcher. `close` ends them all."""

    def __init__(
        self, state: Path, tree: cgroup.Tree | None, disks: tuple[str, ...], owner: str, zygote: Zygote
    ) -> None:
        self._setting = Setting(state, tree, owner, identity.host_uids(), disks)
        self._native = Maker(self._setting, zygote)
        self._pools = {self._native.name: Pool(self._native)}
        self._opening = asyncio.Lock()

    @property
    def zygote_pid(self) -> int:
        return self._native.zygote.pid

    async def pool(self, name: str) -> Pool:
        """The pool of the launcher that a plan names. Raises LauncherUnavailable when it cannot be opened."""
        if name in self._pools:
            return self._pools[name]
        async with self._opening:
            if name not in self._pools:
                opener = _openers().get(name)
                if opener is None:
                    raise LauncherUnavailable(f"no launcher is called {name!r}", step="launcher")
                # Opening talks to a daemon or starts programs: not on the loop.
                self._pools[name] = Pool(await asyncio.to_thread(opener, self._setting))
            return self._pools[name]

    def close(self) -> None:
        """End every pool, the native one last: its zygote is what other parts may still lean on."""
        for pool in reversed(self._pools.values()):
            pool.close()
