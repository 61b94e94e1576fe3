"""Getting at what is denied inside a granted tree, or at what no grant may ever show."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import sandbox
from sandbox import Sandbox
from tests.helpers.escape import Errno, Jail
from tests.helpers.workspaces import plant

pytestmark = [pytest.mark.needs("jail")]

DENIED = Errno("EACCES")
BUSY = Errno("EBUSY")
WAYS = [{"read": True}, {"write": True}, {"mode": "ro"}, {"mode": "rw"}, {"mode": "cow"}]


def grant(path: Path, way: dict[str, Any]) -> dict[str, Any]:
    """Overrides that show `path`: as a grant, or as the workspace."""
    if "mode" in way:
        return {"workspace": str(path), "workspace_mode": way["mode"]}
    return {next(iter(way)): [str(path)]}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    files = {
        ".env": "S",
        "deep/er/.env": "S",
        "vault/key": "S",
        "vault/sub/key": "S",
        "open/file": "fine",
        "real": "S",
        "link/.env": ("link", "../real"),
    }
    return plant(tmp_path / "project", files)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("mode") or next(iter(way)))
def test_a_denied_path_cannot_be_read(jail: Jail, project: Path, way: dict[str, Any]) -> None:
    paths = [f"{project}/{name}" for name in (".env", "deep/er/.env", "vault/key", "vault/sub/key", "open/file")]
    actions = [["read", path] for path in paths]
    deny = ["**/.env", f"{project}/vault"]
    found = jail.act(*actions, ["listdir", f"{project}/vault"], deny=deny, **grant(project, way))
    assert found == [DENIED] * 4 + ["fine", DENIED]
    assert jail.act(*actions, **grant(project, way)) == ["S"] * 4 + ["fine"]


def test_a_denied_name_that_is_a_link_does_not_lead_to_the_file(jail: Jail, project: Path) -> None:
    actions = [["read", f"{project}/link/.env"], ["read", f"{project}/real"], ["read", f"{project}/open/file"]]
    assert jail.act(*actions, deny=["**/.env"], read=[str(project)]) == [DENIED, DENIED, "fine"]
    assert jail.act(*actions, read=[str(project)]) == ["S", "S", "fine"]


def test_a_link_with_a_denied_name_cannot_cover_the_system(jail: Jail, project: Path) -> None:
    """A tool plants it for the next call, in which programs would be gone."""
    (project / "open/.env").symlink_to("/usr/bin")
    actions = [["exists", "/usr/bin/env"], ["read", f"{project}/.env"]]
    assert jail.act(*actions, deny=["**/.env"], write=[str(project)]) == [True, DENIED]


@pytest.mark.parametrize("way", WAYS[1:], ids=lambda way: way.get("mode") or next(iter(way)))
def test_what_is_denied_cannot_be_removed_or_changed(jail: Jail, project: Path, way: dict[str, Any]) -> None:
    mode = way.get("mode", "write")
    target, plain = f"{project}/.env", f"{project}/open/file"
    refused = Errno("EROFS") if mode == "ro" else BUSY
    actions = [["unlink", target], ["rename", target, f"{project}/x"], ["rename", plain, target]]
    assert jail.act(*actions, deny=["**/.env"], **grant(project, way)) == [refused] * 3
    assert (project / ".env").read_text() == "S"
    expected: Any = Errno("EROFS") if mode == "ro" else True
    assert jail.one("rename", plain, f"{project}/open/other", deny=["**/.env"], **grant(project, way)) == expected


@pytest.mark.parametrize("way", [{"write": True}, {"mode": "rw"}], ids=["write", "rw"])
def test_directories_above_a_denied_path_cannot_be_renamed(jail: Jail, project: Path, way: dict[str, Any]) -> None:
    """After it the next call would find the file under a path that nobody denied."""
    overrides = {**grant(project, way), "deny": [f"{project}/deep/er/.env"]}
    actions = [
        ["rename", f"{project}/deep", f"{project}/moved"],
        ["rename", f"{project}/deep/er", f"{project}/deep/moved"],
        ["rename", f"{project}/open", f"{project}/opened"],
    ]
    assert jail.act(*actions, **overrides) == [BUSY, BUSY, True]
    paths = [["read", f"{project}/{name}/er/.env"] for name in ("deep", "moved")]
    assert jail.act(*paths, **overrides) == [DENIED, Errno("ENOENT")]


def test_hard_links_do_not_uncover_what_is_denied(jail: Jail, project: Path) -> None:
    actions = [["link", f"{project}/.env", f"{project}/x"], ["link", f"{project}/open/file", f"{project}/y"]]
    assert jail.act(*actions, deny=["**/.env"], write=[str(project)]) == [Errno("EXDEV"), True]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("mode") or next(iter(way)))
def test_the_state_directory_is_hidden_when_its_parent_is_granted(tmp_path: Path, way: dict[str, Any]) -> None:
    """Records that a tool can write are no evidence, and those of other calls are none of its business."""
    home = plant(tmp_path / "home", {"file": "fine", "local/x": ""})
    state = home / "local" / "state"
    with Sandbox("shell", state=state, **grant(home, way)) as box:
        jail = Jail(box)
        found = jail.act(
            ["listdir", str(state)],
            ["create", f"{state}/planted"],
            ["listdir", f"/proc/self/root{state}"],
            ["read", f"{home}/file"],
        )
        assert found == [DENIED, DENIED, DENIED, "fine"]
        records = sorted(path.name for path in state.iterdir())
        assert "planted" not in records
        assert records


def test_a_workspace_that_holds_the_state_directory_is_swept_around_it(tmp_path: Path) -> None:
    home = plant(tmp_path / "home", {"file": "fine"})
    state = home / "local" / "state"
    with Sandbox("shell", state=state, workspace=str(home), workspace_mode="rw") as box:
        script = f"cd {home}; echo x > made; echo y > .envrc; echo up; sleep 0.5"
        with box.stream(["sh", "-c", script]) as stream:
            next(iter(stream))
            plant(state, {"changes/theirs/upper/.envrc": "another call's"})
            record = stream.outcome.record
    assert record.ending.kind == "ok"
    assert {item.path for item in record.files.written} == {"made", ".envrc"}
    assert [item.subject for item in record.decisions] == [".envrc"]
    assert (state / "changes/theirs/upper/.envrc").read_text() == "another call's"


def test_the_state_directory_cannot_be_moved_away(tmp_path: Path) -> None:
    home = plant(tmp_path / "home", {"local/x": ""})
    state = home / "local" / "state"
    with Sandbox("shell", state=state, write=[str(home)]) as box:
        found = Jail(box).act(
            ["rename", str(state), f"{home}/s"],
            ["rename", f"{home}/local", f"{home}/l"],
            ["rename", f"{home}/local/x", f"{home}/local/y"],
        )
    assert found == [Errno("EXDEV"), BUSY, True]


@pytest.mark.parametrize("mode", ["rw", "cow"])
def test_a_grant_to_read_holds_below_a_writable_workspace(jail: Jail, project: Path, mode: str) -> None:
    """The longest path wins, whichever of them is the workspace."""
    overrides: dict[str, Any] = {"workspace": str(project), "workspace_mode": mode}
    actions = [
        ["write", f"{project}/open/file", "x"],
        ["create", f"{project}/open/new"],
        ["rename", f"{project}/open", f"{project}/moved"],
        ["create", f"{project}/new"],
    ]
    found = jail.act(*actions, read=[f"{project}/open"], **overrides)
    assert found == [Errno("EROFS"), Errno("EROFS"), BUSY, 1]
    assert not any(isinstance(result, Errno) for result in jail.act(*actions[:2], **overrides))


@pytest.mark.parametrize("way", [{"write": True}, {"mode": "rw"}, {"mode": "cow"}], ids=["write", "rw", "cow"])
def test_code_that_runs_outside_cannot_be_written(
    jail: Jail, tmp_path: Path, way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tool that could write the supervisor's modules would be the supervisor at its next start."""
    from sandbox import prepare

    package = plant(tmp_path / "project", {"lib/sandbox/__init__.py": "", "other": ""}) / "lib/sandbox"
    actions = [
        ["write", f"{package}/__init__.py", "x"],
        ["create", f"{package}/planted.py"],
        ["rename", f"{package}", f"{package}2"],
        ["rename", f"{tmp_path}/project/lib", f"{tmp_path}/project/lib2"],
        ["write", f"{tmp_path}/project/other", "x"],
    ]
    overrides = grant(tmp_path / "project", way)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "own_code", lambda: (str(package),))
        assert jail.act(*actions, **overrides) == [Errno("EROFS"), Errno("EROFS"), BUSY, BUSY, 1]
    assert jail.act(*actions[:2], **overrides) == [1, 1]


def test_own_code_is_the_package_and_the_interpreter() -> None:
    from sandbox import prepare

    own = prepare.own_code()
    package = os.path.dirname(os.path.realpath(sandbox.__file__))
    assert package in own
    real = os.path.realpath(os.sys.prefix)  # type: ignore[attr-defined]
    assert real.startswith("/usr") or any(path == real or path.startswith(f"{real}/") for path in own)
