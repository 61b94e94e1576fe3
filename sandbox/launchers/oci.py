"""The launcher `oci`: an OCI runtime makes the container, from a bundle written from the plan.

crun is taken where it is installed, else runc; `crun` and `runc` ask for one of them by name.
"""

from __future__ import annotations

import json
import shutil

from sandbox.launchers.attended import Flavour, Kind
from sandbox.launchers.oci_spec import Place, runtime_spec

# The supervisor has no environment: programs are looked for where a system keeps its own.
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find(name: str) -> str:
    """The path of a runtime among the system's programs; empty where there is none."""
    return shutil.which(name, path=SEARCH) or ""


def _config(kind: Kind, place: Place) -> bytes:
    return json.dumps(runtime_spec(kind.plan, place, kind.seccomp), separators=(",", ":")).encode()


CRUN = Flavour("crun", lambda: find("crun"), _config, "apt-get install crun")
RUNC = Flavour("runc", lambda: find("runc"), _config, "apt-get install runc", has_root=True)
