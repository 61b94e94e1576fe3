"""Calls under the docker launcher as its tests make them, and what a daemon and a host hold of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers import engine as engines
from tests.helpers.waiting import awaited

GATES = Path("/run/toolcall-sandbox")
WAIT_S = 60.0


def containers(engine: engines.Engine) -> list[dict[str, Any]]:
    import docker

    client = docker.APIClient(base_url=engine.host, version="auto")
    try:
        found: list[dict[str, Any]] = client.containers(all=True)
        return [client.inspect_container(one["Id"]) for one in found]
    except docker.errors.NotFound:
        return containers(engine)
    finally:
        client.close()


def wait_for(what: Callable[[], Any]) -> Any:
    found = awaited(what, WAIT_S)
    assert found, "waited too long"
    return found


def mounts_below(path: str) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if path in line]


CALLER = """
import sys
from sandbox import Sandbox
isolation = {"launcher": "docker", "image": sys.argv[1], "runtime": sys.argv[3], "best_effort": ["pids"]}
manifest = {"isolation": isolation}
with Sandbox(manifest, state=sys.argv[2]) as box, box.stream(["sh", "-c", "echo on; sleep 300"]) as stream:
    print(next(iter(stream)), flush=True)
    stream.outcome
"""


def start_caller(engine: engines.Engine, state: Path, runtime: str = "") -> subprocess.Popen[str]:
    """A process of its own, in the middle of a call that lasts."""
    argv = [sys.executable, "-c", CALLER, engines.PYTHON, str(state), runtime]
    env = {**os.environ, "DOCKER_HOST": engine.host}
    caller = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert caller.stdout is not None
    assert "on" in caller.stdout.readline()
    return caller


def children(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (OSError, IndexError):
                continue
            if int(stat[1]) == pid:
                found.append(int(entry.name))
    return found
