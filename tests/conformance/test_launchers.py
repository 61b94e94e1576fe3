"""Every promise on every launcher that this machine has: the public suite, one test a check."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.testing import CHECKS, Check, Stage, check_launcher
from sandbox.testing.stage import BROKEN, HELD, NOT_TRIED, REFUSED, judge
from tests.helpers import engine as engines

WALLS: dict[str, dict[str, Any]] = {
    "jail": {"launcher": "jail"},
    "crun": {"launcher": "oci", "runtime": "crun"},
    "runc": {"launcher": "oci", "runtime": "runc"},
    "nsjail": {"launcher": "nsjail"},
    "docker": {"launcher": "docker", "image": engines.PYTHON},
}
# A program of that name is needed; the native jail needs none.
NEEDS = {"crun": ("crun",), "runc": ("runc", "root"), "nsjail": ("nsjail",)}
PARAMS = [pytest.param(name, marks=[pytest.mark.needs(*NEEDS[name])] if name in NEEDS else []) for name in WALLS]
# Nothing may be refused but what a host's kernel may not hold: disk traffic, by cgroup version 1 or without cgroups.
REFUSALS = {"io"}
# An ordinary user may have no cgroups to make groups in.
USERS_REFUSALS = {"memory", "pids", "cpus", "cpu_time"}


@pytest.fixture(scope="module", params=PARAMS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Stage]]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "docker":
            patch.setenv("DOCKER_HOST", request.getfixturevalue("engine").host)
        made = Stage(WALLS[request.param], tmp_path_factory.mktemp("state"))
        try:
            with made.box():
                made.find_short()
                yield request.param, made
        finally:
            made.close()


@pytest.mark.needs("jail")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_promise(stage: tuple[str, Stage], check: Check) -> None:
    finding = judge(check, stage[1])
    if finding.verdict == NOT_TRIED:
        pytest.skip(f"needs {finding.reason}")
    assert finding.verdict in (HELD, REFUSED), finding.reason
    if finding.verdict == REFUSED:
        assert check.name in REFUSALS | (USERS_REFUSALS if os.geteuid() else set()), finding.reason


def test_a_broken_promise_is_reported_as_broken(monkeypatch: pytest.MonkeyPatch, state_root: Any) -> None:
    """The suite's own twin: a check that a launcher does not pass must not look like one that it passes."""

    def breaks(_stage: Stage) -> None:
        raise AssertionError("it got out")

    check = Check("breaks", "promise", "nothing gets out", breaks)
    monkeypatch.setattr("sandbox.testing.suite.CHECKS", (check,))
    report = check_launcher("jail", state=state_root)
    assert not report.ok
    assert report.of(BROKEN)[0].reason == "AssertionError: it got out"
    with pytest.raises(AssertionError, match="jail breaks 1 promise"):
        report.require()


def test_an_unknown_check_is_an_error() -> None:
    with pytest.raises(ValueError, match="no check is called 'nothing'"):
        check_launcher(only=["nothing"])
