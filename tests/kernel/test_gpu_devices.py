"""The second wall: a device rule on the cgroup refuses nodes, whatever /dev holds. Each refusal has its twin.

No GPU is needed: the nodes are made in a private mount namespace, under NVIDIA's names, with the numbers of devices
that anybody may open (tun, fuse), and with NVIDIA's own numbers, for which there is no driver: ENXIO means that the
rule let the open through, EPERM that it did not.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import Sandbox
from sandbox._linux import bpf, cgroup, devices
from sandbox._linux.cgroup_layout import Layout

pytestmark = [pytest.mark.needs("root", "cgroup")]

# Runs in its own mount namespace: joins the groups given, opens each node, prints what came of it.
PROBE = """
import errno, json, os, sys
sys.path.insert(0, sys.argv[1])
from sandbox._linux import mounts, syscalls
syscalls.unshare(syscalls.CLONE_NEWNS)
mounts.make_private()
mounts.mount("tmpfs", "/mnt", "tmpfs", 0, "size=64k")
nodes = {"nvidia0": (10, 200), "nvidia1": (10, 229), "nvidiactl": (195, 255), "nvidia7": (195, 7), "null": (1, 3)}
for name, numbers in nodes.items():
    os.mknod("/mnt/" + name, 0o020666, os.makedev(*numbers))
for procs in json.loads(sys.argv[2]):
    with open(procs, "w") as file:
        file.write(str(os.getpid()))
def said(work):
    try:
        work(); return "ok"
    except OSError as error:
        return errno.errorcode[error.errno]
found = {name: said(lambda: os.close(os.open("/mnt/" + name, os.O_RDWR))) for name in nodes}
found["made"] = said(lambda: os.mknod("/mnt/made", 0o020666, os.makedev(10, 229)))
found["null made"] = said(lambda: os.mknod("/mnt/null2", 0o020666, os.makedev(1, 3)))
print(json.dumps(found))
"""
ROOT = str(Path(bpf.__file__).resolve().parents[2])
OPEN = {"nvidia0": "ok", "nvidia1": "ok", "nvidiactl": "ENXIO", "nvidia7": "ENXIO", "null": "ok", "made": "ok"}
SHUT = dict.fromkeys(OPEN, "EPERM") | {"null": "ok", "null made": "EPERM"}
GRANTED = [("c", 10, 200, "rw"), ("c", 195, 255, "rw")]


def probe(procs: list[str]) -> dict[str, str]:
    argv = [sys.executable, "-I", "-c", PROBE, ROOT, json.dumps(procs)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.fixture
def tree() -> Iterator[cgroup.Tree]:
    tree = cgroup.Tree.open(f"{cgroup.owner_name(os.getpid())}.devices{time.monotonic_ns()}")
    if not tree.v2:
        tree.close()
        pytest.skip("no version 2 tree is open to us")
    yield tree
    assert tree.close()


def test_nodes_open_without_the_rule() -> None:
    """The twin of everything below."""
    assert probe([]) == OPEN | {"null made": "ok"}


def test_one_program_on_the_supervisors_group_holds_for_every_call(tree: cgroup.Tree) -> None:
    rules = devices.DeviceRules.open(tree.v2, "")
    assert (rules.kind, rules.reason) == ("bpf", "")
    group = tree.create("jail-1", {})
    rules.admit(group.v2, "")
    assert probe([f"{group.v2}/cgroup.procs"]) == SHUT
    rules.close()
    assert probe([f"{group.v2}/cgroup.procs"]) == SHUT, "the program stays with the group"
    assert group.destroy()


def test_a_grant_opens_its_nodes_for_that_call_alone(tree: cgroup.Tree) -> None:
    rules = devices.DeviceRules.open(tree.v2, "")
    granted, other = tree.create("jail-1", {}), tree.create("jail-2", {})
    rules.admit(granted.v2, "", GRANTED)
    assert probe([f"{granted.v2}/cgroup.procs"]) == SHUT | {"nvidia0": "ok", "nvidiactl": "ENXIO"}
    assert probe([f"{other.v2}/cgroup.procs"]) == SHUT
    rules.close()
    assert granted.destroy()
    assert other.destroy()


def test_a_second_grant_of_the_same_kind_loads_no_second_program(tree: cgroup.Tree) -> None:
    rules = devices.DeviceRules.open(tree.v2, "")
    groups = [tree.create(f"jail-{number}", {}) for number in range(3)]
    started = time.perf_counter()
    for group in groups:
        rules.admit(group.v2, "", GRANTED)
    print(f"{(time.perf_counter() - started) / 3 * 1000:.2f} ms to admit one group")
    assert repr(rules) == "<DeviceRules bpf programs=2>"
    rules.close()
    assert all(group.destroy() for group in groups)


@pytest.mark.needs("cgroup_v1")
def test_version_1_lists_hold_the_same() -> None:
    layout = cgroup.detect()
    if "devices" not in layout.v1:
        pytest.skip("no devices controller of version 1")
    tree = cgroup.Tree.open(f"{cgroup.owner_name(os.getpid())}.v1devices", Layout(layout.v1, None, None))
    try:
        rules = devices.DeviceRules.open("", tree.v1["devices"], [*GRANTED, ("c", 10, 229, "rw")])
        assert (rules.kind, rules.reason) == ("v1", "")
        granted, other = tree.create("jail-1", {}), tree.create("jail-2", {})
        rules.admit("", granted.v1["devices"], GRANTED)
        rules.admit("", other.v1["devices"])
        assert probe([f"{granted.v1['devices']}/cgroup.procs"]) == SHUT | {"nvidia0": "ok", "nvidiactl": "ENXIO"}
        assert probe([f"{other.v1['devices']}/cgroup.procs"]) == SHUT
        assert granted.destroy()
        assert other.destroy()
    finally:
        assert tree.close()


def test_what_is_refused_by_the_kernel_is_said_with_its_reason(tree: cgroup.Tree) -> None:
    with pytest.raises(OSError, match="BPF_PROG_LOAD: Invalid argument") as caught:
        bpf.load_device_program(bpf.device_program(())[:-8])
    assert caught.value.errno == errno.EINVAL
    assert "not an exit" in str(caught.value), "the verifier's words"
    rules = devices.DeviceRules.open(tree.v2 + "/gone", "")
    assert (rules.kind, "No such file" in rules.reason) == ("", True)
    rules.close()


@pytest.mark.needs("jail")
def test_a_supervisors_calls_are_under_the_rule(box: Sandbox) -> None:
    """Not by its /dev, which holds no such node, but by the group: a process of ours that joins it is refused too."""
    argv = ["python3", "-c", "print('up', flush=True); input()"]
    with box.stream(argv, input="") as quick:
        assert quick.outcome.record.enforcement["gpu"].mechanism.startswith("device nodes absent")
    if "cgroup device program" not in quick.outcome.record.enforcement["gpu"].mechanism:
        pytest.skip("no version 2 tree is open to us")
    with box.stream(["sh", "-c", "echo up; sleep 30"]) as stream:
        assert next(iter(stream))[1] == b"up\n"
        assert probe([f"{_group(box)}/cgroup.procs"]) == SHUT
        stream.signal(9)


def _group(box: Sandbox) -> str:
    """The version 2 group of the call that runs, by the tree's name."""
    link = box._link
    assert link is not None
    parent = cgroup.PREFIX + cgroup.owner_name(link.supervisor_pid)
    for root, names, _ in os.walk("/sys/fs/cgroup"):
        if root.endswith(f"/{parent}") and os.path.exists(f"{root}/cgroup.kill"):
            for name in names:
                if Path(root, name, "cgroup.procs").read_text().count("\n") > 1:
                    return f"{root}/{name}"
    raise AssertionError("no group of a running call")
