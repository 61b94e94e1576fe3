"""The launcher `oci`: an OCI runtime makes the container, from a bundle written from the plan."""

from __future__ import annotations

import json
import os

from sandbox.host import programs
from sandbox.launchers.attended import Flavour, Kind, with_room
from sandbox.launchers.oci_declared import RUNSC_TASKS
from sandbox.launchers.oci_spec import Place, runtime_spec, userspace_spec
from sandbox.seccomp import docker
from sandbox.seccomp import policy as policies


def _config(kind: Kind, place: Place) -> bytes:
    return json.dumps(runtime_spec(with_room(kind.plan), place, kind.seccomp), separators=(",", ":")).encode()


def _userspace_config(kind: Kind, place: Place) -> bytes:
    refused = docker.to_docker_names(policies.resolve(kind.plan.seccomp), os.uname().machine)
    return json.dumps(userspace_spec(kind.plan, place, refused), separators=(",", ":")).encode()


FLAVOURS = {
    "crun": Flavour("crun", lambda: programs.find("crun"), _config, "apt-get install crun"),
    "runsc": Flavour(
        "runsc",
        lambda: programs.find("runsc"),
        _userspace_config,
        "install gVisor: https://gvisor.dev/docs/user_guide/install/",
        outside=(),
        inside=(),
        has_root=True,
        own_tasks=RUNSC_TASKS,
    ),
    "runc": Flavour(
        "runc", lambda: programs.find("runc"), _config, "apt-get install runc", has_root=True, making_tasks=64
    ),
}
