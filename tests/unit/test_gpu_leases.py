"""Leases across processes: exclusive, all or none, and gone with their holder however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.errors import LaunchError
from sandbox.gpu import owners
from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.leases import Leases, default_directory

ONE, TWO = GpuUnit("GPU-1", "0"), GpuUnit("GPU-2", "1")
LEFT, RIGHT = GpuUnit("MIG-a", "2:0", parent="GPU-3"), GpuUnit("MIG-b", "2:1", parent="GPU-3")
WHOLE = GpuUnit("GPU-3", "2")
ROOT = str(Path(owners.__file__).resolve().parents[2])

HOLD = """
import sys, time; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.leases import Leases
lease, = Leases(Path(sys.argv[2])).acquire([GpuUnit("GPU-1", "0")], 1, {"pid": 77, "call_id": "theirs"})
lease.note(power_before_mw=300000)
print("held", flush=True); time.sleep(60)
"""


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    return Leases(tmp_path / "gpu")


def test_a_lease_is_exclusive_until_it_is_released(leases: Leases) -> None:
    first = leases.acquire([ONE, TWO], 1, {"pid": 1, "call_id": "a"})
    second = leases.acquire([ONE, TWO], 1, {"pid": 1, "call_id": "b"})
    assert [lease.unit for lease in (*first, *second)] == [ONE, TWO]
    with pytest.raises(
        LaunchError, match="GPU 0 is leased by call a of process 1; GPU 1 is leased by call b"
    ) as caught:
        leases.acquire([ONE, TWO], 1, {})
    assert caught.value.step == "gpu_lease"
    assert leases.holders([ONE, TWO, WHOLE]) == {
        "GPU-1": {"pid": 1, "call_id": "a"},
        "GPU-2": {"pid": 1, "call_id": "b"},
    }
    first[0].release()
    first[0].release()
    assert [lease.unit for lease in leases.acquire([ONE, TWO], 1, {})] == [ONE]
    second[0].release()


def test_all_or_none(leases: Leases) -> None:
    held = leases.acquire([TWO], 1, {"pid": 1})
    with pytest.raises(LaunchError):
        leases.acquire([ONE, TWO], 2, {})
    assert list(leases.holders([ONE, TWO])) == ["GPU-2"], "the half that was free is free again"
    held[0].release()
    both = leases.acquire([ONE, TWO], 2, {})
    assert len(both) == 2
    for lease in both:
        lease.release()


def test_slices_stand_in_the_way_of_their_gpu_and_not_of_each_other(leases: Leases) -> None:
    left, right = leases.acquire([LEFT], 1, {"call_id": "l"}), leases.acquire([RIGHT], 1, {"call_id": "r"})
    with pytest.raises(LaunchError):
        leases.acquire([WHOLE], 1, {})
    left[0].release()
    with pytest.raises(LaunchError):
        leases.acquire([WHOLE], 1, {})
    right[0].release()
    whole = leases.acquire([WHOLE], 1, {})
    with pytest.raises(LaunchError):
        leases.acquire([LEFT], 1, {})
    whole[0].release()


def test_a_holder_that_is_killed_leaves_the_unit_free_and_a_note(leases: Leases) -> None:
    argv = [sys.executable, "-I", "-c", HOLD, ROOT, str(leases.directory)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LaunchError, match="GPU 0 is leased by call theirs of process 77"):
            leases.acquire([ONE], 1, {})
        holder.send_signal(signal.SIGKILL)
    (lease,) = leases.acquire([ONE], 1, {"pid": 1})
    assert lease.left["power_before_mw"] == 300000, "what has to be put back"
    lease.release()
    (again,) = leases.acquire([ONE], 1, {})
    assert again.left == {}, "once"
    again.abandon()


def test_half_a_note_is_no_error(leases: Leases) -> None:
    leases.acquire([ONE], 1, {})[0].release()
    next(leases.directory.glob("*.lease")).write_text('{"pid": 1, "cal')
    (lease,) = leases.acquire([ONE], 1, {})
    assert lease.left == {}
    lease.release()


def test_a_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "gpu"
    directory.mkdir(mode=0o777)
    directory.chmod(0o777)
    with pytest.raises(LaunchError, match="not a directory of ours alone"):
        Leases(directory).acquire([ONE], 1, {})
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(LaunchError, match="not a directory of ours alone"):
        Leases(tmp_path / "link").acquire([ONE], 1, {})


def test_names_of_devices_do_not_become_paths(leases: Leases) -> None:
    (lease,) = leases.acquire([GpuUnit("../../etc/x", "0")], 1, {})
    assert [path.name for path in leases.directory.glob("*.lease")] == ["______etc_x.lease"]
    lease.release()


def test_supervisors_of_one_user_share_a_place() -> None:
    directory = default_directory()
    assert directory.name == "gpu"
    assert (str(directory) == "/run/toolcall-sandbox/gpu") == (os.geteuid() == 0)


# -- whose process -----------------------------------------------------------------------------------------------


def test_a_process_is_found_by_descent_where_there_are_no_cgroups() -> None:
    with subprocess.Popen(["sh", "-c", "sleep 30 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        child = int(shell.stdout.readline())
        later = owners.boot_time_s() + 1
        assert owners.jail_of(child, "", {shell.pid: "jail-1"}, later) == "jail-1"
        assert owners.jail_of(child, "", {os.getpid(): "jail-2"}, later) == "jail-2"
        assert owners.jail_of(child, "", {}, later) is None
        assert owners.jail_of(os.getpid(), "", {shell.pid: "jail-1"}, later) is None
        os.kill(child, signal.SIGKILL)
        shell.kill()
    assert owners.jail_of(child, "", {shell.pid: "jail-1"}, later) is None


def test_a_pid_that_was_used_again_since_is_not_believed() -> None:
    asked_at_s = owners.boot_time_s()
    with subprocess.Popen(["sleep", "30"]) as late:
        assert owners.jail_of(late.pid, "", {late.pid: "jail-1"}, asked_at_s) is None
        assert owners.jail_of(late.pid, "", {late.pid: "jail-1"}, owners.boot_time_s() + 0.1) == "jail-1"
        late.kill()


def test_a_process_outside_every_call_is_nobodys() -> None:
    assert owners.call_of(1) is None
    assert owners.jail_of(1, "toolcall-sandbox-1-1", {}, owners.boot_time_s()) is None
    assert owners.call_of(1 << 30) is None
    assert json.dumps(owners.jail_of(1 << 30, "x", {}, 0.0)) == "null"
