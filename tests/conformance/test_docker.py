"""The docker launcher with a real daemon: what the engine is told, what the record says, and what is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox import LaunchError, Sandbox
from sandbox._linux import cgroup
from sandbox.host import HostFacts
from sandbox.launchers.group import ContainerGroup
from sandbox.runtime_outcome import program_outcome
from tests.helpers import engine as engines
from tests.helpers import nvml
from tests.helpers.docker_calls import WAIT_S, children, containers, mounts_below, start_caller, wait_for
from tests.helpers.gpu_world import SCENARIO

SLEEPER = ["sh", "-c", "trap 'exit 143' TERM; echo on; sleep 60 & wait"]


def test_the_engine_is_told_to_take_everything_away(docker: Callable[..., Sandbox], engine: engines.Engine) -> None:
    with docker(resources={"memory": "64MiB", "pids": 9, "cpus": 0.5}).stream(SLEEPER) as stream:
        assert next(iter(stream)) == ("stdout", b"on\n")
        there = {one["Id"]: one for one in containers(engine)}
        stream.signal(signal.SIGTERM)
        done = stream.outcome
    assert done.exit_code == 128 + signal.SIGTERM
    found = there[done.record.isolation.container_id]
    host, config = found["HostConfig"], found["Config"]
    assert host["CapDrop"] == ["ALL"]
    assert host["CapAdd"] is None
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"]
    assert host["Init"]
    assert not host["Privileged"]
    assert "no-new-privileges" in host["SecurityOpt"]
    assert json.loads(host["SecurityOpt"][1].removeprefix("seccomp="))["defaultAction"] == "SCMP_ACT_ERRNO"
    assert (host["Memory"], host["MemorySwap"], host["PidsLimit"], host["NanoCpus"]) == (
        64 << 20,
        64 << 20,
        10,
        5 * 10**8,
    )
    assert int(config["User"].split(":")[0]) > 65536
    assert config["Labels"]["toolcall-sandbox"] == "call"
    assert "NVIDIA_VISIBLE_DEVICES=void" in config["Env"]
    assert not host["Devices"]
    sources = [mount["Source"] for mount in found["Mounts"]]
    assert not any("docker.sock" in source for source in sources)
    assert not any(mount["RW"] for mount in found["Mounts"])


@pytest.mark.needs("cgroup")
def test_disk_traffic_is_limited_on_every_disk_of_the_host(
    docker: Callable[..., Sandbox], engine: engines.Engine, host_facts: HostFacts
) -> None:
    disks = set(host_facts.block_devices.values())
    if not disks or not host_facts.cgroups["io"].where:
        pytest.skip("needs a disk, and a cgroup controller for its traffic")
    with docker(resources={"io": "7MiB/s"}, best_effort=["io"]).stream(SLEEPER) as stream:
        assert next(iter(stream)) == ("stdout", b"on\n")
        there = [one for one in containers(engine) if one["State"]["Running"]]
        for one in there:
            rates = [device["Rate"] for device in one["HostConfig"]["BlkioDeviceWriteBps"]]
            assert rates == [7 << 20] * len(disks)
            group = ContainerGroup("", None)
            group.find(one["State"]["Pid"], cgroup.detect())
            assert group.io_limited() == disks
        stream.signal(signal.SIGTERM)
        assert stream.outcome.record.enforcement["io"]["applied"] == 7 << 20


def test_the_record_names_image_digest_container_and_limits(
    docker: Callable[..., Sandbox], engine: engines.Engine
) -> None:
    done = docker().run(["true"])
    isolation = done.record.isolation
    assert (isolation.launcher, isolation.image) == ("docker", engines.PYTHON)
    assert isolation.image_digest.startswith("sha256:")
    assert len(isolation.container_id) == 64
    assert set(isolation.requested) == set(isolation.applied)
    assert done.record.enforcement["memory"]["mechanism"] == "container memory and swap limit"


def test_programs_run_in_an_image_without_python(docker: Callable[..., Sandbox]) -> None:
    assert docker(engines.NO_PYTHON).run(["sh", "-c", "echo $((6 * 7))"]).text == "42\n"


def _answer() -> int:
    return 42


@pytest.mark.parametrize(
    ("image", "says"),
    [(engines.OTHER_PYTHON, "has Python 3.9"), (engines.NO_PYTHON, "has no python3")],
)
def test_a_function_is_refused_where_its_python_is_not(docker: Callable[..., Sandbox], image: str, says: str) -> None:
    with pytest.raises(LaunchError, match=says) as caught:
        docker(image).call(_answer).unwrap()
    assert f"Python 3.{sys.version_info.minor}" in caught.value.message
    assert docker().call(_answer).unwrap() == 42


def test_a_missing_image_is_the_hosts_fault_and_says_what_to_do(docker: Callable[..., Sandbox]) -> None:
    done = docker("sandbox-test/none:1").run(["true"])
    assert (done.ending.kind, done.ending.fault, done.exit_code) == ("launch_error", "host", 125)
    assert "No such image" in done.ending.message
    assert "docker pull" in done.ending.message
    assert docker().run(["true"]).ok


def test_a_container_that_somebody_removes_is_lost_by_the_host(
    docker: Callable[..., Sandbox], engine: engines.Engine
) -> None:
    import docker as sdk

    with docker().stream(SLEEPER) as stream:
        assert next(iter(stream)) == ("stdout", b"on\n")
        client = sdk.APIClient(base_url=engine.host, version="auto")
        for one in client.containers():
            client.remove_container(one["Id"], force=True)
        client.close()
        done = stream.outcome
    # The engine may still say how it ended before it forgets it; then all that is known is SIGKILL.
    found = (done.ending.kind, done.ending.fault, done.exit_code)
    assert found in (("lost", "host", 125), ("tool_error", "tool", 137))


def test_what_is_mounted_inside_does_not_reach_the_host(docker: Callable[..., Sandbox], short_path: Path) -> None:
    """Where systemd runs, every mount of the host's is shared: a cover inside would cover the host's own file."""
    path = str(short_path)
    (short_path / ".env").write_text("secret")
    (short_path / "plain").write_text("plain")
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", path], check=True)
        before = mounts_below(path)
        box = docker(filesystem={"read": [path], "deny": ["**/.env"]})
        done = box.run(["sh", "-c", f"cat {path}/plain; cat {path}/.env"])
        assert (done.text, done.exit_code) == ("plain", 1)
        assert b"Permission denied" in done.stderr
        assert mounts_below(path) == before
        assert (short_path / ".env").read_text() == "secret"
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_containers_made_beforehand_serve_one_call_each(docker: Callable[..., Sandbox]) -> None:
    box = docker()
    ids = [box.run(["true"]).record.isolation.container_id for _ in range(4)]
    assert len(set(ids)) == 4
    wait_for(lambda: _is_parked(box))


def _is_parked(box: Sandbox) -> bool:
    started = time.monotonic()
    assert box.run(["true"]).ok
    return time.monotonic() - started < 5


def test_calls_at_once_do_not_meet(docker: Callable[..., Sandbox]) -> None:
    box = docker()
    found: list[str] = []

    def call(number: int) -> None:
        found.append(box.run(["sh", "-c", f"echo {number} > /tmp/n; sleep 0.3; cat /tmp/n; ls /tmp | wc -l"]).text)

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [f"{number}\n1\n" for number in range(4)]


def test_when_the_caller_is_killed_its_container_goes(engine: engines.Engine, tmp_path: Path) -> None:
    with start_caller(engine, tmp_path) as caller:
        caller.kill()
    wait_for(lambda: containers(engine) == [])


def test_when_the_supervisor_is_killed_its_container_dies_and_the_next_start_removes_it(
    engine: engines.Engine, tmp_path: Path, docker: Callable[..., Sandbox]
) -> None:
    with start_caller(engine, tmp_path) as caller:
        supervisor = children(caller.pid)
        assert supervisor
        for pid in supervisor:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(not one["State"]["Running"] for one in containers(engine)))
        caller.kill()
    left = {one["Id"] for one in containers(engine)}
    assert left, "a killed supervisor removes nothing"
    assert docker().run(["true"]).ok
    assert not left & {one["Id"] for one in containers(engine)}


def test_a_daemon_that_stops_under_a_call_loses_it_and_is_missed_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if reason := engines.missing():
        pytest.skip(f"needs a Docker daemon: {reason}")
    with engines.running() as own:
        own.load(engines.NO_PYTHON, engines.plain_image())
        monkeypatch.setenv("DOCKER_HOST", own.host)
        manifest = {"isolation": {"launcher": "docker", "image": engines.NO_PYTHON}}
        with Sandbox(manifest, state=tmp_path) as box:
            with box.stream(["sh", "-c", "echo on; sleep 60"]) as stream:
                assert next(iter(stream)) == ("stdout", b"on\n")
                own.stop()
                done = stream.outcome
            assert (done.ending.kind, done.ending.fault) == ("lost", "host")
            assert any("not known" in note for note in done.record.isolation.notes)
            after = box.run(["true"])
        assert (after.ending.kind, after.ending.fault) == ("launch_error", "host")
        assert "does not answer" in after.ending.message
        assert "start it" in after.ending.message


def test_a_daemon_without_room_is_the_hosts_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, short_path: Path
) -> None:
    if reason := engines.missing():
        pytest.skip(f"needs a Docker daemon: {reason}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", str(short_path)], check=True)
    try:
        with engines.running(parent=str(short_path)) as own:
            own.load(engines.NO_PYTHON, engines.plain_image())
            monkeypatch.setenv("DOCKER_HOST", own.host)
            manifest = {"isolation": {"launcher": "docker", "image": engines.NO_PYTHON}}
            with Sandbox(manifest, state=tmp_path) as box:
                filler = own.directory / "filler"
                with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
                    while True:
                        file.write(bytes(1 << 16))
                done = box.run(["true"])
                assert (done.ending.kind, done.ending.fault) == ("launch_error", "host")
                assert "no space left on device" in done.ending.message.lower()
                assert "make room" in done.ending.message
                filler.unlink()
                assert box.run(["true"]).ok
    finally:
        subprocess.run(["umount", "-l", str(short_path)], check=True)


@pytest.mark.needs("root")
def test_a_remote_daemon_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sandbox import Unenforceable

    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    box = Sandbox({"isolation": {"launcher": "docker", "image": "debian:12"}}, state=tmp_path)
    with box, pytest.raises(Unenforceable, match="only a daemon on this host"):
        box.run(["true"])


# A shell waits for no program while it waits for this, so its traps come at once.
_TRAPS = """
trap 'echo interrupted' INT
trap 'exit 9' TERM
echo ready
read word
echo got:$word
ls -ln /proc/self/fd/0
echo > /dev/tty controls
python3 -c 'import os; print(*os.get_terminal_size(), os.getsid(0) == 1, os.getpid() > 1, os.getuid() >= 65536)'
while :; do sleep 0.1; python3 -c 'import os; print(*reversed(os.get_terminal_size()))'; done
"""


def test_a_terminal_is_the_tools_own_and_what_is_typed_controls_it(docker: Callable[..., Sandbox]) -> None:
    typed, keys = os.pipe()
    screen, shown = os.pipe()
    box = docker()
    seen = b""

    def wait_to_see(text: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + WAIT_S
        while text not in seen:
            assert select.select([screen], [], [], max(0.0, deadline - time.monotonic()))[0], seen
            more = os.read(screen, 65536)
            assert more, seen
            seen += more

    with box.passing(["sh", "-c", _TRAPS], {"stdin": typed, "terminal_to": shown}, tty=True) as passing:
        for fd in (typed, shown):
            os.close(fd)
        wait_to_see(b"ready\r\n")
        os.write(keys, b"typed\r")
        wait_to_see(b"got:typed")
        wait_to_see(b"controls")
        wait_to_see(b"80 24 True True True")
        os.write(keys, b"\x03")
        wait_to_see(b"interrupted")
        passing.resize(40, 132)
        wait_to_see(b"40 132\r\n")
        passing.signal(signal.SIGTERM)
        done = program_outcome(passing.take())
    for fd in (keys, screen):
        os.close(fd)
    assert b"/dev/pts/0" in seen
    assert done.exit_code == 9, done.ending
    assert "terminals" in done.record.isolation.applied
    # Its twin: nothing asked for, none there.
    assert box.run(["sh", "-c", "test -t 1 || ls /dev/pts"]).text == "ptmx\n"


@pytest.mark.needs("cgroup", "gcc", "python:pynvml")
def test_a_gpu_is_refused_by_a_daemon_that_knows_no_device_names(
    engine: engines.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a world with stand-ins for GPUs and NVML (`tests/helpers/gpu_world.py`), and a real daemon."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    monkeypatch.setenv("SANDBOX_TEST_IMAGE", engines.PYTHON)
    library = nvml.build(tmp_path, SCENARIO)
    argv = [sys.executable, "-m", "tests.helpers.gpu_world", "docker", str(tmp_path), str(library)]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with contextlib.closing(engine.client()) as client:
        info = client.info()
    if info.get("CDISpecDirs"):
        pytest.skip("needs a daemon without device names (CDI); this one has them")
    assert (found["ending"]["kind"], found["ending"]["fault"]) == ("launch_error", "host")
    assert "gives no devices by name" in found["ending"]["message"]
    assert "nvidia-ctk cdi generate" in found["ending"]["message"]
    # The driver's libraries come with the device, not from this host's view of them.
    assert found["libraries"] == []
    assert "LD_LIBRARY_PATH" not in found["env"]
    assert "CUDA_VISIBLE_DEVICES" in found["env"]
