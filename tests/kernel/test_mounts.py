"""Looking paths up below a root while others rename things."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from sandbox._linux import mounts

RENAMES = """
import os, sys
os.chdir(sys.argv[1]); open("x", "w").close(); print("ready", flush=True)
while True:
    os.rename("x", "y"); os.rename("y", "x")
"""


def test_a_lookup_below_a_root_is_not_upset_by_what_is_renamed_elsewhere(tmp_path: Path) -> None:
    """The kernel answers EAGAIN to one in some hundred of these, and each would be a call that did not start."""
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "root/a/link").symlink_to("../a/../a/b")
    (tmp_path / "elsewhere").mkdir()
    root = os.open(tmp_path / "root", os.O_PATH)
    argv = [sys.executable, "-S", "-c", RENAMES, str(tmp_path / "elsewhere")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as renamer:
        try:
            assert renamer.stdout is not None
            renamer.stdout.readline()
            until = time.monotonic() + 1
            while time.monotonic() < until:
                os.close(mounts.open_path("/a/link/../b", mounts.RESOLVE_IN_ROOT, root, follow=True))
        finally:
            renamer.kill()
            os.close(root)
