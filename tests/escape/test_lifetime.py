"""Outliving the call: daemons, ignored signals, stopped processes, and what is left when a part of ours is killed."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

import pytest

from sandbox import Sandbox
from sandbox.supervisor import polling
from tests.helpers.escape import TIME_FACTOR, Jail
from tests.helpers.waiting import describe, left
from tests.helpers.workspaces import plant

pytestmark = [pytest.mark.needs("jail")]

DAEMONS = {
    "background": "{sleep} & disown",
    "nohup": "nohup {sleep} >/dev/null 2>&1 &",
    "setsid": "setsid {sleep} >/dev/null 2>&1 &",
    "double-fork": "(setsid sh -c '({sleep} >/dev/null 2>&1 &) &' &)",
    "closed-streams": "(exec <&- >&- 2>&-; setsid {sleep}) &",
    "ignores-everything": "sh -c 'trap \"\" HUP INT TERM QUIT PIPE; {sleep}' >/dev/null 2>&1 &",
    "stopped": "{sleep} & /bin/sleep 0.1; kill -STOP $!",
    "holds-the-output": "{sleep} &",
}


@pytest.fixture
def marker() -> str:
    """An argument by which a process is found from outside."""
    return f"86{secrets.randbelow(10**9):09d}"


def processes_with(marker: str) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if marker.encode() in Path(f"/proc/{name}/cmdline").read_bytes() and int(name) != os.getpid():
                    found.append(int(name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def assert_gone(marker: str) -> None:
    assert [describe(pid) for pid in left(lambda: processes_with(marker))] == []


@pytest.mark.parametrize("how", DAEMONS)
def test_nothing_outlives_the_call(jail: Jail, marker: str, how: str) -> None:
    start = DAEMONS[how].format(sleep=f"sleep {marker}")
    seen = "cat /proc/[0-9]*/comm | grep -cx sleep"
    # It takes its time to become a daemon; what waits here is no more when it is looked for.
    outcome = jail.run(["bash", "-c", f"{start}\nfor _ in {{1..100}}; do sleep 0.1; {seen} && break; done"])
    assert outcome.ok, outcome.stderr
    assert int(outcome.text.split()[-1]) >= 1
    assert processes_with(marker) == []


def test_an_orphan_may_live_as_long_as_the_call(jail: Jail) -> None:
    outcome = jail.run(
        ["sh", "-c", "(sleep 0.3; echo late > /tmp/late) & until [ -s /tmp/late ]; do sleep 0.1; done; cat /tmp/late"]
    )
    assert outcome.text == "late\n"


@pytest.mark.parametrize(
    "script",
    [
        "trap '' TERM INT HUP QUIT; while :; do sleep {m}; done",
        "kill -STOP $$",
        "setsid sleep {m} & sleep {m}",
        "while :; do :; done",
    ],
    ids=["ignores-signals", "stops-itself", "left-its-group", "spins"],
)
def test_the_wall_time_ends_it_whatever_it_does(jail: Jail, marker: str, script: str) -> None:
    started = time.monotonic()
    outcome = jail.run(["sh", "-c", script.format(m=marker)], wall_time="0.7s")
    assert (outcome.ending.kind, outcome.exit_code) == ("limit:wall_time", 124)
    assert outcome.record.ending.kind == "limit:wall_time"
    assert time.monotonic() - started < 15 * TIME_FACTOR
    assert processes_with(marker) == []


def test_a_reaper_of_its_own_keeps_nothing_alive(jail: Jail, marker: str) -> None:
    """PR_SET_CHILD_SUBREAPER (36) gathers orphans; they end with the jail all the same."""
    script = (
        "import ctypes, os, time\n"
        "assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0\n"
        "if os.fork() == 0:\n"
        "    if os.fork() == 0:\n"
        f"        os.execvp('sleep', ['sleep', '{marker}'])\n"
        "    os._exit(0)\n"
        "os.wait(); time.sleep(0.1); print('gathered')"
    )
    outcome = jail.run(["python3", "-S", "-c", script])
    assert outcome.text == "gathered\n", outcome.stderr
    assert processes_with(marker) == []


def test_leaving_a_stream_early_ends_the_call(jail: Jail, marker: str) -> None:
    with jail.box.stream(["sh", "-c", f"echo started; sleep {marker}"]) as stream:
        next(iter(stream))
        assert processes_with(marker)
    assert_gone(marker)


def test_a_jail_does_not_outlive_its_supervisor(tmp_path: Path, marker: str) -> None:
    """Killed at once: the kernel takes the jails with it, and the next start closes the record as lost."""
    import signal

    state = tmp_path / "state"
    with Sandbox("shell", state=state) as box:
        assert box.run(["true"]).ok
        assert box._link is not None
        supervisor = box._link.supervisor_pid
        with (
            pytest.raises(Exception, match="supervisor"),
            box.stream(["sh", "-c", f"echo x; sleep {marker}"]) as stream,
        ):
            for _ in stream:
                assert processes_with(marker)
                os.kill(supervisor, signal.SIGKILL)
            stream.outcome  # noqa: B018 - raises CallLost
    assert_gone(marker)
    with Sandbox("shell", state=state) as box:
        assert box.run(["true"]).ok


def test_a_supervisor_killed_in_a_call_leaves_no_set_id_file(tmp_path: Path, marker: str) -> None:
    """No sweep runs then: whatever keeps such files from the host must have held at once."""
    import signal

    workspace = plant(tmp_path / "workspace", {"file": "x"})
    script = f"chmod 6755 file; cp file copy; chmod u+s copy; echo ready; sleep {marker}"
    with Sandbox("shell", state=tmp_path / "state", workspace=str(workspace), workspace_mode="rw") as box:
        assert box._link is not None
        with pytest.raises(Exception, match="supervisor"), box.stream(["sh", "-c", script]) as stream:
            for name, data in stream:
                if name == "stdout" and b"ready" in data:
                    os.kill(box._link.supervisor_pid, signal.SIGKILL)
            stream.outcome  # noqa: B018
    assert sorted(path.name for path in workspace.iterdir()) == ["copy", "file"]
    assert not any(path.stat().st_mode & 0o6000 for path in workspace.iterdir())


def test_nothing_of_a_call_is_left_below_the_zygote(jail: Jail) -> None:
    assert jail.run(["sh", "-c", "sleep 5 & sleep 5 & exit 0"]).ok
    assert jail.box._link is not None
    names = []
    for pid in polling.descendants(jail.box._link.supervisor_pid):
        try:
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert "sleep" not in names
