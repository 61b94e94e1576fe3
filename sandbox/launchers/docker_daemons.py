"""The Docker daemons that one supervisor uses, swept of what dead supervisors left, and what their images hold."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from sandbox._linux import cgroup
from sandbox.errors import LaunchError
from sandbox.launchers import docker_config as config
from sandbox.launchers.docker_engine import Engine


class Daemons:
    """Every method blocks and belongs in a thread. `owner` names the supervisor (`contract.Setting`)."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._where = f"{_boot_id()}:{os.stat('/proc/self/ns/pid').st_ino}"
        self._engines: dict[str, Engine] = {}
        self._opening = threading.Lock()
        self._minors: dict[str, tuple[int, str]] = {}

    def __repr__(self) -> str:
        return f"<Daemons of {self.owner}: {', '.join(self._engines) or 'none yet'}>"

    def engine(self, address: str) -> Engine:
        """The daemon at that address, with what dead supervisors left there removed."""
        with self._opening:
            if address not in self._engines:
                engine = Engine.open(address)
                self._reap(engine)
                self._engines[address] = engine
            return self._engines[address]

    def labels(self, what: str) -> dict[str, str]:
        """By which the next start tells what a dead supervisor left."""
        return {config.LABEL: what, config.OWNER: self.owner, config.WHERE: self._where}

    def _reap(self, engine: Engine) -> None:
        """Remove containers whose supervisor is gone; those of another pid namespace are not ours to judge."""
        for found in engine.labelled(f"{config.WHERE}={self._where}"):
            owner = found.get("Labels", {}).get(config.OWNER, "")
            if not is_alive(owner):
                engine.remove(found["Id"])

    def python(self, engine: Engine, image_id: str, container: Mapping[str, Any]) -> str:
        """The image's program for Python functions. Raises LaunchError when its version is another."""
        minor = sys.version_info.minor
        if image_id not in self._minors:
            self._minors[image_id] = _ask_python(engine, image_id, container, self.labels("probe"))
        found, program = self._minors[image_id]
        if found == minor:
            return program
        has = f"has Python 3.{found}" if found >= 0 else "has no python3"
        raise LaunchError(
            f"the image {container['image']} {has}; the caller's functions need Python 3.{minor}",
            step="image",
            hint=f"use an image with Python 3.{minor}, such as python:3.{minor}-slim, or call from that Python",
        )


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def is_alive(owner: str) -> bool:
    """Whether the supervisor of that name lives in this pid namespace."""
    pid = owner.partition("-")[0]
    try:
        return pid.isdigit() and cgroup.owner_name(int(pid)) == owner
    except ProcessLookupError:
        return False


_PYTHON_MISSING: Final = 127
_ASK_PYTHON: Final = (
    "command -v python3.{minor} >/dev/null 2>&1 && exit {minor}\n"
    "command -v python3 >/dev/null 2>&1 || exit 127\n"
    "exec python3 -c 'import sys; sys.exit(sys.version_info[1])'"
)


def _ask_python(
    engine: Engine, image_id: str, container: Mapping[str, Any], labels: Mapping[str, str]
) -> tuple[int, str]:
    """(minor version or -1, program), by running the image once: its exit status tells."""
    minor = sys.version_info.minor
    body = {
        "Image": image_id,
        "Entrypoint": ["/bin/sh", "-c", _ASK_PYTHON.format(minor=minor)],
        "Cmd": [],
        "User": "65534:65534",
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", *config.NO_DEVICES],
        "NetworkDisabled": True,
        "Labels": dict(labels),
        "HostConfig": {
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "PidsLimit": 16 + config.own_tasks(container["runtime"]),
            "Memory": 256 << 20,
            "LogConfig": {"Type": "none"},
            **({"Runtime": container["runtime"]} if container["runtime"] else {}),
        },
    }
    name = f"{config.LABEL}-probe-{os.urandom(6).hex()}"
    try:
        made = engine.create(body, name)
        engine.start(made)
        code = engine.wait(made).exit_code
    finally:
        engine.remove(name)
    if code == minor:
        return minor, f"python3.{minor}"
    return (-1, "") if code in (_PYTHON_MISSING, 126) else (code, "python3")
