"""The limits of a call's group bite, count and can be told apart, in every kind of tree that this host has."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox._linux import cgroup

REPOSITORY = Path(__file__).parents[2]
# The child waits for its group before it does anything, as the jail's builder does.
GATE = "import sys, os, json, time, errno\nsys.stdin.readline()\n"

pytestmark = pytest.mark.needs("cgroup")


@contextmanager
def running(group: cgroup.CallGroup, code: str) -> Iterator[subprocess.Popen[str]]:
    """A Python child inside the group; it and everything else in there is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", GATE + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            group.add(child.pid)
            assert child.stdin
            child.stdin.write("go\n")
            child.stdin.flush()
            yield child
        finally:
            group.kill()
            child.kill()


def run(group: cgroup.CallGroup, code: str, timeout: float = 60) -> tuple[int, str]:
    with running(group, code) as child:
        out, _ = child.communicate(timeout=timeout)
    return child.returncode, out


@pytest.fixture(params=["as found", "without v2"])
def tree(request: pytest.FixtureRequest) -> Iterator[cgroup.Tree]:
    layout = cgroup.detect()
    if request.param == "without v2":
        if not layout.v1 or not layout.v2:
            pytest.skip("only a hybrid host can be looked at without its v2 tree")
        layout = cgroup.Layout(layout.v1, None, None)
    tree = cgroup.Tree.open(cgroup.owner_name(os.getpid()), layout)
    try:
        if not tree.has_groups:
            pytest.skip("no cgroup tree is open to us")
        yield tree
    finally:
        closed = tree.close()
    assert closed, "groups were left behind"


def test_memory_over_the_limit_is_killed_and_counted(tree: cgroup.Tree) -> None:
    group = tree.create("big", {"memory_bytes": 64 << 20})
    status, _ = run(group, "x = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1")
    assert status == -signal.SIGKILL
    stats = group.stats()
    assert stats["oom_kills"] >= 1
    assert 48 << 20 <= stats["memory_peak_bytes"] <= 65 << 20
    assert group.destroy()


def test_memory_within_the_limit_is_left_alone(tree: cgroup.Tree) -> None:
    group = tree.create("small", {"memory_bytes": 64 << 20})
    status, out = run(group, "x = bytearray(16 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint('ok')")
    assert (status, out) == (0, "ok\n")
    assert group.stats()["oom_kills"] == 0
    assert group.stats()["memory_peak_bytes"] >= 16 << 20
    assert group.destroy()


def test_a_second_tree_of_the_same_process_does_not_move_it_again(tree: cgroup.Tree) -> None:
    before = Path("/proc/self/cgroup").read_text()
    second = cgroup.Tree.open(f"{os.getpid()}-2")
    try:
        assert Path("/proc/self/cgroup").read_text() == before
        assert os.path.dirname(second.v2) == os.path.dirname(tree.v2) or not tree.v2
    finally:
        assert second.close()


def test_swap_is_no_way_round_the_memory_limit(tree: cgroup.Tree) -> None:
    group = tree.create("swap", {"memory_bytes": 64 << 20})
    where = group.v1.get("memory")
    if where:
        path = where + "/memory.memsw.limit_in_bytes"
        limit = str(64 << 20)
    else:
        path, limit = group.v2 + "/memory.swap.max", "0"
    if not os.path.exists(path):
        pytest.skip("this kernel does not account swap")
    assert Path(path).read_text().strip() == limit
    assert group.destroy()


@pytest.mark.parametrize(("first", "second"), [(64, 32), (32, 64)])
def test_a_memory_limit_can_be_moved_either_way(tree: cgroup.Tree, first: int, second: int) -> None:
    group = tree.create("moved", {"memory_bytes": first << 20})
    group.apply({"memory_bytes": second << 20})
    status, _ = run(group, "x = bytearray(48 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1")
    assert status == (0 if second > 48 else -signal.SIGKILL)
    assert group.destroy()


FORKS = """
pids = []
refusal = 0
for _ in range(30):
    try:
        pid = os.fork()
    except OSError as err:
        refusal = err.errno
        break
    if pid == 0:
        time.sleep(30)
        os._exit(0)
    pids.append(pid)
print(json.dumps([len(pids), refusal]))
for pid in pids:
    os.kill(pid, 9)
    os.waitpid(pid, 0)
"""


def test_a_fork_over_the_limit_gets_eagain(tree: cgroup.Tree) -> None:
    group = tree.create("forks", {"pids": 10})
    status, out = run(group, FORKS)
    assert status == 0, out
    assert json.loads(out) == [9, errno.EAGAIN]
    assert group.stats()["pids_refused"] >= 1
    assert group.destroy()


def test_forks_within_the_limit_succeed(tree: cgroup.Tree) -> None:
    group = tree.create("forks", {"pids": 40})
    status, out = run(group, FORKS)
    assert status == 0, out
    assert json.loads(out) == [30, 0]
    assert group.stats().get("pids_refused", 0) == 0
    assert group.destroy()


SPIN = "end = time.monotonic() + 1.5\nwhile time.monotonic() < end: pass\nprint(time.process_time())"


def test_cpu_is_throttled_to_its_share(tree: cgroup.Tree) -> None:
    group = tree.create("spin", {"cpus": 0.2})
    before = time.monotonic()
    status, out = run(group, SPIN)
    elapsed_s = time.monotonic() - before
    assert status == 0, out
    stats = group.stats()
    assert stats["cpu_usage_s"] < 0.2 * elapsed_s + 0.1
    assert stats["throttled_periods"] >= 3
    assert stats["throttled_s"] > 0
    assert group.destroy()


def test_a_whole_core_is_not_throttled(tree: cgroup.Tree) -> None:
    group = tree.create("spin", {"cpus": 1.0})
    before = time.monotonic()
    status, out = run(group, "while time.process_time() < 0.5: pass\nprint(time.process_time())")
    assert status == 0, out
    assert time.monotonic() - before < 30
    assert group.stats()["cpu_usage_s"] >= 0.45
    assert group.destroy()


def _free_space(path: Path) -> str:
    device = cgroup.block_device(str(path))
    if device is None:
        pytest.skip(f"{path} is not on a block device")
    return device


def _direct_write(group: cgroup.CallGroup, path: Path) -> float:
    code = (
        "import mmap\nbuf = mmap.mmap(-1, 1 << 20)\n"
        f"fd = os.open({str(path)!r}, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)\n"
        "start = time.monotonic()\nfor _ in range(4): os.write(fd, buf)\nprint(time.monotonic() - start)"
    )
    status, out = run(group, code)
    if "Invalid argument" in out:
        pytest.skip("the file system has no direct I/O")
    assert status == 0, out
    return float(out)


def test_io_is_held_to_its_rate(tree: cgroup.Tree, tmp_path: Path) -> None:
    if not tree.where("io"):
        pytest.skip("no io controller is open to us")
    group = tree.create("io", {"io_bytes_per_s": 2 << 20}, [_free_space(tmp_path)])
    assert _direct_write(group, tmp_path / "slow") > 1.0
    assert group.stats()["io_write_bytes"] >= 4 << 20
    assert group.destroy()


def test_io_within_its_rate_is_not_slowed(tree: cgroup.Tree, tmp_path: Path) -> None:
    if not tree.where("io"):
        pytest.skip("no io controller is open to us")
    group = tree.create("io", {"io_bytes_per_s": 1 << 30}, [_free_space(tmp_path)])
    # Twice the rate of the throttled twin at the least; under emulation it is slow by itself.
    assert _direct_write(group, tmp_path / "fast") < 10.0
    assert group.destroy()


def test_the_caller_can_wait_for_a_v1_out_of_memory_event(tree: cgroup.Tree) -> None:
    group = tree.create("oom", {"memory_bytes": 32 << 20})
    event_fd = group.open_oom_event()
    if event_fd is None:
        assert "memory" not in group.v1
        return
    try:
        assert not select.select([event_fd], [], [], 0)[0]
        run(group, "x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1")
        assert select.select([event_fd], [], [], 5)[0]
    finally:
        os.close(event_fd)
    assert group.destroy()


BORN_INSIDE = """
import os, sys
from sandbox._linux import cgroup, syscalls
tree = cgroup.Tree.open(cgroup.owner_name(os.getpid()))
group = tree.create("born", {"pids": 5})
pid, pidfd = syscalls.clone(0, group.fds_for_clone)
if pid == 0:
    with open("/proc/self/cgroup") as file:
        inside = [line for line in file.read().splitlines() if line.startswith("0::")]
    os._exit(0 if inside[0].endswith("/born") else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print(status, group.destroy(), tree.close())
"""


def test_a_child_can_be_born_inside_the_v2_group(tree: cgroup.Tree) -> None:
    if not tree.v2:
        pytest.skip("no v2 tree")
    done = subprocess.run(
        [sys.executable, "-c", BORN_INSIDE], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["0", "True", "True"], done.stderr
