"""What is made of a daemon's answers, and which requests are made again."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.errors import LaunchError, LauncherUnavailable
from sandbox.launchers import docker_engine
from sandbox.launchers.docker_config import Wanted, create_body
from sandbox.launchers.docker_engine import Engine, is_transient, refuse, refuse_devices, refuse_runtime, translate
from sandbox.manifest import Manifest
from sandbox.planner import Surroundings, decide
from tests.unit.test_planner_launcher import CALL, FULL

GOOD: dict[str, Any] = {
    "OSType": "linux",
    "KernelVersion": "6.1",
    "SecurityOptions": ["name=seccomp,profile=default"],
    "MemoryLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
}


class Answer(Exception):
    def __init__(self, status_code: int, explanation: str) -> None:
        super().__init__(explanation)
        self.status_code = status_code
        self.explanation = explanation


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"KernelVersion": "5.15-linuxkit"}, "another kernel"),
        ({"OSType": "windows"}, "another kernel"),
        ({"SecurityOptions": ["name=seccomp", "name=rootless"]}, "rootless"),
        ({"SecurityOptions": ["name=seccomp", "name=userns"]}, "maps user ids"),
        ({"SecurityOptions": []}, "no seccomp filter"),
        ({"PidsLimit": False}, "cannot limit processes"),
    ],
)
def test_a_daemon_that_cannot_hold_the_plan_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    assert refuse(GOOD, "6.1") == ""
    assert says in refuse({**GOOD, **change}, "6.1")


@pytest.mark.parametrize(
    ("runtimes", "says"),
    [
        ({"runc": {"path": "runc"}}, "knows no runtime 'runsc'"),
        ({"runsc": {"path": "/usr/bin/runsc"}}, "without --network=host --oci-seccomp --host-fifo=open"),
        ({"runsc": {"runtimeArgs": ["--network=none", "-oci-seccomp", "--debug"]}}, "without --host-fifo=open"),
        ({"runsc": {"runtimeArgs": ["-network=none", "--oci-seccomp=true", "--host-fifo=open"]}}, ""),
    ],
)
def test_gvisor_is_refused_where_the_daemon_does_not_tell_it_enough(runtimes: dict[str, Any], says: str) -> None:
    found = refuse_runtime({**GOOD, "Runtimes": runtimes}, "runsc")
    assert (says in found) if says else found == ""


@pytest.mark.parametrize(("network", "is_refused"), [("none", True), ("host", False)])
def test_gvisor_has_a_way_out_only_by_the_containers_own_network_namespace(network: str, *, is_refused: bool) -> None:
    told = {"runtimeArgs": [f"--network={network}", "--oci-seccomp", "--host-fifo=open"]}
    info = {**GOOD, "Runtimes": {"runsc": told}}
    assert refuse_runtime(info, "runsc") == ""
    assert ("without --network=host" in refuse_runtime(info, "runsc", has_way_out=True)) == is_refused


@pytest.mark.parametrize(
    ("answer", "step", "hint"),
    [
        (Answer(404, "No such image: x:1"), "image", "docker pull"),
        (Answer(500, "mkdir: no space left on device"), "container", "make room"),
        (Answer(400, "unknown or invalid runtime name: runsc"), "container", "daemon.json"),
        (Answer(400, "invalid mount config: bind source path does not exist: /x"), "container", "same files"),
    ],
)
def test_a_daemons_refusal_becomes_ours_with_what_to_do(answer: Answer, step: str, hint: str) -> None:
    error = translate(answer, "launcher", "unix:///x")
    assert not isinstance(error, LauncherUnavailable)
    assert error.step == step
    assert hint in error.hint


def test_a_daemon_that_is_not_there_is_unavailable() -> None:
    error = translate(ConnectionRefusedError("refused"), "container", "unix:///x")
    assert isinstance(error, LauncherUnavailable)
    assert "unix:///x does not answer" in error.message


class Api:
    def __init__(self, *answers: Exception) -> None:
        self.answers = list(answers)
        self.removed: list[str] = []
        self.created = 0

    def create_container_from_config(self, _body: dict[str, Any], _name: str) -> dict[str, str]:
        self.created += 1
        if self.answers:
            raise self.answers.pop(0)
        return {"Id": "abc"}

    def start(self, _container: str) -> None:
        self.created += 1
        raise self.answers.pop(0)

    def remove_container(self, name: str, **_options: bool) -> None:
        self.removed.append(name)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("tenacity")
    pytest.importorskip("docker")

    def make(*answers: Exception) -> tuple[Engine, Api]:
        api = Api(*answers)
        made = Engine("unix:///x")
        monkeypatch.setattr(docker_engine.Engine, "_api", lambda _self: api)
        return made, api

    return make


def test_creating_is_tried_again_after_a_passing_trouble_and_leaves_one_container(engine: Any) -> None:
    made, api = engine(Answer(503, "busy"), Answer(500, "context deadline: timeout"))
    assert made.create({}, "one") == "abc"
    assert api.created == 3
    assert api.removed == ["one", "one"]


def test_what_will_not_pass_is_not_tried_again(engine: Any) -> None:
    made, api = engine(Answer(400, "bad parameter"))
    with pytest.raises(LaunchError, match="bad parameter"):
        made.create({}, "one")
    assert api.created == 1


def test_starting_is_never_tried_again(engine: Any) -> None:
    made, api = engine(Answer(503, "busy"), Answer(503, "busy"))
    assert is_transient(Answer(503, "busy"))
    with pytest.raises(LaunchError, match="busy"):
        made.start("one")
    assert api.created == 1


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ({"ServerVersion": "20.10.24"}, "Docker 20.10.24 gives no devices by name"),
        ({"CDISpecDirs": []}, "gives no devices by name"),
        ({"CDISpecDirs": ["/etc/cdi"]}, ""),
        ({"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=GPU-1"}]}, ""),
        (
            {"CDISpecDirs": ["/etc/cdi"], "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]},
            "knows no device nvidia.com/gpu=GPU-1",
        ),
    ],
)
def test_a_daemon_that_cannot_give_a_device_is_refused_by_name(info: dict[str, Any], says: str) -> None:
    found = refuse_devices(info, ["nvidia.com/gpu=GPU-1"])
    assert says in found
    assert bool(found) == bool(says)


def test_granted_gpus_are_asked_for_by_their_names_and_no_others() -> None:
    plan = decide(Manifest(isolation={"launcher": "docker", "image": "x"}), CALL, FULL, Surroundings())
    plan = plan.with_step_args("container", image_id="sha256:1")
    granted = plan.with_step_args("container", devices=["nvidia.com/gpu=GPU-1"])
    bodies = [create_body(Wanted(one, "/gate", 70000, {}, {})) for one in (granted, plan)]
    assert bodies[0]["HostConfig"]["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=GPU-1"]}]
    assert "DeviceRequests" not in bodies[1]["HostConfig"]
    assert all(body["Env"] == ["NVIDIA_VISIBLE_DEVICES=void"] for body in bodies)
