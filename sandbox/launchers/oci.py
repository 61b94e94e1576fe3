"""The launcher `oci`: an OCI runtime makes the container, from a bundle written from the plan."""

from __future__ import annotations

import json

from sandbox.host import programs
from sandbox.launchers.attended import Flavour, Kind
from sandbox.launchers.oci_spec import Place, runtime_spec


def _config(kind: Kind, place: Place) -> bytes:
    return json.dumps(runtime_spec(kind.plan, place, kind.seccomp), separators=(",", ":")).encode()


FLAVOURS = {
    "crun": Flavour("crun", lambda: programs.find("crun"), _config, "apt-get install crun"),
    "runc": Flavour("runc", lambda: programs.find("runc"), _config, "apt-get install runc", has_root=True),
}
