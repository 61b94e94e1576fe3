"""A kept plan is found for the very question that it answers, and only while everything is as it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import kept, profile_places

FACTS = b'{"uid": 0, "cgroup_path": "/a"}'


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory, a project to be in, a user's own profiles, a ceiling, and nothing of the host's."""
    for name in ("state", "project", "config/sandbox/profiles"):
        (tmp_path / name).mkdir(mode=0o700, parents=True)
    (tmp_path / "config/sandbox/profiles/own.toml").write_text('extends = "shell"\n')
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("SANDBOX_CEILING", raising=False)
    monkeypatch.setattr(profile_places, "SYSTEM_CEILING", str(tmp_path / "ceiling.toml"))
    return tmp_path


def ask(world: Path, profile: str = "own", **settings: Any) -> kept.Question:
    question = kept.ask(profile, settings, str(world / "state"), tty=False)
    assert question is not None
    return question


def answer(world: Path) -> dict[str, Any]:
    parent = world / "config/sandbox/profiles/own.toml"
    text = dict.fromkeys(("policy_id", "plan_id", "durability", "cwd"), "x")
    return {
        **text,
        **{name: {} for name in ("policy", "plan", "call", "env", "set")},
        "facts": kept.facts_digest(FACTS),
        "allow": ["LANG"],
        "sources": [[str(parent), f"sha256:{hashlib.sha256(parent.read_bytes()).hexdigest()}"]],
    }


def kept_file(world: Path) -> Path:
    (path,) = (world / "state/cache").glob("*.plan")
    return path


def test_what_was_kept_is_found_by_the_same_question(world: Path) -> None:
    assert kept.find(ask(world)) is None
    kept.keep(ask(world), answer(world))
    found = kept.find(ask(world))
    assert found is not None
    assert found["durability"] == "x"
    assert found.fits(b'{"cgroup_path": "/b", "uid": 0}')
    assert not found.fits(b'{"cgroup_path": "/a", "uid": 1}')
    assert kept_file(world).stat().st_mode & 0o777 == 0o600
    assert (world / "state/cache").stat().st_mode & 0o777 == 0o700


def append(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def change(world: Path, _: pytest.MonkeyPatch) -> None:
        path = world / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write("#")

    return change


def setting(name: str, value: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda _world, monkeypatch: monkeypatch.setenv(name, value)


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "a byte of a profile": append("config/sandbox/profiles/own.toml"),
    "a ceiling": append("ceiling.toml"),
    "another profile of the user's": append("config/sandbox/profiles/shell.toml"),
    "a profile of the project's": append("project/.sandbox/profiles/own.toml"),
    "a pyproject": append("project/pyproject.toml"),
    "a ceiling by name": setting("SANDBOX_CEILING", "/dev/null/none"),
    "the user's directory": setting("XDG_CONFIG_HOME", "/nowhere"),
    "the home": setting("HOME", "/nowhere"),
    "where records usually are": setting("XDG_STATE_HOME", "/nowhere"),
    "a profile that has gone": lambda world, _: (world / "config/sandbox/profiles/own.toml").unlink(),
    "our version": lambda _, monkeypatch: monkeypatch.setattr(kept, "__version__", "9"),
    "our code": lambda _, monkeypatch: monkeypatch.setattr(kept, "_code", lambda: [("x", 1, 2, 3)]),
    "the interpreter": lambda _, monkeypatch: monkeypatch.setattr("sys.executable", "/other"),
    "its places": lambda _, monkeypatch: monkeypatch.setattr("sys.prefix", "/other"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_kept_is_not_found_after_a_change_of(world: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    kept.keep(ask(world), answer(world))
    assert kept.find(ask(world)) is not None
    CHANGES[what](world, monkeypatch)
    question = kept.ask("own", {}, str(world / "state"), tty=False)
    assert question is None or kept.find(question) is None


def test_a_ceiling_in_the_environment_counts_byte_by_byte(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ceiling = world / "by-name.toml"
    ceiling.write_text("[resources]\n")
    monkeypatch.setenv("SANDBOX_CEILING", str(ceiling))
    kept.keep(ask(world), answer(world))
    assert kept.find(ask(world)) is not None
    ceiling.write_text("[resources]\n ")
    assert kept.find(ask(world)) is None


def test_overrides_profiles_terminals_and_state_directories_are_part_of_the_question(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (world / "other").mkdir(mode=0o700)
    monkeypatch.setenv("COLUMNS", "80")
    asked = [ask(world), ask(world, "shell"), ask(world, memory="1GiB"), ask(world, memory="2GiB")]
    asked += [q for q in (kept.ask("own", {}, str(world / "state"), tty=True),) if q]
    asked += [q for q in (kept.ask("own", {}, str(world / "other"), tty=False),) if q]
    monkeypatch.setenv("COLUMNS", "81")
    asked += [q for q in (kept.ask("own", {}, str(world / "state"), tty=True),) if q]
    assert len({question.key for question in asked}) == len(asked) == 7
    assert ask(world) == ask(world)


def test_projects_without_profiles_share_an_answer_and_relative_words_do_not(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, with_words, by_path = ask(world), ask(world, deny=["x"]), ask(world, "./own.toml")
    (world / "another").mkdir()
    monkeypatch.chdir(world / "another")
    assert ask(world) == plain
    assert ask(world, deny=["x"]) != with_words
    assert ask(world, "./own.toml") != by_path


def test_what_may_hold_a_secret_or_ask_the_host_is_never_asked_for(world: Path) -> None:
    state = str(world / "state")
    for settings in ({"env_set": {"A": "b"}}, {"workspace": "."}):
        assert kept.ask("own", settings, state, tty=False) is None
    assert kept.ask("~someone/x.toml", {}, state, tty=False) is None
    assert kept.ask("own", {}, "", tty=False) is None


def test_the_callers_variables_are_those_of_the_moment(world: Path) -> None:
    kept.keep(ask(world), {**answer(world), "env": {"LANG": "C", "HOME": "/h"}, "set": {"TZ": "UTC"}})
    found = kept.find(ask(world))
    assert found is not None
    assert found.environment({"LANG": "de", "TZ": "CET", "SECRET": "x"}) == {"LANG": "de", "HOME": "/h", "TZ": "UTC"}
    assert found.environment({}) == {"LANG": "C", "HOME": "/h", "TZ": "UTC"}


def replant(path: Path, content: bytes) -> None:
    path.write_bytes(hashlib.sha256(content).digest() + content)


def to_link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def to_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"]"),
    "a cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "nothing left": lambda path: path.write_bytes(b""),
    "too much": lambda path: replant(path, path.read_bytes()[32:] + b" " * kept.SIZE_MAX),
    "no JSON": lambda path: replant(path, b"{"),
    "too deep": lambda path: replant(path, b"[" * 100_000),
    "a list": lambda path: replant(path, b"[]"),
    "parts missing": lambda path: replant(path, json.dumps({"key": f"sha256:{path.stem}"}).encode()),
    "another question's": lambda path: replant(path, path.read_bytes()[32:].replace(path.stem.encode(), b"0" * 64)),
    "a link": to_link,
    "a second name": lambda path: os.link(path, path.with_suffix(".second")),
    "a directory": to_directory,
    "a pipe": to_fifo,
    "others may write": lambda path: path.chmod(0o602),
    "others may read": lambda path: path.chmod(0o604),
    "the cache is open": lambda path: path.parent.chmod(0o701),
    "the state is open": lambda path: path.parents[1].chmod(0o770),
    "the cache is a link": lambda path: (
        path.parent.rename(path.parents[1] / "moved"),
        path.parent.symlink_to(path.parents[1] / "moved"),
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_kept_plan_is_not_found_any_more_with(world: Path, what: str) -> None:
    kept.keep(ask(world), answer(world))
    DAMAGE[what](kept_file(world))
    assert kept.find(ask(world)) is None
    if not what.startswith(("the ", "a directory")):
        kept.keep(ask(world), answer(world))
        assert kept.find(ask(world)) is not None, "it is replaced"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")
@pytest.mark.parametrize("name", ["state", "state/cache", "file"])
def test_somebody_elses_files_are_not_used(world: Path, name: str) -> None:
    kept.keep(ask(world), answer(world))
    path = kept_file(world) if name == "file" else world / name
    os.chown(path, 12345, 12345)
    assert kept.find(ask(world)) is None


def test_there_are_never_many(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "COUNT_MAX", 3)
    for size in range(6):
        kept.keep(ask(world, memory=f"{size}GiB"), answer(world))
    assert len(list((world / "state/cache").iterdir())) == 3
    assert kept.find(ask(world, memory="5GiB")) is not None
    assert kept.find(ask(world, memory="0GiB")) is None
