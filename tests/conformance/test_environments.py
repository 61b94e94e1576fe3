"""The library inside other people's containers: what works there, what is refused, and that doctor says what to do.

The engine is the tests' own; the containers are made as Docker makes them for a development or CI job: its default
seccomp profile, covered parts of /proc, a read-only cgroup tree. Inside lies this package, from the caller's own files.
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from sandbox.host import HostFacts, controls
from tests.helpers import engine as engines

HERE = Path(__file__).parents[2]
# As Debian's own interpreter finds packages, also when it is started isolated.
PACKAGES = "/usr/lib/python3/dist-packages"
PROGRAM = """
import dataclasses, json, os, sys
from sandbox import Sandbox, SandboxError, host
facts = host.probe_apart()
table = host.controls(facts)
rows = {name: dataclasses.asdict(control) for name, control in table.items()}
found = {"uid": facts.uid, "container": facts.container, "controls": rows}
def call(**options):
    try:
        with Sandbox({"isolation": options}, state="/tmp/state") as box:
            done = box.run(["sh", "-c", "id -u; echo x > /usr/x"])
            return {"ending": str(done.ending), "out": done.stdout.decode(), "err": done.stderr.decode()}
    except SandboxError as error:
        return {"refused": str(error), "hint": error.hint}
found["full"] = call()
found["less"] = call(best_effort=[name for name in rows if rows[name]["level"] != "full"])
print(json.dumps(found))
"""


def inside(engine: engines.Engine, **settings: Any) -> dict[str, Any]:
    """What `PROGRAM` finds in a container that is made with these settings."""
    import docker

    libseccomp = next(Path("/usr/lib").rglob("libseccomp.so.2"), None)
    if libseccomp is None:
        pytest.skip("needs libseccomp.so.2 below /usr/lib, to lend it to a container")
    user = settings.pop("User", "")
    site = sysconfig.get_path("purelib")
    binds = [
        f"{site}:{PACKAGES}:ro",
        f"{HERE}/sandbox:{PACKAGES}/sandbox:ro",
        f"{libseccomp.parent}:{libseccomp.parent}:ro",
    ]
    body = {
        "Image": engines.PYTHON,
        "Entrypoint": ["python3", "-c", PROGRAM],
        "User": user,
        "Env": ["HOME=/tmp", "PATH=/usr/bin:/bin"],
        "HostConfig": {"NetworkMode": "none", "Binds": binds, **settings},
    }
    client = docker.APIClient(base_url=engine.host, version="auto", timeout=120)
    made = client.create_container_from_config(body)["Id"]
    try:
        client.start(made)
        code = client.wait(made, timeout=120)["StatusCode"]
        said = client.logs(made, stdout=True, stderr=True).decode()
        assert code == 0, said
        found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
        return found
    finally:
        client.remove_container(made, force=True, v=True)
        client.close()


FILTER = "a seccomp filter around us, as of a container, refuses it"
COVERED = "parts of /proc are covered, as in a container"
NO_FILTER = {"SecurityOpt": ["seccomp=unconfined"]}
# What the command line's `--security-opt systempaths=unconfined` is to the engine.
NO_COVERS: dict[str, Any] = {"MaskedPaths": [], "ReadonlyPaths": []}


@pytest.mark.parametrize(
    ("settings", "reason", "fix"),
    [
        pytest.param({}, FILTER, "--security-opt seccomp=unconfined", id="docker run, as root"),
        pytest.param({"User": "1001:1001"}, FILTER, "--security-opt seccomp=unconfined", id="a devcontainer's user"),
        pytest.param(
            {"User": "1001:1001", **NO_FILTER},
            COVERED,
            "--security-opt systempaths=unconfined",
            id="half of the advice",
        ),
    ],
)
def test_in_a_container_that_is_too_tight_calls_are_refused_and_doctor_names_the_option(
    engine: engines.Engine, settings: dict[str, Any], reason: str, fix: str
) -> None:
    found = inside(engine, **settings)
    assert found["container"] == "docker"
    row = found["controls"]["processes"]
    assert (row["level"], reason in row["reason"]) == ("none", True), row
    assert fix in row["fix"]
    assert reason in found["full"]["refused"]
    assert fix in found["full"]["hint"]
    # Nothing is run outside of a jail, however little was asked for.
    assert "launch_error" in found["less"]["ending"]
    assert found["less"]["out"] == ""


def test_in_a_container_that_was_made_as_doctor_says_calls_run_and_its_groups_are_still_missed(
    engine: engines.Engine,
) -> None:
    found = inside(engine, User="1001:1001", **NO_FILTER, **NO_COVERS)
    less = [name for name, row in found["controls"].items() if row["level"] != "full"]
    assert "memory" in less
    assert not {"filesystem", "network", "processes", "syscalls"} & {*less}
    assert "memory" in found["full"]["refused"]
    assert found["less"]["out"] == "1000\n"
    assert "Read-only file system" in found["less"]["err"]


def test_in_a_privileged_container_everything_holds_that_holds_outside(
    engine: engines.Engine, host_facts: HostFacts
) -> None:
    import docker

    try:
        found = inside(engine, Privileged=True)
    except docker.errors.APIError as error:
        if "operation not permitted" not in str(error):
            raise
        pytest.skip("needs every capability: this machine's own root lacks some, so no container can be privileged")
    outside = {name for name, row in controls(host_facts).items() if row.level == "full"}
    assert {name for name, row in found["controls"].items() if row["level"] == "full"} >= outside - {"landlock"}
    assert found["less"]["out"] == "1000\n"
