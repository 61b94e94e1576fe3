"""The keeper, asked to look after a container that is a process of the test's own."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox._linux import wire
from sandbox.launchers.keeper import Keeper
from sandbox.plan import LaunchPlan
from tests.unit.test_planner_launcher import IMAGE, planned

pytestmark = [pytest.mark.needs("root"), pytest.mark.once]
WAIT_S = 30.0
PLAN: LaunchPlan = planned(IMAGE)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    made = Keeper.start()
    yield made
    made.close()


def kept(keeper: Keeper, argv: list[str]) -> list[dict[str, Any]]:
    """What the keeper tells of a process that it is to watch as a container, until it has no more to say."""
    # Any text that is in its cgroups stands for the container's name.
    with subprocess.Popen(argv) as process:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            ours.settimeout(WAIT_S)
            _wait_for_program(process.pid, "sleep")
            with theirs:
                message = {"name": "one", "pid": process.pid, "mark": ":", "host_uid": 70000}
                keeper.ask("keep", message, theirs.fileno(), PLAN)
            told = []
            while True:
                item, fds = wire.receive(ours)
                for fd in fds:
                    os.close(fd)
                if item is None:
                    break
                told.append(item)
        process.kill()
    return told


def _wait_for_program(pid: int, name: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with open(f"/proc/{pid}/comm") as file:
            if file.read().strip() == name:
                return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} has not become {name}")


def test_a_container_in_the_hosts_network_namespace_is_never_sealed(keeper: Keeper) -> None:
    born, failed = kept(keeper, ["sleep", "60"])
    assert born["ev"] == "born"
    assert (failed["ev"], failed["step"], failed["errno"]) == ("step_failed", "enter", errno.EPERM)
    assert "no network namespace of its own" in failed["message"]


def test_a_container_in_one_of_its_own_is_sealed(keeper: Keeper) -> None:
    born, sealed = kept(keeper, ["unshare", "--net", "sleep", "60"])
    assert (born["ev"], sealed["ev"]) == ("born", "sealed")
    assert sealed["steps"] == [step.name for step in PLAN.steps if step.where == "view"]


def test_what_was_built_is_detached_when_the_supervisor_has_gone(
    keeper: Keeper, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("gate") / "built here"
    directory.mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        ours.settimeout(WAIT_S)
        with theirs:
            message = {"name": "one", "host_uid": 70000, "built_at": str(directory)}
            keeper.ask("build", message, theirs.fileno(), PLAN)
        answer, fds = wire.receive(ours)
        for fd in fds:
            os.close(fd)
    assert answer is not None
    assert answer["ev"] == "sealed", answer
    assert os.path.ismount(f"{directory}/root/tmp")
    assert os.stat(f"{directory}/root/tmp").st_uid == 70000
    keeper.close()
    assert not os.path.ismount(directory)
    assert os.listdir(directory) == []


def test_a_container_that_starts_when_the_supervisor_is_gone_is_turned_away_at_its_gate(
    keeper: Keeper, tmp_path: Path
) -> None:
    known, unknown = tmp_path / "known", tmp_path / "unknown"
    for pipe in (known, unknown):
        os.mkfifo(pipe)
    keeper.expect("late", str(known))
    keeper._control.close()
    waiting = [subprocess.Popen(["sh", "-c", f"read -r _ < {pipe} || exit 125"]) for pipe in (known, unknown)]
    try:
        assert waiting[0].wait(30) == 125
        assert keeper._process.wait(30) == 0
        assert waiting[1].poll() is None, "the twin, of which the keeper was not told, waits on"
    finally:
        for process in waiting:
            process.kill()
            process.wait()
