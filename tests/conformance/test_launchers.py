"""Every promise on every launcher that this machine has: the public suite, one test a check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sandbox.testing import CHECKS, Check, Stage, check_launcher
from sandbox.testing.stage import BROKEN, HELD, NOT_TRIED, REFUSED, judge
from tests.helpers import engine as engines

LAUNCHERS = ("jail", "docker")
# What a launcher declares that it cannot do has to be refused, and nothing else may be.
REFUSALS = {
    "jail": {"io"},  # by cgroup version 1 and without cgroups, which is the host's affair
    "docker": {"io", "changes_can_be_discarded"},
}


@pytest.fixture(scope="module", params=LAUNCHERS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Stage]]:
    isolation: dict[str, Any] = {"launcher": request.param}
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "docker":
            patch.setenv("DOCKER_HOST", request.getfixturevalue("engine").host)
            isolation["image"] = engines.PYTHON
        made = Stage(isolation, tmp_path_factory.mktemp("state"))
        try:
            with made.box():
                yield request.param, made
        finally:
            made.close()


@pytest.mark.needs("jail")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_promise(stage: tuple[str, Stage], check: Check) -> None:
    launcher, made = stage
    finding = judge(check, made)
    if finding.verdict == NOT_TRIED:
        pytest.skip(f"needs {finding.reason}")
    assert finding.verdict in (HELD, REFUSED), finding.reason
    if finding.verdict == REFUSED:
        assert check.name in REFUSALS[launcher], finding.reason
    elif launcher != "jail":
        assert check.name not in REFUSALS[launcher], "declared as a gap, yet it works"


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
