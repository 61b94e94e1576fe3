"""Groups end what is in them, leave nothing behind, and a dead supervisor's are found again."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox._linux import cgroup
from tests.helpers.waiting import eventually
from tests.kernel.test_cgroup_limits import REPOSITORY, running, tree

pytestmark = pytest.mark.needs("cgroup")
__all__ = ["tree"]

STUBBORN_TREE = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(60)
        os._exit(0)
print('up', flush=True)
time.sleep(60)
"""

FORK_STORM = """
print('up', flush=True)
while True:
    try:
        os.fork()
    except OSError:
        pass
"""


def groups_on_host(name: str) -> list[Path]:
    layout = cgroup.detect()
    trees = [*layout.v1.values(), *([layout.v2] if layout.v2 else [])]
    # os.walk, since other tests' groups come and go meanwhile, which rglob takes for an error.
    found = []
    for mount in {hierarchy.mount_point for hierarchy in trees}:
        found += [Path(root) / name for root, names, _ in os.walk(mount) if name in names]
    return found


@pytest.mark.parametrize("code", [STUBBORN_TREE, FORK_STORM], ids=["daemons", "fork storm"])
def test_kill_ends_everything_inside(tree: cgroup.Tree, code: str) -> None:
    group = tree.create("kill", {"pids": 30})
    with running(group, code) as child:
        assert child.stdout
        assert child.stdout.readline() == "up\n"
        assert not group.is_empty()
        assert group.kill(timeout_s=20)
        assert child.wait(10) == -signal.SIGKILL
        assert eventually(group.is_empty)
    assert group.destroy()


def test_kill_ends_a_process_that_joined_only_a_v1_group(tree: cgroup.Tree) -> None:
    group = tree.create("half", {"pids": 30})
    if "pids" not in group.v1:
        pytest.skip("no v1 tree")
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]) as child:
        try:
            Path(group.v1["pids"], "cgroup.procs").write_text(str(child.pid))
            assert group.kill()
            assert child.wait(10) == -signal.SIGKILL
        finally:
            child.kill()
    assert group.destroy()


def test_a_frozen_group_stands_still_and_goes_on_after_the_thaw(tree: cgroup.Tree) -> None:
    group = tree.create("ice", {})
    with running(group, "while True:\n    os.write(1, b'.')\n    time.sleep(0.005)") as child:
        assert child.stdout
        output_fd = child.stdout.fileno()
        os.set_blocking(output_fd, False)

        def progress() -> bool:
            try:
                return bool(os.read(output_fd, 1 << 16))
            except BlockingIOError:
                return False

        assert eventually(progress)
        assert group.freeze(timeout_s=10)
        progress()
        time.sleep(0.2)
        assert not progress()
        assert group.thaw(timeout_s=10)
        assert eventually(progress)
        assert group.freeze(timeout_s=10)
        assert group.kill(timeout_s=10)
        assert child.wait(10) == -signal.SIGKILL, "a frozen process can be killed"
    assert group.destroy()


def test_destroy_ends_live_processes_and_can_be_repeated(tree: cgroup.Tree) -> None:
    group = tree.create("end", {"pids": 30})
    with running(group, STUBBORN_TREE) as child:
        assert child.stdout
        assert child.stdout.readline() == "up\n"
        assert not group.remove(), "a populated group stays"
        assert group.destroy(timeout_s=20)
        assert child.wait(10) == -signal.SIGKILL
    assert not any(os.path.exists(path) for path in group.procs_paths())
    assert group.destroy()
    assert group.kill()


def test_a_name_is_used_once_and_cannot_leave_its_parent(tree: cgroup.Tree) -> None:
    group = tree.create("once", {})
    with pytest.raises(FileExistsError):
        tree.create("once", {})
    assert all(os.path.exists(path) for path in group.procs_paths()), "the first one is untouched"
    for name in ("../up", "a/b", ".", "", "-", "x" * 200):
        with pytest.raises(ValueError, match="name"):
            tree.create(name, {})
    assert group.destroy()


def test_a_refused_limit_names_its_file_and_leaves_no_group(tree: cgroup.Tree) -> None:
    with pytest.raises(OSError) as caught:
        tree.create("bad", {"pids": -5})
    assert caught.value.errno in (errno.EINVAL, errno.ERANGE)
    assert caught.value.filename.endswith("/bad/pids.max")
    assert "-5" in str(caught.value)
    assert not groups_on_host(tree.name + "/bad")


def test_a_limit_without_a_controller_is_refused() -> None:
    layout = cgroup.detect()
    if not layout.v2:
        pytest.skip("no v2 tree")
    bare = cgroup.Home(layout.home.path if layout.home else "", frozenset(), False)
    if not layout.home or layout.kind == "v2":
        pytest.skip("on a v2 host the children of our parent always have the controllers")
    with_none = cgroup.Tree.open(cgroup.owner_name(os.getpid()), cgroup.Layout({}, layout.v2, bare))
    try:
        with pytest.raises(OSError) as caught:
            with_none.create("unlimited", {"memory_bytes": 1 << 20})
        assert caught.value.errno == errno.ENOTSUP
        assert with_none.create("free", {}).destroy(), "the same group without a limit can be made"
    finally:
        assert with_none.close()


def test_a_hundred_calls_leave_no_descriptor_and_no_group(tree: cgroup.Tree) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        assert tree.create(f"call-{number}", {"pids": 5, "memory_bytes": 1 << 24, "cpus": 1}).destroy()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not groups_on_host(tree.name + "/call-*")


OWNER = """
import os, sys, subprocess
from sandbox._linux import cgroup
tree = cgroup.Tree.open(cgroup.owner_name(os.getpid()))
group = tree.create("orphan", {"pids": 5})
child = subprocess.Popen([sys.executable, "-I", "-S", "-c", "import time; time.sleep(120)"], stdin=subprocess.DEVNULL)
group.add(child.pid)
print(tree.name, child.pid, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def owner() -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    """Another supervisor, with one call running in its tree."""
    layout = cgroup.detect()
    if not layout.home and not any(tree.writable for tree in layout.v1.values()):
        pytest.skip("no cgroup tree is open to us")
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout
            name, sleeper = process.stdout.readline().split()
            yield process, name, int(sleeper)
        finally:
            process.kill()
            process.wait()
            cgroup.reap()
    assert not groups_on_host(name)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_dead_owners_groups_are_reaped_with_what_runs_in_them(owner: tuple[subprocess.Popen[str], str, int]) -> None:
    process, name, sleeper = owner
    process.kill()
    process.wait()
    assert is_running(sleeper)
    assert groups_on_host(name)
    # Another supervisor's start may reap them first: what counts is that they are gone.
    cgroup.reap()
    assert eventually(lambda: not is_running(sleeper))
    assert eventually(lambda: not groups_on_host(name))


def test_a_living_owners_groups_are_left_alone(owner: tuple[subprocess.Popen[str], str, int]) -> None:
    _process, name, sleeper = owner
    before = groups_on_host(name)
    assert not any(os.path.basename(path) == name for path in cgroup.reap())
    assert groups_on_host(name) == before
    assert is_running(sleeper)


def test_groups_that_only_look_like_ours_are_left_alone() -> None:
    layout = cgroup.detect()
    tree = next((t for t in [layout.v2, *layout.v1.values()] if t and t.writable), None)
    if tree is None:
        pytest.skip("no writable tree")
    # No owner in the name; and a dead owner's name whose lock is held, as from another pid namespace.
    other, locked = Path(tree.own, "toolcall-sandbox-test"), Path(tree.own, "toolcall-sandbox-999999999-1")
    other.mkdir()
    locked.mkdir()
    fd = os.open(locked, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        assert not {str(other), str(locked)} & set(cgroup.reap())
        assert other.exists()
        assert locked.exists()
        os.close(fd)
        fd = -1
        cgroup.reap()
        assert eventually(lambda: not locked.exists())
    finally:
        if fd >= 0:
            os.close(fd)
        for path in (other, locked):
            if path.exists():
                path.rmdir()
