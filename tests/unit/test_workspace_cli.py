"""`sandbox changes`: what it prints, what it does, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sandbox.cli.changes import app
from tests.helpers.workspaces import captured, held, plant, whiteout


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with one changeset, "call-1"."""
    lower = plant(tmp_path / "lower", {"a": "1\n", "gone": "g"})
    evil = "x\x1b[2J\n"
    upper = plant(tmp_path / "upper", {"a": "2\n", "new": "n\n", ".envrc": "evil", evil: "e", "out": ("link", "/etc")})
    whiteout(upper, "gone")
    captured(tmp_path / "state", lower, upper)
    return tmp_path / "state"


def run(state: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--state", str(state)])


def test_the_list_counts_what_waits(state: Path) -> None:
    done = run(state, "list")
    assert done.exit_code == 0
    assert done.stdout == f"call-1  4 added, 1 modified, 1 deleted, 2 protected  {state.parent / 'lower'}\n"
    listed = json.loads(run(state, "list", "--json").stdout)
    assert [(entry["record_id"], entry["counts"]["protected"]) for entry in listed] == [("call-1", 2)]


def test_nothing_waiting_is_said_apart_from_the_facts(tmp_path: Path) -> None:
    done = run(tmp_path, "list")
    assert (done.exit_code, done.stdout) == (0, "")
    assert "none are waiting" in done.stderr
    assert json.loads(run(tmp_path, "list", "--json").stdout) == []


def test_show_names_every_path_without_letting_one_act_on_the_terminal(state: Path) -> None:
    done = run(state, "show", "call-1", "--diff")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert "A  .envrc (protected: env-dir)" in lines
    assert "A  out -> /etc (protected: link-outside)" in lines
    assert "A  x\\x1b[2J\\x0a" in lines
    assert {"M  a", "D  gone", "-1", "+2"} <= set(lines)
    assert "\x1b" not in done.output
    shown = json.loads(run(state, "show", "call", "--json").stdout)  # the start of an id is enough
    assert "x\x1b[2J\n" in {change["path"] for change in shown["changes"]}


def test_a_commit_that_leaves_something_out_says_what_and_exits_with_1(state: Path) -> None:
    done = run(state, "commit", "call-1")
    assert done.exit_code == 1
    assert "left out: .envrc (protected: env-dir)" in done.stderr
    assert "--allow-protected env-dir --allow-protected link-outside" in done.stderr
    lower = held(state.parent / "lower")
    assert (lower["a"], lower["new"]) == ("2\n", "n\n")
    assert not {"gone", ".envrc", "out"} & set(lower)
    rest = run(state, "commit", "call-1", "--allow-protected", "env-dir", "--allow-protected", "link-outside", "--json")
    assert rest.exit_code == 0
    assert json.loads(rest.stdout) == {
        "applied": [".envrc", "out"],
        "protected": [],
        "failed": [],
        "skipped": [],
        "complete": True,
        "record_id": "call-1",
    }
    assert run(state, "list").stdout == ""


def test_a_conflict_is_a_refusal_with_nothing_changed(state: Path) -> None:
    lower = state.parent / "lower"
    (lower / "a").write_text("mine")
    done = run(state, "commit", "call-1")
    assert done.exit_code == 125
    assert "nothing was committed" in done.stderr
    assert held(lower) == {"a": "mine", "gone": "g"}
    assert run(state, "commit", "call-1", "--force").exit_code == 1
    assert (lower / "a").read_text() == "2\n"


def test_discarding_forgets(state: Path) -> None:
    before = held(state.parent / "lower")
    assert run(state, "discard", "call-1").exit_code == 0
    assert held(state.parent / "lower") == before
    assert run(state, "list").stdout == ""


def test_everything_is_forgotten_only_when_asked_for(state: Path) -> None:
    captured(state, state.parent / "lower", state.parent / "upper", record_id="call-2")
    assert run(state, "discard").exit_code == 125
    assert run(state, "discard", "call-1", "--all").exit_code == 125
    assert len(run(state, "list").stdout.splitlines()) == 2
    done = run(state, "discard", "--all", "--json")
    assert [entry["record_id"] for entry in json.loads(done.stdout)] == ["call-1", "call-2"]
    assert run(state, "list").stdout == ""


@pytest.mark.parametrize("record_id", ["nope", "../lower", "", "\x1b[2J"])
@pytest.mark.parametrize("command", ["show", "commit", "discard"])
def test_an_unknown_id_is_our_failure(state: Path, command: str, record_id: str) -> None:
    if record_id == "":
        captured(state, state.parent / "lower", state.parent / "upper", record_id="call-2")  # starts both
    done = run(state, command, record_id)
    assert done.exit_code == 125
    assert done.stdout == ""
    assert "\x1b" not in done.stderr
    assert (state / "changes/call-1/index.json").exists()
