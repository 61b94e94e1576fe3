"""Whose fault an ending was, and what a caller gets of it."""

from __future__ import annotations

import errno
import signal
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox.ending import Ending, Seen, classify
from sandbox.errors import CallLost, CallTimeout, LaunchError, LimitExceeded, Revoked, SandboxError, ToolFailed
from sandbox.outcome import Outcome

KILLED = int(signal.SIGKILL)

ENDINGS: list[tuple[dict[str, Any], tuple[str, str, int]]] = [
    ({"exit_status": 0}, ("ok", "tool", 0)),
    ({"exit_status": 3 << 8}, ("tool_error", "tool", 3)),
    ({"exit_status": 127 << 8}, ("tool_error", "tool", 127)),
    ({"exit_status": KILLED}, ("tool_error", "tool", 137)),
    # An exit by SIGKILL is memory only where the kernel says so.
    ({"exit_status": KILLED, "oom_kills": 1}, ("limit:memory", "tool", 137)),
    ({"exit_status": 0, "oom_kills": 1}, ("ok", "tool", 0)),
    ({"exit_status": None, "oom_kills": 1}, ("limit:memory", "tool", 137)),
    ({"exit_status": int(signal.SIGXCPU)}, ("limit:cpu_time", "tool", 152)),
    ({"exit_status": KILLED, "stopped": "wall_time"}, ("limit:wall_time", "tool", 124)),
    ({"exit_status": KILLED, "stopped": "output"}, ("limit:output", "tool", 137)),
    ({"exit_status": KILLED, "stopped": "caller"}, ("killed", "caller", 137)),
    ({"exit_status": KILLED, "stopped": "revoked"}, ("revoked", "caller", 137)),
    ({"exit_status": KILLED, "stopped": "gpu"}, ("denied", "tool", 137)),
    ({"exit_status": KILLED, "stopped": "gpu_lost:GPU_IS_LOST"}, ("lost", "host", 125)),
    ({"exit_status": KILLED, "stopped": "gateway"}, ("lost", "us", 125)),
    ({"exit_status": None}, ("lost", "host", 125)),
    ({"exec_errno": errno.ENOENT, "exit_status": 127 << 8}, ("tool_error", "tool", 127)),
    ({"exec_errno": errno.EACCES, "exit_status": 127 << 8}, ("tool_error", "tool", 126)),
    # Ours before anything that the tool may have done.
    ({"step_failed": "pivot", "step_errno": 1, "exit_status": KILLED, "oom_kills": 1}, ("launch_error", "host", 125)),
    ({"step_failed": "seccomp", "is_bug": True, "exit_status": 0}, ("launch_error", "us", 125)),
]


@pytest.mark.parametrize(("seen", "expected"), ENDINGS, ids=[str(seen) for seen, _ in ENDINGS])
def test_what_was_seen_decides_kind_and_fault(seen: dict[str, Any], expected: tuple[str, str, int]) -> None:
    ending = classify(Seen(**seen))
    assert (ending.kind, ending.fault, Outcome(ending).exit_code) == expected


def test_a_directory_that_cannot_be_entered_is_not_said_to_be_a_missing_program() -> None:
    where = classify(Seen(exec_errno=errno.ENOENT, exec_directory="/gone", exit_status=127 << 8))
    assert where.message == "it cannot start in '/gone': No such file or directory"
    program = classify(Seen(exec_errno=errno.ENOENT, exit_status=127 << 8))
    assert program.message == "there is no such program inside"


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("tool_error", ToolFailed),
        ("limit:memory", LimitExceeded),
        ("limit:wall_time", CallTimeout),
        ("revoked", Revoked),
        ("lost", CallLost),
        ("launch_error", LaunchError),
    ],
)
def test_every_bad_ending_is_an_error_of_its_own(kind: str, error: type[SandboxError]) -> None:
    with pytest.raises(error):
        Outcome(Ending(kind, "tool", 1)).unwrap()


def test_a_limit_says_how_much_it_was() -> None:
    enforcement = {"memory": SimpleNamespace(requested=64 << 20), "wall_time": SimpleNamespace(requested=1.5)}
    record = SimpleNamespace(enforcement=enforcement, record_id="r")
    for limit, text in (("memory", "resources.memory = 64MiB"), ("wall_time", "resources.wall_time = 1.5s")):
        with pytest.raises(LimitExceeded) as caught:
            Outcome(Ending(f"limit:{limit}", "tool"), record=record).unwrap()
        assert caught.value.hint == f"the limit is {text}"


def test_a_good_outcome_is_nobodys_fault() -> None:
    assert "fault" not in repr(Outcome(Ending("ok", "tool", 0)))
    assert "fault=host" in repr(Outcome(Ending("lost", "host")))
