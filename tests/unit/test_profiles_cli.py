"""`sandbox profile`: what it prints where, and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sandbox import profiles
from sandbox.cli.profile import app
from sandbox.errors import ProfileError
from sandbox.profile_schema import json_schema

runner = CliRunner()


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiles, "SYSTEM_CEILING", tmp_path / "none.toml")
    monkeypatch.delenv("SANDBOX_CEILING", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def test_list_names_every_profile_and_says_what_is_broken(project: Path) -> None:
    directory = project / ".sandbox/profiles"
    directory.mkdir(parents=True)
    (directory / "broken.toml").write_text("[nope]")
    (directory / "shut.toml").write_text("sealed = true")
    done = runner.invoke(app, ["list", "--json"])
    infos = {info["name"]: info for info in json.loads(done.stdout)}
    assert infos["python"]["kind"] == "shipped"
    assert "unknown key" in infos["broken"]["error"]
    assert infos["shut"]["sealed"]
    assert "shut (sealed)" in runner.invoke(app, ["list"]).stdout


def test_show_says_each_value_with_its_file_and_line() -> None:
    out = runner.invoke(app, ["show", "web-reader"]).stdout
    assert "sha256:" in out
    assert any(
        "resources.memory" in line and "512MiB" in line and "web-reader.toml" in line for line in out.splitlines()
    )
    assert "gpu.count" not in out
    assert "gpu.count" in runner.invoke(app, ["show", "web-reader", "--resolved"]).stdout
    facts = json.loads(runner.invoke(app, ["show", "web-reader", "--json"]).stdout)
    assert facts["manifest"]["resources"]["memory_bytes"] == 512 << 20
    assert "web-reader.toml:" in facts["origins"]["resources.memory"]
    assert facts["digest"] == profiles.resolve("web-reader").digest


def test_validate_exits_with_125_when_one_file_is_wrong(project: Path) -> None:
    good, bad = project / "good.toml", project / "bad.toml"
    good.write_text("[resources]\npids = 5")
    bad.write_text("[resources]\npids = 0")
    assert runner.invoke(app, ["validate", str(good)]).exit_code == 0
    done = runner.invoke(app, ["validate", str(good), str(bad)])
    assert done.exit_code == 125
    assert f"{good}: ok" in done.stdout
    assert f"{bad}:2 resources.pids: 0 is too small" in done.stderr
    results = json.loads(runner.invoke(app, ["validate", str(bad), "--json"]).stdout)
    assert results[0]["ok"] is False
    assert results[0]["where"] == f"{bad}:2 resources.pids"


def test_diff_says_what_differs_and_who_permits_more() -> None:
    facts = json.loads(runner.invoke(app, ["diff", "python", "web-reader", "--json"]).stdout)
    assert {"key": "resources.memory", "one": "1GiB", "other": "512MiB"} in facts["changes"]
    assert facts["wider"] == ["network.mode"]
    assert "permits more than python in: network.mode" in runner.invoke(app, ["diff", "python", "web-reader"]).stdout
    assert "permit the same" in runner.invoke(app, ["diff", "python", "python"]).stdout


def test_schema_prints_the_schema() -> None:
    assert json.loads(runner.invoke(app, ["schema"]).stdout) == json_schema()


def test_init_writes_a_profile_that_validates_and_never_overwrites(project: Path) -> None:
    file = project / "mine.toml"
    assert runner.invoke(app, ["init", str(file), "--extends", "python"]).exit_code == 0
    assert profiles.resolve(file).manifest.resources == profiles.resolve("python").manifest.resources
    again = runner.invoke(app, ["init", str(file)])
    assert isinstance(again.exception, ProfileError)
    assert "File exists" in str(again.exception)
    assert 'extends = "shell"' in runner.invoke(app, ["init", "--extends", "shell"]).stdout


def test_an_unknown_profile_is_our_error_with_a_suggestion() -> None:
    done = runner.invoke(app, ["show", "pyhton"])
    assert isinstance(done.exception, ProfileError)
    assert "did you mean 'python'?" in str(done.exception)


def test_output_in_a_pipe_is_not_folded(project: Path) -> None:
    long = project / ("d" * 120)
    long.mkdir()
    (project / "p.toml").write_text(f'[filesystem]\nread = ["{long}"]')
    assert any(str(long) in line for line in runner.invoke(app, ["show", "./p.toml"]).stdout.splitlines())
