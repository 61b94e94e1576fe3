"""The disk fills up under the records: the caller learns it, nothing earlier is damaged, and later work goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELPER = Path(__file__).parents[1] / "helpers" / "full_disk.py"
ROOT = Path(__file__).parents[2]


@pytest.mark.needs("jail")
def test_a_full_disk_reaches_the_caller_and_damages_nothing(tmp_path: Path) -> None:
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    argv = [*unshare, sys.executable, str(HELPER), str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "No space left on device" in found["error"]
    assert found["before"] > 0
    assert found["after"] == [True, True, True]
    assert found["broken"] == []
    assert found["unpaired"] == []
