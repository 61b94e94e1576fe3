"""What blocks user namespaces is named by its knob; the group paths are read right in containers too."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox._linux import cgroup_layout
from sandbox.host import HostFacts, delegation, probing

REPOSITORY = Path(__file__).parents[2]
WORKS = {"user": 0, "uid_map": 0, "mount": 0, "tmpfs": 0}
APPARMOR = "/proc/sys/kernel/apparmor_restrict_unprivileged_userns"


@pytest.fixture
def knobs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The kernel files that the probe reads, by path."""
    files: dict[str, str] = {}
    monkeypatch.setattr(probing, "_read", lambda path: files.get(path, ""))
    return files


@pytest.mark.parametrize(
    ("results", "status", "files", "reason", "fix"),
    [
        (
            {"user": errno.ENOSPC},
            {},
            {"/proc/sys/user/max_user_namespaces": "0\n"},
            "user.max_user_namespaces is 0",
            "sudo sysctl -w user.max_user_namespaces=15000",
        ),
        (
            {"user": errno.EPERM},
            {},
            {"/proc/sys/kernel/unprivileged_userns_clone": "0\n"},
            "kernel.unprivileged_userns_clone is 0",
            "sudo sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        ({**WORKS, "mount": errno.EPERM}, {}, {APPARMOR: "1\n"}, "AppArmor takes the capabilities away", "sysctl -w"),
        ({"user": errno.EPERM}, {"Seccomp": "2"}, {}, "a seccomp filter around us", "--security-opt seccomp="),
        ({"user": errno.EPERM}, {"Seccomp": "0"}, {}, "refused at user (Operation not permitted)", ""),
        ({"user": errno.ENOSPC}, {}, {}, "the limit of user namespaces", "sudo sysctl"),
        ({}, {}, {}, "refused at user (no answer)", ""),
    ],
)
def test_the_knob_that_blocks_user_namespaces_is_named(
    knobs: dict[str, str],
    results: dict[str, object],
    status: dict[str, str],
    files: dict[str, str],
    reason: str,
    fix: str,
) -> None:
    knobs.update(files)
    feature = probing._user_namespaces(results, status, is_root_like=False)
    assert not feature.ok
    assert feature.reason.startswith(reason)
    assert fix in feature.fix


def test_a_restriction_that_does_not_bite_is_no_reason(knobs: dict[str, str]) -> None:
    knobs[APPARMOR] = "1\n"
    assert probing._user_namespaces(dict(WORKS), {"Seccomp": "2"}, is_root_like=False).ok


def test_a_covered_proc_is_told_from_other_refusals(knobs: dict[str, str]) -> None:
    works = probing.Feature(True)
    assert "covered" in probing._proc_mount({"proc": errno.EPERM}, works).reason
    assert probing._proc_mount({"proc": errno.ENODEV}, works).reason == "mount proc: No such device"
    assert probing._proc_mount({"proc": 0}, works).ok


def own(path: str, root: str, mount_point: Path, dev: str = "") -> str:
    st_dev = os.stat(mount_point).st_dev
    return cgroup_layout._own_directory(path, dev or f"{os.major(st_dev)}:{os.minor(st_dev)}", root, str(mount_point))


@pytest.fixture
def fake_mount(tmp_path: Path) -> Path:
    for group in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        group.mkdir(exist_ok=True)
        (group / "cgroup.procs").touch()
    return tmp_path


def test_own_group_is_found_on_a_plain_host_and_through_a_containers_bind_mount(fake_mount: Path) -> None:
    assert own("/a/b", "/", fake_mount) == f"{fake_mount}/a/b"
    assert own("/", "/", fake_mount) == str(fake_mount)
    # Docker with cgroup v1 shows the container's own group as the root of the mount, and names it on both sides.
    assert own("/docker/7f", "/docker/7f", fake_mount) == str(fake_mount)
    assert own("/docker/7f/a", "/docker/7f", fake_mount) == f"{fake_mount}/a"


def test_own_group_is_not_guessed_where_the_mount_does_not_show_it(fake_mount: Path) -> None:
    assert own("/elsewhere", "/docker/7f", fake_mount) == ""
    assert own("/docker/7f2", "/docker/7f", fake_mount) == "", "a common prefix is not a parent"
    assert own("/", "/..", fake_mount) == "", "the mount starts above our cgroup namespace"
    assert own("/../x", "/", fake_mount) == ""
    assert own("/missing", "/", fake_mount) == ""
    assert own("/a (deleted)", "/", fake_mount) == ""
    assert own("/a", "/", fake_mount, dev="0:0") == "", "another mount lies on top"


MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 /docker/7f /mnt/with\040space ro,relatime - cgroup cgroup rw,memory
34 31 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
35 31 0:32 / /sys/fs/cgroup/unified rw,nosuid shared:1 master:2 - cgroup2 cgroup2 rw,nsdelegate
""".strip()


def test_mountinfo_and_cgroup_files_are_parsed() -> None:
    mounts = cgroup_layout._mounts(MOUNTINFO)
    assert [(fstype, root, mount_point) for fstype, _dev, root, mount_point, _options in mounts] == [
        ("cgroup", "/", "/sys/fs/cgroup/cpu,cpuacct"),
        ("cgroup", "/docker/7f", "/mnt/with space"),
        ("cgroup", "/", "/sys/fs/cgroup/systemd"),
        ("cgroup2", "/", "/sys/fs/cgroup/unified"),
    ]
    assert mounts[0][4] & cgroup_layout.V1_CONTROLLERS == {"cpu", "cpuacct"}
    paths = cgroup_layout._own_paths("4:cpu,cpuacct:/x\n1:name=systemd:/s\n0::/with:colon\n")
    assert (paths["cpu"], paths["cpuacct"], paths[""]) == ("/x", "/x", "/with:colon")


def test_a_process_that_ends_while_its_file_is_read_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(fd: int, size: int) -> bytes:
        raise ProcessLookupError(errno.ESRCH, "No such process")

    with monkeypatch.context() as patched:
        patched.setattr(cgroup_layout.os, "read", read)
        gone = cgroup_layout.read_text("/proc/self/stat")
    assert gone is None
    assert cgroup_layout.read_text("/proc/self/stat")


def test_root_needs_no_delegation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert delegation.delegation_prefix() == []


def test_a_user_with_a_systemd_manager_gets_a_delegated_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = cgroup_layout.Layout({}, None, None)
    monkeypatch.setattr(delegation.cgroup, "detect", lambda: bare)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(delegation, "systemd_user", lambda layout: probing.Feature(True))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    prefix = delegation.delegation_prefix()
    assert prefix[:3] == ["env", "XDG_RUNTIME_DIR=/run/user/1000", "systemd-run"]
    assert {"--user", "--scope", "Delegate=yes"} <= set(prefix)
    assert prefix[-1] == "--"
    monkeypatch.setattr(delegation, "systemd_user", lambda layout: probing.Feature(False, "none"))
    assert delegation.delegation_prefix() == []


PROBE = """
import json, os, time
from sandbox import host
before = (len(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt"))
seconds = []
for _ in range(5):
    start = time.perf_counter()
    facts = host.probe()
    seconds.append(time.perf_counter() - start)
after = (len(os.listdir("/proc/self/fd")), os.readlink("/proc/self/ns/user"), os.readlink("/proc/self/ns/mnt"))
try:
    os.waitpid(-1, os.WNOHANG)
    left = True
except ChildProcessError:
    left = False
print(json.dumps([facts.to_json(), min(seconds), before == after, left]))
"""


def test_probing_is_quick_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    data, seconds, unchanged, left = json.loads(done.stdout)
    facts = HostFacts.from_json(data)
    assert unchanged
    assert not left, "a child was left behind"
    factor = float(os.environ.get("SANDBOX_TIME_FACTOR", "1"))
    assert seconds < 0.04 * 5 * factor, "40 ms is the aim on a quiet machine"
    assert facts.kernel == os.uname().release
    assert facts.cpu_count >= 1
    assert facts.memory_bytes > 1 << 20


def test_probing_apart_works_from_a_threaded_caller() -> None:
    facts = probing.probe_apart()
    assert facts.uid == os.geteuid()
    assert facts.kernel == os.uname().release
