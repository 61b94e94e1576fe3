"""gVisor as a runtime of a real Docker daemon: what holds there, and that nothing stays on the host."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandbox import Sandbox
from sandbox.testing import check_launcher
from sandbox.testing.stage import HELD, REFUSED
from tests.helpers import engine as engines
from tests.helpers.docker_calls import GATES, children, containers, mounts_below, start_caller, wait_for

pytestmark = pytest.mark.needs("runsc", "root", "jail", "cgroup")
HOLDS = [
    "deny_wins",
    "functions",
    "no_privileges",
    "system_calls",
    "no_neighbours",
    "nothing_survives",
    "streams",
    "write_grant_belongs_to_the_caller",
    "workspace_is_the_callers",
    "changes_can_be_discarded",
    "no_network",
    "sockets",
    "allowlist",
    "names",
    "no_datagrams",
    "memory",
    "disk",
]
IS_REFUSED = ["pids"]
# A file of the caller's that others would run as the caller.
SET_ID = """
import os, sys
def no(what, *args):
    try: what(*args)
    except OSError as error: return error.errno
    return 0
os.chdir(sys.argv[1])
open("made", "w").close()
fd = os.open("made", os.O_RDWR)
create = os.O_CREAT | os.O_WRONLY
print([no(os.chmod, "made", 0o4755), no(os.chmod, "made", 0o2755), no(os.fchmod, fd, 0o6755),
       no(os.open, "opened", create, 0o4755), no(os.mknod, "node", 0o104755)])
print([no(os.chmod, "made", 0o755), no(os.fchmod, fd, 0o751), no(os.open, "plain", create, 0o755),
       no(os.mknod, "there", 0o100755)])
"""


@pytest.fixture
def gvisor(docker: Callable[..., Sandbox]) -> Iterator[Callable[..., Sandbox]]:
    """As `docker`; afterwards nothing of ours is mounted on the host."""
    yield lambda **more: docker(runtime="runsc", best_effort=["pids"], **more)
    wait_for(lambda: mounts_below(f"{GATES}/{os.getpid()}-") == [])


def test_promises(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    isolation = {"runtime": "runsc", "image": engines.PYTHON, "best_effort": ["pids"]}
    report = check_launcher("docker", state=tmp_path, only=HOLDS + IS_REFUSED, **isolation)
    report.require()
    assert {finding.check.name for finding in report.of(REFUSED)} == set(IS_REFUSED)
    assert {finding.check.name for finding in report.of(HELD)} == set(HOLDS)


def test_the_tool_runs_under_another_kernel_and_the_record_says_so(gvisor: Callable[..., Sandbox]) -> None:
    done = gvisor().run(["uname", "-r"])
    assert done.text.strip() != os.uname().release
    assert done.record.isolation.runtime == "runsc"
    assert done.record.isolation.grade == "userspace-kernel"


def test_a_signal_reaches_the_tool(gvisor: Callable[..., Sandbox]) -> None:
    with gvisor().stream(["sh", "-c", "trap 'exit 9' TERM; echo on; while :; do sleep 0.1; done"]) as stream:
        assert next(iter(stream)) == ("stdout", b"on\n")
        stream.signal(signal.SIGTERM)
        assert stream.outcome.exit_code == 9


def test_nothing_written_to_the_host_runs_as_the_caller_for_others(
    gvisor: Callable[..., Sandbox], short_path: Path
) -> None:
    box = gvisor(filesystem={"write": [str(short_path)]})
    done = box.run(["python3", "-I", "-c", SET_ID, str(short_path)])
    assert done.text.splitlines() == [str([errno.EPERM] * 5), str([0] * 4)], done.stderr
    found = {path.name: path.stat() for path in short_path.iterdir()}
    assert set(found) == {"made", "plain", "there"}
    assert all((info.st_uid, info.st_mode & 0o6000) == (os.geteuid(), 0) for info in found.values())


def test_what_is_built_for_it_does_not_reach_the_hosts_own_trees(
    gvisor: Callable[..., Sandbox], short_path: Path
) -> None:
    """Where systemd runs, every mount of the host's is shared: a cover in a copy would cover the host's own file."""
    path = str(short_path)
    (short_path / ".env").write_text("secret")
    (short_path / "plain").write_text("plain")
    subprocess.run(["mount", "--bind", path, path], check=True)
    try:
        subprocess.run(["mount", "--make-shared", path], check=True)
        before = [line for line in mounts_below(path) if not line.startswith(str(GATES))]
        with gvisor(filesystem={"read": [path], "deny": ["**/.env"]}).stream(
            ["sh", "-c", f"cat {path}/plain; cat {path}/.env; sleep 2"]
        ) as stream:
            said = iter(stream)
            told = b""
            while b"plain" not in told or b"Permission denied" not in told:
                told += next(said)[1]
            assert [line for line in mounts_below(path) if not line.startswith(str(GATES))] == before
            # Covered in a copy that is still mounted here, it could not be renamed.
            assert (short_path / ".env").rename(short_path / "renamed").read_text() == "secret"
            assert stream.outcome.ok
        assert (short_path / "plain").read_text() == "plain"
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_when_the_supervisor_is_killed_the_container_dies_and_nothing_stays_mounted(
    engine: engines.Engine, tmp_path: Path, gvisor: Callable[..., Sandbox]
) -> None:
    with start_caller(engine, tmp_path, "runsc") as caller:
        supervisor = children(caller.pid)
        assert any(mounts_below(f"{GATES}/{pid}-") for pid in supervisor)
        for pid in supervisor:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: all(not one["State"]["Running"] for one in containers(engine)))
        wait_for(lambda: not any(mounts_below(f"{GATES}/{pid}-") for pid in supervisor))
        caller.kill()
    left = {one["Id"] for one in containers(engine)}
    assert gvisor().run(["true"]).ok
    assert not left & {one["Id"] for one in containers(engine)}
