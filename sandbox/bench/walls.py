"""This project's other launchers as contenders: the same call, and another wall.

By itself a container is made for the call; "parked": beforehand, once calls come in, as docker's always are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

from sandbox.bench.contenders import Contender
from sandbox.bench.jobs import Job
from sandbox.errors import SandboxError
from sandbox.runtime import Sandbox

PROFILE: Final = "python"
_WALLS: Final[dict[str, dict[str, Any]]] = {
    "ours in crun": {"launcher": "oci", "runtime": "crun", "warm": False},
    "ours in crun, parked": {"launcher": "oci", "runtime": "crun"},
    "ours in runc": {"launcher": "oci", "runtime": "runc", "warm": False},
    "ours in runsc": {"launcher": "oci", "runtime": "runsc", "warm": False, "best_effort": ["pids"]},
    "ours in nsjail": {"launcher": "nsjail", "warm": False},
    "ours in nsjail, parked": {"launcher": "nsjail"},
}


def contenders(state: Path, image: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that can be had here, and why the others cannot. `image`: for docker; without one it is not measured."""
    walls = dict(_WALLS)
    missing: dict[str, str] = {}
    if image:
        walls["ours in docker"] = {"launcher": "docker", "image": image}
        gvisor = {"launcher": "docker", "runtime": "runsc", "image": image, "best_effort": ["pids"]}
        walls["ours in docker, runsc"] = gvisor
    else:
        missing["ours in docker"] = "no image was named (--image)"
    found = []
    for name, isolation in walls.items():
        box = Sandbox(PROFILE, state=state, **isolation)
        try:
            # What is there is found out by a first call, which also opens what the launcher needs.
            box.run(["true"]).unwrap()
        except SandboxError as error:
            missing[name] = error.message[:200]
            box.close()
            continue
        found.append(_contender(name, box))
    return found, missing


def _contender(name: str, box: Sandbox) -> Contender:
    def do(job: Job) -> None:
        done = box.run(["python3", *job.argv[1:]] if job.argv[0] == sys.executable else list(job.argv))
        if not done.ok or done.text.strip() != job.expected:
            raise RuntimeError(f"{done!r}: {done.stderr[-300:]!r}")

    return Contender(name, "the same manifest and record, another launcher", do, ("true", "python"), True, box.close)
