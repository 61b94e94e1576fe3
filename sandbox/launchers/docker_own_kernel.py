"""Docker containers with a kernel of their own inside (gVisor's runsc): all is there before the engine makes them.

Such a kernel reads files through a process that opens its mounts when the container is made, and nobody enters its
namespaces. So the keeper builds the private places, granted trees and layers on the host, by the same steps, below the
gate's directory; the engine mounts them by path, and they are detached, granted trees once it has, the others when the
container has gone. Named pipes work, where the runtime was told to open them, and so does the gateway, where it was
told to use the network stack of the namespace that the engine makes ("host" to gVisor, never the host's here).
Source: gVisor's runsc/config (host-fifo, oci-seccomp, network).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any, Final

from sandbox._linux import mounts, wire
from sandbox.errors import LaunchError
from sandbox.grants import path_within
from sandbox.launchers import docker_config as config
from sandbox.launchers import gate
from sandbox.launchers.docker_engine import Engine, refuse_runtime
from sandbox.launchers.docker_making import Making
from sandbox.plan import LaunchPlan

# As long as the supervisor waits for a container to be entered; nothing here waits for another machine.
BUILD_TIMEOUT_S: Final = 60.0
_HINT: Final = (
    'register it in the daemon\'s daemon.json: {"runtimes": {"runsc": {"path": "/usr/bin/runsc", "runtimeArgs": '
    '["--network=host", "--oci-seccomp", "--host-fifo=open"]}}}'
)


class OwnKernelMaking(Making):
    """One such container on its way."""

    is_built = True

    def check(self, engine: Engine) -> None:
        super().check(engine)
        runtime = config.step(self.plan, "container")["runtime"]
        if why := refuse_runtime(engine.info, runtime, has_way_out=bool(config.step(self.plan, "egress"))):
            raise LaunchError(f"docker at {engine.address}: {why}", step="container", hint=_HINT)

    def prepare(self) -> None:
        """Have the keeper build what is to be mounted. Raises LaunchError, or OSError when the keeper is gone."""
        assert self.gate is not None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(BUILD_TIMEOUT_S)
            with theirs:
                message = {"name": self.name, "host_uid": self.uid, "built_at": self.gate.built_at}
                self._site.keeper.ask("build", message, theirs.fileno(), self.plan)
            answer, fds = wire.receive(ours)
        if answer is None:
            raise LaunchError("the keeper ended before the container's places were built", step="view")
        names: Any = answer.get("fds", ())
        self.fds.update(zip(names, fds, strict=True))
        if answer["ev"] == "step_failed":
            number = int(str(answer["errno"]))
            what = f"{answer['message']} ({errno.errorcode.get(number, number)})" if number else str(answer["message"])
            raise LaunchError(what, step=str(answer["step"]))
        notes: Any = answer["notes"]
        self.notes += notes

    def started(self) -> None:
        """Let go of what only the engine had to see. It has mounts of its own by now.

        A file of the host's that is covered in a copy of its tree can be neither removed nor renamed by anybody in this
        mount namespace (EBUSY). What is looked through after the call stays, as the call sees it.
        """
        assert self.gate is not None
        workspace = config.step(self.plan, "workspace").get("jail_path", "")
        for path in config.outermost([path for path, _ in config.granted_places(self.plan)]):
            if not path_within(workspace, path):
                mounts.detach_all(f"{self.gate.built_at}/root{path}")

    def body(self, wanted: config.Wanted) -> dict[str, Any]:
        """As for every container, with what was built mounted, and the filter in the form that gVisor takes."""
        assert self.gate is not None
        body = super().body(wanted)
        host = body["HostConfig"]
        # gVisor lets a tool end its first process when that is another of the same uid's, as Docker's init would be.
        host["Init"] = False
        host["Mounts"] = [
            config.bind(source, target, read_only=read_only)
            for source, target, read_only in self._mounts(wanted, self.gate.built_at)
        ]
        return body

    def _mounts(self, wanted: config.Wanted, built: str) -> Sequence[tuple[str, str, bool]]:
        """(host path, path inside, whether read-only), a path above before those below it."""
        assert self.gate is not None
        found = [(source, target, True) for source, target in config.own_mounts(wanted)]
        found.append((self.gate.pipes, f"{gate.AT}/{gate.PIPES_IN}", False))
        writable = self._writable()
        shown = [
            *config.step(self.plan, "scratch")["directories"],
            *(path for path, _ in config.granted_places(self.plan)),
        ]
        for path in config.outermost(shown):
            # What lies below another comes with it, and is as writable there as its own mount is.
            read_only = not any(path_within(other, path) for other in writable)
            found.append((f"{built}/root{path}", path, read_only))
        return found

    def _writable(self) -> list[str]:
        found = [*config.step(self.plan, "scratch")["directories"]]
        for name in ("grants", "inner_grants"):
            grants = config.step(self.plan, name).get("paths", ())
            found += [grant["jail_path"] for grant in grants if grant["access"] == "write"]
        workspace = config.step(self.plan, "workspace")
        return [*found, *([workspace["jail_path"]] if workspace.get("mode") in ("cow", "rw") else [])]


def has_own_kernel(plan: LaunchPlan) -> bool:
    """Whether the plan's runtime is of this kind."""
    return config.step(plan, "container")["runtime"] in config.OWN_KERNEL
