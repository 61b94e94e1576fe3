"""What tests share: skips that name what is missing, one sandbox per session, and a watch for leaks.

`@pytest.mark.needs("userns", "gcc")` skips where the host lacks a feature, naming it; `SANDBOX_REQUIRE=userns,gcc`
turns such skips into failures.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from sandbox import host
from sandbox.gpu import inventory
from sandbox.host import HostFacts, programs

PROGRAMS = ("gcc", "git", "make", "node", "npm", "ssh", "ssh-keygen", "strace", "docker", "script", "java")
PROGRAMS += ("iodine", "ptunnel-ng")
RUNTIMES = ("crun", "runc", "runsc", "nsjail")


# A shell that starts something in the background has it ignore interrupts, and so would every program that we test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts a time, and these neither: a machine under load is slow now and then.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@functools.cache
def facts() -> HostFacts:
    """This host's facts, probed once, in a process of its own: a test run may have threads."""
    return host.probe_apart()


@functools.cache
def missing(feature: str) -> str:
    """Why `feature` is not here; empty when it is."""
    found = facts()
    checks = {
        "root": (os.geteuid() == 0, "not root"),
        "user": (os.geteuid() != 0, "running as root"),
        "userns": (found.user_namespaces.ok, found.user_namespaces.reason),
        "jail": (found.user_namespaces.ok, found.user_namespaces.reason),
        "cgroup": (all(control.where for name, control in found.cgroups.items() if name != "io"), "no cgroups here"),
        "cgroup2": (found.cgroup_kind == "v2", f"the cgroup tree is {found.cgroup_kind}"),
        "cgroup_v1": (any(control.where == "v1" for control in found.cgroups.values()), "no v1 controllers"),
        "overlay": (found.overlay_in_userns.ok, found.overlay_in_userns.reason),
        "attributes": (found.tmpfs_attributes.ok, found.tmpfs_attributes.reason),
        "idmap": (found.idmapped_mounts.ok, found.idmapped_mounts.reason),
        "landlock": (found.landlock_abi > 0, "no Landlock"),
        "seccomp": (found.seccomp_filter, "no seccomp filters"),
        "x86_64": (found.machine == "x86_64", f"this is {found.machine}"),
        "mountns": (found.user_namespaces.ok or os.geteuid() == 0, "no mount namespaces"),
    }
    if feature in checks:
        present, reason = checks[feature]
        return "" if present else reason or "missing"
    if feature in RUNTIMES:
        return "" if programs.find(feature) else f"{feature} is not installed"
    if feature.startswith("python:"):
        name = feature.partition(":")[2]
        done = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False)
        return "" if done.returncode == 0 else f"Python package {name} is not installed"
    if feature == "nvml":
        gpus = inventory.find()
        return "no NVIDIA GPU" if gpus is None else str(gpus["trouble"])
    if feature in PROGRAMS:
        # Not everyone has the directories of administrators' programs among his own.
        path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
        return "" if shutil.which(feature, path=path) else f"{feature} is not installed"
    raise ValueError(f"unknown feature {feature!r} in @needs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    required = set(filter(None, os.environ.get("SANDBOX_REQUIRE", "").split(",")))
    for item in items:
        for mark in item.iter_markers("needs"):
            for feature in mark.args:
                reason = missing(feature)
                if reason and not {feature, "all"} & required:
                    item.add_marker(pytest.mark.skip(reason=f"needs {feature}: {reason}"))


@pytest.fixture(scope="session")
def host_facts() -> HostFacts:
    return facts()


@pytest.fixture(scope="session")
def state_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state directory for this process's tests."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def box(state_root: Path) -> Iterator[Any]:
    """A sandbox under the `shell` profile."""
    from sandbox import Sandbox

    with Sandbox("shell", state=state_root) as made:
        yield made


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name: such a path may have 107 bytes (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="tcs-", dir="/var/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="session", autouse=True)
def _keep_supervisor(state_root: Path) -> Iterator[None]:
    """One supervisor for the whole session: each test's sandbox shares it, and it ends with the session."""
    from sandbox import link

    kept = link.shared(state_root)
    before = _own_cgroups()
    yield
    link.release(kept)
    assert _own_cgroups() <= before, "a cgroup of ours was left behind"


def _own_cgroups() -> set[str]:
    """Our groups of call level, of supervisors started by this process (named by their pid, which is our child)."""
    found = set()
    for root, names, _ in os.walk("/sys/fs/cgroup"):
        for name in names:
            if name.startswith("toolcall-sandbox-") and _parent_of(name.split("-")[2]) == os.getpid():
                found.add(f"{root}/{name}")
    return found


def _parent_of(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return -1


@pytest.fixture(autouse=True)
def _no_leaked_fds(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test leaves as many descriptors open as it found, but for what is opened once per process."""
    before = _open_fds()
    yield
    leaked = _open_fds() - before
    allowed = 4  # the link's control socket, an event loop's epoll and self-pipe of a plugin, a lazily opened urandom
    assert len(leaked) <= allowed, f"descriptors leaked: {sorted(leaked)}"


def _open_fds() -> set[str]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}")
        except OSError:
            continue
    return found
