"""A caller that goes between the hand-out of a standby and its start: the standby is nobody else's, then or later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sandbox._linux import cgroup
from sandbox.audit.store import iter_entries
from sandbox.audit.verify import verify_state
from tests.kernel.test_faults import wait_gone

pytestmark = [pytest.mark.needs("jail")]

ROOT = Path(__file__).parents[2]
CALLER = ROOT / "tests/helpers/handover.py"


def run_caller(state: Path, mode: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [sys.executable, str(CALLER), str(state), mode]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("mode", ["die", "leave"])
def test_a_standby_whose_caller_went_before_its_start_is_never_handed_out_again(state_root: Path, mode: str) -> None:
    state = state_root / mode
    state.mkdir()
    done = run_caller(state, mode)
    if mode == "die":
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert (done.returncode, done.stdout.strip()) == (0, "went on True"), done.stderr
    wait_gone(str(state), os.getpid())

    lines = [line.split() for line in (state / "handed").read_text().splitlines()]
    handed = Counter(name for what, name, *_ in lines if what == "handed")
    started = Counter(name for what, name, *_ in lines if what == "start")
    ((taken, given_up),) = [rest for what, *rest in lines if what == "parked"]
    assert set(handed.values()) == set(started.values()) == {1}
    assert handed[taken] == 1

    # The call that was given up has its record, closed once, and says who ended it; no other was lost.
    assert not [report for report in verify_state(state) if report.broken]
    opened = Counter(entry["record_id"] for entry in iter_entries(state) if entry["entry"] == "opened")
    closed = [entry for entry in iter_entries(state) if entry["entry"] == "closed"]
    assert opened == Counter(entry["record_id"] for entry in closed)
    assert set(opened.values()) == {1}
    ends = {entry["call_id"]: entry["ending"] for entry in closed}
    assert (ends[given_up]["kind"], ends[given_up]["fault"]) == ("killed", "caller")
    assert "lost" not in {end["kind"] for end in ends.values()}
    # Of this supervisor: tests beside this one kill others.
    name = cgroup.PREFIX + given_up.rpartition("-")[0]
    assert not [root for root, names, _ in os.walk("/sys/fs/cgroup") if name in names]
