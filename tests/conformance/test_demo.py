"""The demonstration with Docker as the wall, in its throw-away world, whose daemon finds no disk in its /dev."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import engine as engines

ROME = Path(__file__).resolve().parents[2] / "examples" / "rome.py"


@pytest.mark.needs("root", "jail", "cgroup", "ssh")
def test_what_is_permitted_works_and_an_attack_does_not() -> None:
    if reason := engines.missing():
        pytest.skip(f"needs a Docker daemon: {reason}")
    argv = [sys.executable, str(ROME), "--launcher", "docker", "--only", "metadata", "--only", "fetch"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=280, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "1 of 1 attacks were real without the jail, 1 of 1 were contained inside it." in said
    assert "1 of 1 permitted uses of the network worked inside it." in said
