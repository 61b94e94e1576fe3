"""What the README shows works as it is shown."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandbox.runtime as runtime
from sandbox import resolve

pytestmark = [pytest.mark.needs("jail")]

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def project(tmp_path: Path, state_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    (tmp_path / "calc.py").write_text("print(1 + 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANDBOX_STATE", str(state_root))
    yield tmp_path
    for _, made in runtime._TOOL_BOXES._boxes.values():
        made.close()
    runtime._TOOL_BOXES._boxes.clear()


def test_the_python_example_prints_what_its_comments_say(project: Path) -> None:
    (source,) = blocks("python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(source, "README.md", "exec"), {"__name__": "readme"})
    shown = re.findall(r"print\(.*\)  # (.*)", source)
    printed = [line for line in said.getvalue().splitlines() if line]
    assert len(printed) == 5
    for comment, line in zip(shown, [*printed[:4], " ".join(printed[4:])], strict=True):
        assert comment.startswith(line.strip()), (comment, line)


def test_the_commands_do_what_they_are_shown_to_do(project: Path, state_root: Path) -> None:
    (console,) = blocks("console")
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    env = {**os.environ, "PYTHONPATH": path, "SANDBOX_STATE": str(state_root)}
    commands = re.findall(r"^\$ sandbox (.*?)(?:    # exit (\d+))?\n((?:[^$].*\n)*)", console, re.MULTILINE)
    assert len(commands) == console.count("$ sandbox")
    for words, status, output in commands:
        argv = [sys.executable, "-m", "sandbox.cli.main", *shlex.split(words)]
        done = subprocess.run(argv, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == int(status or 0), (words, done.stderr)
        assert output in ("", done.stdout)


def test_the_profile_can_be_used(project: Path) -> None:
    (text,) = blocks("toml")
    (project / "reports.toml").write_text(text)
    assert resolve(project / "reports.toml").manifest.resources.memory_bytes == tomllib_size(text)


def tomllib_size(text: str) -> int:
    return int(tomllib.loads(text)["resources"]["memory"].removesuffix("MiB")) << 20


def test_every_page_that_is_named_is_there() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).exists(), target
