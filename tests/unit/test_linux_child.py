"""A spawned program gets what it is meant to have, and nothing else that is open here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from sandbox._linux import child

# A descriptor that this program opens itself is told by its being /proc.
_TELL = """
import json, os, sys
names = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
fds = {int(name): os.readlink("/proc/self/fd/" + name) for name in names}
data = {"fds": sorted(fd for fd, to in fds.items() if not to.startswith("/proc")), "null": fds[0]}
data |= {"env": dict(os.environ), "leads": os.getsid(0) == os.getpid(), "cwd": os.getcwd()}
os.write(int(sys.argv[1]), json.dumps(data).encode())
sys.exit(7)
"""


@pytest.mark.parametrize("at", [3, 20])
def test_it_gets_one_descriptor_and_its_environment(at: int, tmp_path: Path) -> None:
    saved = os.dup(at) if Path(f"/proc/self/fd/{at}").exists() else -1
    read_end, write_end = os.pipe()
    os.dup2(write_end, at, inheritable=False)
    left = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(left, True)
    try:
        process = child.spawn([sys.executable, "-I", "-S", "-c", _TELL], {"ONLY": "this"}, at)
        os.close(write_end)
    finally:
        os.close(left)
        os.dup2(saved, at, inheritable=False) if saved >= 0 else os.close(at)
    with open(read_end, "rb") as file:
        found = json.loads(file.read())
    assert process.wait(20) == 7
    assert process.poll() == 7
    number = 4 if at == 3 else 3
    assert found["fds"] == [0, 1, 2, number]
    assert found["null"] == os.devnull
    assert found["env"].pop("ONLY") == "this"
    assert set(found["env"]) <= {"LC_CTYPE"}, "that one is the interpreter's own"
    assert found["leads"]
    assert found["cwd"] == os.getcwd()


def test_what_cannot_be_executed_is_told() -> None:
    with pytest.raises(FileNotFoundError):
        child.spawn(["/nothing/here"], {}, 1)
