"""`sandbox audit` prints facts, exits honestly, and lets no tool write on the terminal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sandbox.audit.chain import Chain
from sandbox.audit.record import closed_record, opened_record
from sandbox.cli.audit import app
from tests.helpers.audit import closing, no_chain_stays_open, opening, pair, record_id, write_chain

__all__ = ["no_chain_stays_open"]  # a fixture for every test here

HOSTILE = "\x1b]0;owned\x07\x1b[2J[red]x[/red]\r\n018bcfe5 forged line\u202e\x9b31m"


def audit(state: Path, *args: str) -> Result:
    return CliRunner().invoke(app, [*args, "--state", str(state)], terminal_width=200)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Three good calls, one that hit its memory limit with hostile texts, one that still runs."""
    chain = write_chain(tmp_path, 3)
    call = {"tool": HOSTILE, "why": HOSTILE, "argv": [HOSTILE], "kind": "program"}
    opened = opened_record(opening(10, call=call))
    ending = {"kind": "limit:memory", "fault": "tool", "signal": 9, "message": HOSTILE}
    chain.append_opened(opened)
    chain.append_closed(closed_record(opened, closing(ending, network=[{"host": HOSTILE, "decision": "deny"}])))
    chain.append_opened(pair(11)[0])
    return tmp_path


def is_safe(text: str) -> bool:
    return not [c for c in text if (ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) <= 0x9F or c == "\u202e"]


def test_list_json_is_one_array_of_whole_records_newest_first(state: Path) -> None:
    records = json.loads(audit(state, "list", "--json").stdout)
    assert [record["record_id"] for record in records] == [record_id(n) for n in (11, 10, 2, 1, 0)]
    assert records[1]["ending"]["kind"] == "limit:memory"
    assert records[1]["context"]["why"].startswith("\x1b]0;")


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (["--limit", "2"], [11, 10]),
        (["--kind", "ok"], [2, 1, 0]),
        (["--kind", "limit"], [10]),
        (["--kind", "limit:memory"], [10]),
        (["--kind", "open"], [11]),
        (["--tool", "shell", "--limit", "1"], [11]),
        (["--since", "2026-11-21T00:00:02Z"], [11, 10, 2]),
        (["--since", "2026-11-21T02:00:02+02:00"], [11, 10, 2]),
    ],
)
def test_list_chooses(options: list[str], numbers: list[int], state: Path) -> None:
    records = json.loads(audit(state, "list", "--json", *options).stdout)
    assert [record["record_id"] for record in records] == [record_id(number) for number in numbers]


def test_an_unreadable_time_is_an_error(state: Path) -> None:
    result = audit(state, "list", "--since", "yesterday")
    assert (result.exit_code, result.stdout) == (125, "")
    assert "30m" in result.stderr


def test_an_empty_state_lists_as_an_empty_array(tmp_path: Path) -> None:
    assert json.loads(audit(tmp_path, "list", "--json").stdout) == []
    result = audit(tmp_path, "list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no such records" in result.stderr


@pytest.mark.parametrize("command", [["list"], ["show", "last"], ["show", record_id(10)], ["verify"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_nothing_that_a_tool_chose_reaches_the_terminal_raw(command: list[str], form: list[str], state: Path) -> None:
    result = audit(state, *command, *form)
    assert result.exit_code == 0
    assert is_safe(result.stdout)
    assert is_safe(result.stderr)
    assert not [line for line in result.stdout.splitlines() if line.startswith("018bcfe5 forged")]


def test_an_export_holds_no_raw_control_characters(state: Path) -> None:
    assert is_safe(audit(state, "export").stdout)
    assert is_safe(audit(state, "export", "--format", "jsonl").stdout.replace("\u202e", ""))


def test_show_tells_the_ending_the_fault_and_the_walls(state: Path) -> None:
    text = audit(state, "show", record_id(10)).stdout
    for part in ("limit:memory fault=tool signal=9", "cgroup v2", "256.0 MiB", "exceeded", "no io controller", "deny"):
        assert part in text


def test_show_json_is_the_stored_entry(state: Path) -> None:
    shown = json.loads(audit(state, "show", record_id(1), "--json").stdout)
    stored = [json.loads(line) for line in (state / "chains/chain-1/000001.jsonl").read_bytes().splitlines()]
    assert shown == stored[3]


def test_show_takes_a_running_call(state: Path) -> None:
    assert "running" in audit(state, "show", "last").stdout


def test_show_of_nothing_is_our_failure_and_says_what_to_do(state: Path) -> None:
    result = audit(state, "show", "0000")
    assert (result.exit_code, result.stdout) == (125, "")
    assert "sandbox audit list" in result.stderr


def test_verify_exits_with_1_and_names_the_entry_when_a_chain_is_broken(state: Path) -> None:
    assert audit(state, "verify").exit_code == 0
    write_chain(state, 2, chain_id="chain-2").close()
    segment = state / "chains" / "chain-1" / "000001.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b'"kind":"ok"', b'"kind":"no"', 1))
    result = audit(state, "verify")
    assert result.exit_code == 1
    assert "BROKEN  chain-1: entry 2 (000001.jsonl line 2) fails check 8, hash" in result.stdout
    assert "1 of 2 chains verify" in result.stdout
    report = json.loads(audit(state, "verify", "--json").stdout)
    assert report["ok"] is False
    assert [chain["ok"] for chain in report["chains"]] == [False, True]
    assert report["chains"][0]["broken"]["index"] == 2


def test_verify_takes_a_chain_directory_and_an_export(state: Path, tmp_path: Path) -> None:
    export = tmp_path / "export.jsonl"
    assert audit(state, "export", "--format", "jsonl", "-o", str(export)).exit_code == 0
    assert audit(state, "verify", str(export)).exit_code == 0
    assert audit(state, "verify", str(state / "chains" / "chain-1")).exit_code == 0
    assert audit(state, "verify", str(tmp_path / "none")).exit_code == 125


def test_export_json_is_every_record_oldest_first(state: Path, tmp_path: Path) -> None:
    target = tmp_path / "records.json"
    target.write_text("old")
    assert audit(state, "export", "-o", str(target)).exit_code == 0
    records = json.loads(target.read_text())
    assert [record["record_id"] for record in records] == [record_id(n) for n in (0, 1, 2, 10, 11)]
    assert list(tmp_path.glob(".records*")) == []


def test_a_failed_export_leaves_the_old_file(state: Path, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    result = audit(state, "export", "-o", str(tmp_path / "dir"))
    assert result.exit_code == 125
    assert list(tmp_path.glob(".dir*")) == []


def test_the_state_may_come_from_the_environment(state: Path) -> None:
    result = CliRunner().invoke(app, ["list", "--json"], env={"SANDBOX_STATE": str(state)})
    assert len(json.loads(result.stdout)) == 5


def test_entries_that_are_not_ours_are_shown_without_harm(tmp_path: Path) -> None:
    with Chain(tmp_path, "chain-1") as chain:
        for number, odd in enumerate((5, [], "x", {"kind": []}, None)):
            entry = dict.fromkeys(("ending", "tool", "usage", "network", "files", "enforcement", "command"), odd)
            chain.append_opened({"record_id": f"odd-{number}", "time": {"time_start": str(number)}, **entry})
            chain.append_closed({"record_id": f"odd-{number}", "time": odd, **entry})
    assert audit(tmp_path, "list").exit_code == 0
    assert audit(tmp_path, "list", "--kind", "ok", "--tool", "x").exit_code == 0
    for number in range(5):
        assert audit(tmp_path, "show", f"odd-{number}").exit_code == 0
