"""The control table follows from the facts alone, and every gap says why and what would close it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from sandbox.host import CONTROL_NAMES, CgroupControl, Feature, HostFacts, controls

YES = Feature(True)
NO = Feature(False, "refused", "do this")


def everywhere(where: str, reason: str = "") -> dict[str, CgroupControl]:
    return {name: CgroupControl(where, reason) for name in ("memory", "pids", "cpu", "io")}


FULL = HostFacts(
    kernel="6.1",
    machine="x86_64",
    uid=0,
    is_root_like=True,
    user_namespaces=YES,
    namespaces=dict.fromkeys(("mount", "net", "ipc", "uts", "cgroup", "pid"), YES),
    proc_mount=YES,
    overlay_in_userns=YES,
    tmpfs_attributes=YES,
    idmapped_mounts=YES,
    nproc_in_userns=YES,
    cgroup_kind="v2",
    cgroup_path="/sys/fs/cgroup",
    cgroups=everywhere("v2"),
    cpu_accounting=True,
    swap_accounted=True,
    swap_bytes=1 << 30,
    systemd_user=NO,
    landlock_abi=4,
    seccomp_actions=("errno", "user_notif"),
    libseccomp="2.5.4",
)
ORDINARY = replace(
    FULL, uid=1000, is_root_like=False, cgroups=everywhere("", "not ours"), cpu_accounting=False, swap_accounted=False
)


def levels(facts: HostFacts) -> dict[str, str]:
    return {name: control.level for name, control in controls(facts).items()}


def test_a_host_with_everything_enforces_everything() -> None:
    table = controls(FULL)
    assert tuple(table) == CONTROL_NAMES
    assert set(levels(FULL).values()) == {"full"}
    assert table["memory"].mechanism == "cgroup v2 memory.max"
    assert table["io"].mechanism == "cgroup v2 io.max"


def test_an_ordinary_user_without_delegation_keeps_real_limits() -> None:
    table = controls(ORDINARY)
    assert (table["pids"].level, table["pids"].mechanism.split()[:2]) == ("full", ["rlimit", "nproc"])
    assert (table["cpus"].level, table["cpus"].mechanism) == ("partial", "cpu affinity")
    assert (table["memory"].level, table["memory"].strength) == ("partial", "polled")
    assert (table["cpu_time"].level, table["cpu_time"].strength) == ("partial", "polled")
    assert table["io"].level == "none"
    for name in ("filesystem", "network", "processes", "wall_time", "disk", "inodes", "output", "open_files", "gpu"):
        assert table[name].level == "full", name


def test_every_gap_says_why_and_what_to_do() -> None:
    for name, control in controls(ORDINARY).items():
        if control.level != "full":
            assert "not ours" in control.reason, name
            assert control.fix == "do this" or "user@.service.d" in control.fix, name
    delegating = replace(ORDINARY, systemd_user=YES)
    assert controls(delegating)["memory"].fix.startswith("systemd-run --user --scope")


@pytest.mark.parametrize(
    ("change", "control"),
    [
        ({"user_namespaces": NO}, "filesystem"),
        ({"namespaces": {**FULL.namespaces, "net": NO}}, "network"),
        ({"namespaces": {**FULL.namespaces, "pid": NO}}, "processes"),
        ({"proc_mount": NO}, "processes"),
    ],
)
def test_without_a_jail_nothing_holds(change: dict[str, object], control: str) -> None:
    table = controls(replace(FULL, **change))  # type: ignore[arg-type]
    assert (table[control].level, table[control].reason, table[control].fix) == ("none", "refused", "do this")
    assert table["memory"].level == "none"
    assert table["memory"].reason == "no jail can be made here: refused"
    assert table["wall_time"].level == "none"


def test_cgroup_v1_holds_memory_but_not_buffered_writes() -> None:
    table = controls(replace(FULL, cgroup_kind="v1", cgroups=everywhere("v1")))
    assert table["memory"].level == table["pids"].level == table["cpus"].level == "full"
    assert table["io"].level == "partial"
    assert "page cache" in table["io"].reason


def test_uncounted_swap_makes_memory_partial_only_where_there_is_swap() -> None:
    assert levels(replace(FULL, swap_accounted=False))["memory"] == "partial"
    assert levels(replace(FULL, swap_accounted=False, swap_bytes=0))["memory"] == "full"


def test_an_old_kernel_cannot_count_tasks_per_jail() -> None:
    table = controls(replace(ORDINARY, nproc_in_userns=Feature(False, "counts everywhere", "use Linux 5.14")))
    assert (table["pids"].level, table["pids"].fix) == ("none", "use Linux 5.14")
    assert levels(replace(FULL, nproc_in_userns=NO))["pids"] == "full", "a cgroup does not need it"


def test_missing_filter_parts_are_told_apart() -> None:
    no_library = controls(replace(FULL, libseccomp=""))["syscalls"]
    no_kernel = controls(replace(FULL, seccomp_actions=()))["syscalls"]
    assert no_library.level == no_kernel.level == "none"
    assert "libseccomp" in no_library.reason
    assert "kernel" in no_kernel.reason
    assert controls(replace(FULL, landlock_abi=0))["landlock"].level == "none"


def test_facts_survive_json() -> None:
    assert HostFacts.from_json(json.loads(json.dumps(ORDINARY.to_json()))) == ORDINARY


def test_the_tree_that_was_opened_corrects_the_facts() -> None:
    corrected = FULL.with_cgroups({"memory": "v2", "pids": "v2"}, {"cpu": "write +cpu: busy"})
    assert levels(corrected)["memory"] == "full"
    assert levels(corrected)["cpus"] == "partial"
    assert "write +cpu: busy" in controls(corrected)["cpus"].reason
    assert FULL.cgroups["cpu"].where == "v2"
