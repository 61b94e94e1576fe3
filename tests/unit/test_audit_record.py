"""What a record says, what it never says, and how it reads."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.audit.attestation import attestation
from sandbox.audit.canonical import encode
from sandbox.audit.record import (
    CAPTURE_MAX_BYTES,
    ITEMS_MAX,
    RecoveryFacts,
    closed_record,
    lost_record,
    opened_record,
    rfc3339,
    uuid7,
)
from sandbox.audit.view import Record
from sandbox.errors import AuditError
from tests.helpers.audit import MANIFEST, MIB, closing, opening, pair

GROUPS = {
    "schema", "record_id", "call_id", "attempt", "context", "time", "agent", "principal", "host", "tool", "command",
    "policy", "isolation", "enforcement", "attestation", "usage", "network", "files", "processes", "decisions",
    "findings", "ending", "output", "truncated", "producer",
}  # fmt: skip


def capturing(*what: str) -> dict[str, Any]:
    return {**MANIFEST, "audit": {"capture": list(what)}}


def test_a_closed_record_has_every_group_and_repeats_the_opened_one() -> None:
    opened, closed = pair()
    assert set(closed) == GROUPS
    for name in set(opened) - {"time", "isolation"}:
        assert closed[name] == opened[name]


def test_requested_stands_beside_applied_and_missing() -> None:
    opened = opened_record(opening())
    closed = closed_record(opened, closing(isolation={"applied": ["mount"]}))
    assert closed["isolation"]["requested"] == ["mount", "mount", "seccomp"]
    assert closed["isolation"]["applied"] == ["mount"]
    assert closed["isolation"]["missing"] == ["landlock", "mount", "seccomp"]
    assert closed["isolation"]["degraded"] == ["io"]
    assert closed["enforcement"]["io"]["level"] == "none"
    assert closed["enforcement"]["io"]["reason"] == "no io controller"


def test_values_of_environment_variables_are_nowhere() -> None:
    _, closed = pair(captured={"stdout": b"x"})
    assert b"hunter2-value" not in encode(closed)
    assert closed["command"]["env_names"] == ["PATH", "TOKEN"]
    assert list(closed["policy"]["resolved_manifest"]["environment"]["set"]) == ["TOKEN"]


def test_ids_that_are_no_text_are_told_apart_and_written_as_text() -> None:
    sessions = [
        opened_record(opening(call={"session": value}))["context"]["session"] for value in (1, True, ["a"], None)
    ]
    assert sessions == ["1", "True", "['a']", None]


def test_content_is_stored_only_when_the_manifest_captures_it() -> None:
    seen = {"stdout": b"content-of-output", "stderr": b"", "result": {"answer": "content-of-result"}}
    call = {"arguments": {"q": "content-of-args"}, "arguments_sha256": "sha256:11"}
    for what in ("args", "output", "result"):
        policy = {"manifest": capturing(what)}
        opened = opened_record(opening(call=call, policy=policy))
        text = encode(closed_record(opened, closing(captured=seen))).decode()
        assert [name for name in ("args", "output", "result") if f"content-of-{name}" in text] == [what]
    _, plain = pair(captured=seen)
    assert b"content-of" not in encode(plain)


def test_captured_output_is_bounded() -> None:
    opened = opened_record(opening(policy={"manifest": capturing("output")}))
    closed = closed_record(opened, closing(captured={"stdout": b"\xff" * 10**6}))
    assert len(closed["output"]["stdout"]) < CAPTURE_MAX_BYTES + 100


def test_floods_are_cut_and_counted() -> None:
    flood = [{"host": "h" * 9999, "port": n, "decision": "deny"} for n in range(ITEMS_MAX + 7)]
    files = {"written": [f"/f{n}" for n in range(ITEMS_MAX + 1)]}
    _, closed = pair(network=flood, files=files, processes=flood)
    assert len(closed["network"]) == ITEMS_MAX
    assert closed["truncated"] == {"network": 7, "files.written": 1, "processes": 7}
    assert len(encode(closed)) < 4 * MIB


def test_a_call_refused_before_any_plan_has_a_record() -> None:
    opened = opened_record(opening(plan=None))
    closed = closed_record(opened, closing({"kind": "refused", "fault": "host", "message": "no cgroup"}))
    assert closed["enforcement"] == {}
    assert closed["ending"]["kind"] == "refused"
    assert closed["command"]["argv"] == ["python3"]


@pytest.mark.parametrize("ending", [{"kind": "fine", "fault": "tool"}, {"kind": "ok", "fault": "nobody"}, {}])
def test_an_ending_that_does_not_exist_is_refused(ending: dict[str, Any]) -> None:
    with pytest.raises(AuditError, match="no such ending"):
        pair(1, ending)


@pytest.mark.parametrize(("boot", "fault"), [("boot-1", "us"), ("boot-2", "host"), ("", "us")])
def test_a_lost_record_says_whose_fault_and_nothing_of_the_tool(boot: str, fault: str) -> None:
    lost = lost_record(opened_record(opening()), RecoveryFacts("2026-11-21T10:00:00.000000Z", boot))
    assert (lost["ending"]["kind"], lost["ending"]["fault"]) == ("lost", fault)
    assert lost["ending"]["exit_code"] is lost["time"]["duration_s"] is lost["network"] is lost["files"] is None
    assert all(value is None for value in lost["usage"].values())
    assert set(lost) == GROUPS


@given(st.integers(0, 2**48 * 1_000_000 - 1), st.binary(min_size=10, max_size=10))
def test_record_ids_are_uuids_of_version_7_that_sort_by_time(time_ns: int, entropy: bytes) -> None:
    made = uuid.UUID(uuid7(time_ns, entropy))
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert made.int >> 80 == time_ns // 1_000_000


def test_times_are_rfc3339_in_utc() -> None:
    assert rfc3339(1_700_000_000_123_456_789) == "2023-11-14T22:13:20.123456Z"


def verdict(control: str, manifest: dict[str, Any] = MANIFEST, **changes: Any) -> str:
    _, closed = pair(**changes)
    return str(attestation(manifest, closed)[control]["verdict"])


@pytest.mark.parametrize(
    ("control", "changes", "expected"),
    [
        ("memory", {"usage": {"memory_peak_bytes": 5 * MIB}}, "within"),
        ("memory", {"usage": {"memory_peak_bytes": 5 * MIB, "oom_kills": 1}}, "exceeded"),
        ("memory", {"ending": {"kind": "limit:memory", "fault": "tool"}}, "exceeded"),
        ("memory", {}, "within"),
        ("pids", {}, "not_observable"),
        ("pids", {"usage": {"pids_peak": 3, "pids_refused": 9}}, "exceeded"),
        ("pids", {"usage": {"pids_peak": 9999, "pids_refused": 0}}, "within"),
        ("cpus", {"usage": {"cpu_user_s": 25.0}}, "not_observable"),
        ("cpus", {"usage": {"cpu_user_s": 25.0}, "enforcement": {"cpus": {"level": "full"}}}, "within"),
        ("cpus", {"usage": {"cpu_user_s": 0.0}}, "unused"),
        ("cpu_time", {"usage": {"cpu_user_s": 9.0, "cpu_system_s": 2.0}}, "exceeded"),
        ("wall_time", {}, "within"),
        ("output", {"output": {"stdout_bytes": 0, "stderr_bytes": 0}}, "unused"),
        ("disk", {"usage": {"disk_used_bytes": 1}}, "within"),
        ("cpu_time", {"usage": {"cpu_usage_s": 11.0}}, "exceeded"),
        ("network", {}, "not_observable"),
        ("network", {"network": [{"host": "x", "decision": "deny"}]}, "exceeded"),
        ("network", {"network": [{"host": "x", "decision": "allow"}]}, "within"),
        ("filesystem", {"files": {"written": [{"path": "a"}]}}, "within"),
        ("filesystem", {"files": {"denied": [{"path": "a"}]}}, "exceeded"),
        ("filesystem", {}, "not_observable"),
    ],
)
def test_each_capability_gets_its_verdict(control: str, changes: dict[str, Any], expected: str) -> None:
    assert verdict(control, **changes) == expected


def test_a_granted_host_that_nobody_asked_for_is_unused() -> None:
    manifest = {**MANIFEST, "network": {"mode": "allowlist", "allow": ["example.org:443"]}}
    assert verdict("network", manifest, network=[]) == "unused"


def test_a_limit_that_was_not_asked_for_has_no_verdict() -> None:
    assert "io" not in attestation(MANIFEST, pair()[1])


def test_the_record_reads_by_attribute_and_cannot_be_changed() -> None:
    record = Record(pair(network=[{"host": "example.org", "decision": "deny"}])[1])
    assert record.ending.kind == "ok"
    assert record.enforcement["memory"].level == "full"
    assert record.network[0].host == "example.org"
    assert record.tool.type == "program"
    assert record.digest.startswith("sha256:")
    with pytest.raises(AttributeError):
        record.ending.kind = "denied"
    with pytest.raises(AttributeError):
        del record.ending
    with pytest.raises(AttributeError, match="no field 'nothing'"):
        _ = record.nothing
    record.to_json()["ending"]["kind"] = "denied"
    assert record.ending.kind == "ok"


def test_the_record_copies_pickles_and_becomes_json() -> None:
    record = Record(pair()[1])
    assert pickle.loads(pickle.dumps(record)) == copy.deepcopy(record) == record
    assert hash(copy.copy(record)) == hash(record)
    assert json.loads(json.dumps(record.to_json()))["record_id"] == record.record_id


HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\r\nok  forged line \u202e\x9b31m<script>"


def test_what_a_tool_names_itself_reaches_no_terminal_raw() -> None:
    from rich.console import Console

    hostile = {"tool": HOSTILE, "why": HOSTILE, "agent": HOSTILE, "argv": [HOSTILE], "session": HOSTILE}
    opened = opened_record(opening(call=hostile, plan=None))
    items = [{"host": HOSTILE, "path": HOSTILE, "kind": HOSTILE, "id": HOSTILE, "decision": HOSTILE}]
    seen = closing(
        {"kind": "tool_error", "fault": "tool", "message": HOSTILE},
        network=items, findings=items, decisions=items, files={"written": items, HOSTILE: items},
        enforcement={HOSTILE: {"level": HOSTILE, "mechanism": HOSTILE, "reason": HOSTILE}}, usage={HOSTILE: HOSTILE},
    )  # fmt: skip
    record = Record(closed_record(opened, seen))
    console = Console(width=100, force_terminal=False, record=True)
    with console.capture() as capture:
        console.print(record)
    for text in (capture.get(), repr(record), record._repr_html_()):
        assert not [c for c in text if (ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) <= 0x9F or c == "\u202e"]
    assert "\nok  forged" not in capture.get()
    assert "[red]x[/red]" in capture.get().replace("\n", "")
    assert "<script>" not in record._repr_html_()


def test_the_supervisor_imports_nothing_heavy_for_its_records() -> None:
    code = (
        "import sys, sandbox.audit.chain, sandbox.audit.record, sandbox.audit.recover, sandbox.audit.store;"
        "print([m for m in ('pydantic','rich','cryptography','typer','datetime','asyncio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
