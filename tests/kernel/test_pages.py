"""Memory that a fork shares, copied ahead: it costs no faults afterwards, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Single-threaded, which the test's own process is not.
_PROGRAM = """
import json, mmap, os, resource, sys
from sandbox._linux import pages, syscalls
from sandbox._linux.batch import Batch

COUNT = 400
memory = mmap.mmap(-1, COUNT * 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[::4096] = b"a" * COUNT

def act():
    syscalls.after_fork_in_child()
    for at in range(0, COUNT, 4):
        memory[at * 4096] = 98

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "old kernel":
    pages._takes_many_at_once = lambda: False
found = pages.touched_after_fork(act)
batch = Batch()
found.add_populate(batch)
told, tell = os.pipe()
pid = os.fork()
if pid == 0:
    if sys.argv[1] != "without":
        batch.run()
    before = faults()
    act()
    os.write(tell, json.dumps([faults() - before, memory[0], memory[4096]]).encode())
    os._exit(0)
os.waitpid(pid, 0)
in_child = json.loads(os.read(told, 4096))
print(json.dumps({"pages": sum(size for _, size in found.written) // 4096, "child": in_child, "ours": memory[0]}))
"""


def _run(how: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, how], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.once
@pytest.mark.parametrize("how", ["at once", "old kernel"])
def test_pages_that_were_copied_ahead_cost_no_faults(how: str) -> None:
    found = _run(how)
    faults, changed, untouched = found["child"]
    # A hundred of its own, and what the interpreter touches meanwhile.
    assert 100 <= found["pages"] < 300
    assert faults < 50
    assert (changed, untouched, found["ours"]) == (98, 97, 97)


@pytest.mark.once
def test_the_same_pages_cost_a_fault_each_otherwise() -> None:
    faults, *_ = _run("without")["child"]
    assert faults >= 100
