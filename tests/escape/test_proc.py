"""/proc: what tells of the machine, what steers it, and other processes."""

from __future__ import annotations

import os

import pytest

from sandbox.planner import PROC_DRIVER, PROC_MASKED
from tests.helpers.escape import Errno, Jail

pytestmark = [pytest.mark.needs("jail")]

CLOSED = ("EACCES", "EROFS", "EPERM")
SETTINGS = (
    "kernel/core_pattern",
    "kernel/modprobe",
    "kernel/hostname",
    "kernel/ns_last_pid",
    "kernel/shmmax",
    "kernel/sysrq",
    "kernel/yama/ptrace_scope",
    "vm/drop_caches",
    "vm/overcommit_memory",
    "fs/binfmt_misc/register",
    "fs/file-max",
    "net/ipv4/ip_forward",
    "net/ipv4/ping_group_range",
    "net/core/somaxconn",
    "user/max_user_namespaces",
)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_kernel_cannot_be_written(jail: Jail, name: str) -> None:
    path = f"/proc/sys/{name}"
    if not os.path.exists(path):
        pytest.skip(f"this kernel has no {path}")
    written, shown = jail.act(["write", path, "1"], ["read", "/proc/sys/kernel/ostype"])
    assert str(written) in (*CLOSED, "ENOENT"), written
    assert shown == "Linux\n"


@pytest.mark.parametrize("name", ["sysrq-trigger", "irq/default_smp_affinity", "mtrr", "timer_list", "kmsg"])
def test_entries_that_steer_the_machine_cannot_be_written(jail: Jail, name: str) -> None:
    if not os.path.exists(f"/proc/{name}"):
        pytest.skip(f"this kernel has no /proc/{name}")
    written, own = jail.act(["write", f"/proc/{name}", "h"], ["write", "/proc/self/comm", "h"])
    # What is masked is the null device, which takes everything and does nothing.
    expected = ("1",) if name in PROC_MASKED else CLOSED
    assert str(written) in expected, written
    assert own == 1


@pytest.mark.parametrize("name", [*PROC_MASKED, PROC_DRIVER])
def test_entries_that_tell_of_the_machine_are_empty(jail: Jail, name: str) -> None:
    path = f"/proc/{name}"
    if not os.path.exists(path):
        assert jail.one("exists", path) is False
    elif os.path.isdir(path):
        assert jail.act(["listdir", path], ["create", f"{path}/x"]) == [[], Errno("EROFS")]
    else:
        assert jail.act(["read", path], ["read", "/proc/self/comm"]) == ["", "python3\n"]


def test_only_own_processes_are_listed(jail: Jail) -> None:
    found = jail.act(["identity"], ["pids"])
    assert found[1] == [found[0]["pid"]]


@pytest.mark.parametrize("entry", ["environ", "mem", "fd", "root", "cwd", "maps", "ns/mnt", "status", "cmdline"])
def test_pid_1_shows_nothing(jail: Jail, entry: str) -> None:
    """It has the tool's uid and came from outside: its memory, its descriptors, its namespaces."""
    actions = [["read", f"/proc/1/{entry}"], ["exists", f"/proc/self/{entry}"]]
    assert jail.act(*actions) == [Errno("ENOENT"), True]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("uid_map", "0 0 1"),
        ("gid_map", "0 0 1"),
        ("setgroups", "allow"),
        ("oom_score_adj", "-1000"),
        ("timens_offsets", "monotonic 1 0"),
    ],
)
def test_a_process_cannot_give_itself_more_through_proc(jail: Jail, name: str, text: str) -> None:
    if not os.path.exists(f"/proc/self/{name}"):
        pytest.skip(f"this kernel has no /proc/self/{name}")
    found = jail.act(["write", f"/proc/self/{name}", text], ["write", "/proc/self/oom_score_adj", "500"])
    assert str(found[0]) in CLOSED, found
    assert found[1] == 3


def test_mounts_tell_nothing_of_the_hosts_other_mounts(jail: Jail) -> None:
    mounts = [line.split() for line in jail.one("read", "/proc/self/mountinfo").splitlines()]
    inside = {fields[4] for fields in mounts}
    assert {"/", "/proc", "/usr", "/tmp", "/home/user"} <= inside
    assert not any(path.startswith(("/sys/fs", "/boot", "/run/user", "/mnt")) for path in inside)
    assert str(jail.box.state) not in str(mounts)


def test_own_proc_entries_work(jail: Jail) -> None:
    """What honest programs read there."""
    paths = ["self/maps", "self/stat", "self/limits", "meminfo", "cpuinfo", "stat", "uptime", "loadavg", "mounts"]
    assert all(jail.act(*(["read", f"/proc/{path}", 100] for path in paths)))
