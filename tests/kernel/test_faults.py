"""Whoever is killed, at whatever moment: nothing is left running, and every call has exactly one ending."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Sandbox
from sandbox._linux import cgroup
from sandbox.audit.store import iter_entries, list_chains
from sandbox.audit.verify import verify_state
from tests.helpers.waiting import describe, eventually, left

CALLER = Path(__file__).parents[1] / "helpers" / "fault_caller.py"
ROOT = Path(__file__).parents[2]
# 200 kills in all, as root. Those of caller and supervisor need a fresh start each, which is what takes the time.
KILLS = {"caller": 40, "supervisor": 40, "zygote": 50, "jail": 70}
if os.geteuid() != 0:
    KILLS = {victim: count // 4 for victim, count in KILLS.items()}
GONE_WITHIN_S = 20.0


class Caller:
    """A running fault caller: its pids, and what its calls have said so far."""

    def __init__(self, state: Path, mark: str) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        argv = [sys.executable, str(CALLER), str(state), mark]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, env=env, text=True, start_new_session=True)
        assert self.process.stdout is not None
        self.pids: dict[str, int] = json.loads(self.process.stdout.readline())
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(line.strip() for line in self.process.stdout)

    def jails(self) -> list[int]:
        """Builders and pid 1s: children of the zygote, and theirs. The zygote may be a new one by now."""
        builders = [pid for zygote in children(self.pids["supervisor"]) for pid in children(zygote)]
        return [*builders, *(pid for builder in builders for pid in children(builder))]

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def marked(mark: str, caller: int) -> list[str]:
    """Every living process with the mark in its command line, but for the caller."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == caller:
            continue
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / "cmdline").read_bytes():
                found.append(f"{entry.name} {(entry / 'cmdline').read_bytes()!r}")
    return found


def wait_gone(mark: str, caller: int) -> None:
    assert not left(lambda: marked(mark, caller), GONE_WITHIN_S), "outlived the kill"


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_dead(pid: int) -> None:
    assert eventually(lambda: not is_alive(pid), GONE_WITHIN_S), describe(pid)


def check_endings(state: Path) -> dict[str, int]:
    """Every opened record has exactly one closed entry, and every chain verifies. Returns the endings' counts."""
    assert not [report for report in verify_state(state) if report.broken]
    counts: dict[str, int] = {}
    for chain in list_chains(state):
        opened: dict[str, int] = {}
        for entry in iter_entries(chain):
            if entry["entry"] == "opened":
                opened[entry["record_id"]] = 0
            elif entry["entry"] == "closed":
                opened[entry["record_id"]] += 1
                kind = entry["ending"]["kind"]
                counts[kind] = counts.get(kind, 0) + 1
        assert set(opened.values()) <= {1}, f"{chain}: {[r for r, n in opened.items() if n != 1]}"
    return counts


def our_groups() -> set[str]:
    return {
        f"{root}/{name}"
        for root, names, _ in os.walk("/sys/fs/cgroup")
        for name in names
        if "toolcall-sandbox-" in name
    }


def our_mounts(state: Path) -> set[str]:
    """Mounts where ours would be; elsewhere other programs of this machine come and go."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return {line for line in lines if line.split()[4].startswith(("/sys/", "/run/sandbox", str(state)))}


@pytest.fixture
def host_is_clean(tmp_path: Path) -> Iterator[None]:
    groups, mounts = our_groups(), our_mounts(tmp_path)
    yield

    def ownerless() -> list[str]:
        cgroup.reap()
        return [group for group in our_groups() - groups if not _has_living_owner(group)]

    # A test beside us may kill a supervisor between the reaping and the look: the next look finds it reaped.
    remaining = left(ownerless, GONE_WITHIN_S)
    assert not remaining, f"cgroups left: {remaining}"
    assert our_mounts(tmp_path) == mounts


def _has_living_owner(group: str) -> bool:
    name = group.rpartition("toolcall-sandbox-")[2].partition("/")[0]
    return is_alive(int(name.split("-")[0]))


@pytest.mark.needs("jail")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", ["caller", "supervisor"])
def test_killing_caller_or_supervisor_leaves_nothing_and_one_ending_each(
    victim: str, tmp_path: Path, host_is_clean: None
) -> None:
    choice = random.Random(victim)
    for _ in range(KILLS[victim]):
        mark = f"mark-{uuid.uuid4().hex}"
        caller = Caller(tmp_path, mark)
        try:
            time.sleep(choice.uniform(0, 0.15))
            os.kill(caller.pids[victim], signal.SIGKILL)
            wait_dead(caller.pids["zygote"])
            wait_dead(caller.pids["supervisor"])
            wait_gone(mark, caller.pids["caller"])
        finally:
            caller.end()
    with Sandbox("shell", state=tmp_path) as box:
        assert box.run(["true"]).ok
    counts = check_endings(tmp_path)
    assert counts["ok"] > 0
    # A dead caller's calls are ended and closed by the supervisor; a dead supervisor's by the next one, as lost.
    assert counts["killed" if victim == "caller" else "lost"] > 0


@pytest.mark.needs("jail")
@pytest.mark.timeout(400)
@pytest.mark.parametrize("victim", ["zygote", "jail"])
def test_killing_zygote_or_jail_ends_those_calls_and_the_next_ones_run(
    victim: str, tmp_path: Path, host_is_clean: None
) -> None:
    choice = random.Random(victim)
    mark = f"mark-{uuid.uuid4().hex}"
    caller = Caller(tmp_path, mark)
    try:
        for _ in range(KILLS[victim]):
            time.sleep(choice.uniform(0, 0.1))
            pids = children(caller.pids["supervisor"]) if victim == "zygote" else caller.jails()
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(choice.choice(pids), signal.SIGKILL)
        ended = len(caller.lines)
        again = eventually(lambda: caller.lines[ended:].count("ok") >= 16, GONE_WITHIN_S)
        assert again, f"calls no longer run: {caller.lines[ended:]}"
    finally:
        os.kill(caller.pids["caller"], signal.SIGTERM)
        caller.end()
    wait_dead(caller.pids["supervisor"])
    wait_gone(mark, -1)
    with Sandbox("shell", state=tmp_path) as box:
        assert box.run(["true"]).ok
    counts = check_endings(tmp_path)
    assert counts["ok"] > 16
    assert counts.get("lost", 0) + counts.get("launch_error", 0) > 0
