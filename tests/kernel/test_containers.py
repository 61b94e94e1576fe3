"""Containers by crun, runc and nsjail around our own view: the same promises as the native jail's, by real runtimes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox import CallLost, Sandbox, ToolFailed
from sandbox.launchers import nsjail, oci
from sandbox.launchers.contract import Setting
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan
from sandbox.planner import Surroundings, decide
from sandbox.prepare import interpreter
from sandbox.spec import CallSpec
from sandbox.supervisor import identity
from sandbox.supervisor.attending import Attending
from tests.helpers.net_servers import Outside, echo
from tests.helpers.net_world import OTHER, WEB, run_in_world
from tests.helpers.waiting import awaited, eventually

pytestmark = [pytest.mark.needs("jail")]
WALLS: dict[str, dict[str, str]] = {
    "crun": {"launcher": "oci", "runtime": "crun"},
    "runc": {"launcher": "oci", "runtime": "runc"},
    "nsjail": {"launcher": "nsjail"},
}
# runc wants two uids, which an ordinary user does not have: the planner refuses it by that name.
NAMES = [pytest.param(name, marks=pytest.mark.needs(name, *(["root"] if name == "runc" else []))) for name in WALLS]
REPORT = """
import json, os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines() if ":\\t" in line)
print(json.dumps({
    "ids": [os.getuid(), os.getgid()],
    "caps": {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")},
    "no_new_privs": status["NoNewPrivs"], "seccomp": status["Seccomp"],
    "fds": sorted(os.listdir("/proc/self/fd"))[:-1], "host": os.uname().nodename,
    "cgroups": sorted({line.split(":", 2)[2].strip() for line in open("/proc/self/cgroup")}),
    "namespaces": {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns")},
    "env": sorted(os.environ), "pids": [name for name in os.listdir("/proc") if name.isdigit()],
    "interfaces": os.listdir("/proc/self/net/dev_snmp6") if os.path.isdir("/proc/self/net/dev_snmp6") else ["lo"],
    "nice": os.nice(0),
}))
"""


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def box(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    best_effort = ["memory", "cpus", "pids", "cpu_time"] if os.geteuid() else []
    with Sandbox("shell", state=tmp_path_factory.mktemp("state"), best_effort=best_effort, **WALLS[name]) as made:
        yield made


def test_a_container_is_sealed_as_a_jail_is(box: Sandbox, name: str) -> None:
    outcome = box.run(["python3", "-S", "-c", REPORT])
    assert outcome.ok, (outcome.ending, outcome.stderr)
    found = json.loads(outcome.stdout)
    assert found["ids"] == [1000, 1000]
    assert set(found["caps"].values()) == {0}
    assert (found["no_new_privs"], found["seccomp"]) == ("1", "2")
    assert found["fds"] == ["0", "1", "2"]
    assert found["host"] == "sandbox"
    assert found["cgroups"] == ["/"] or os.geteuid() != 0
    assert found["interfaces"] == ["lo"]
    assert found["nice"] == os.nice(0)
    assert "SUDO_USER" not in found["env"]
    assert "PYTEST_CURRENT_TEST" not in found["env"]
    # Only itself: pid 1 is hidden, as in a jail.
    assert len(found["pids"]) == 1
    for kind in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup"):
        assert found["namespaces"][kind] != os.readlink(f"/proc/self/ns/{kind}"), kind
    isolation = outcome.record.isolation
    assert isolation["launcher"] == WALLS[name]["launcher"]
    assert isolation.get("runtime", "") == WALLS[name].get("runtime", "")
    assert not isolation["missing"]
    assert {"seccomp", "landlock", "capabilities", "user_limits"} <= {*isolation["applied"]} | {
        step for step in ("landlock",) if not isolation["landlock_abi"]
    }


def test_a_function_runs_in_a_container_and_its_value_and_error_come_back(box: Sandbox) -> None:
    def divide(a: int, b: int) -> dict[str, Any]:
        import os

        print("divided")
        return {"value": a / b, "uid": os.getuid(), "pid_1": os.getpid() == 1}

    outcome = box.call(divide, 6, 3)
    assert (outcome.value, outcome.stdout) == ({"value": 2.0, "uid": 1000, "pid_1": False}, b"divided\n")
    with pytest.raises(ToolFailed, match="division by zero"):
        box.call(divide, 1, 0).unwrap()


def test_whose_fault_an_ending_was_is_told_apart(box: Sandbox) -> None:
    missing = box.run(["no-such-program"])
    own = box.run(["sh", "-c", "exit 127"])
    assert (missing.ending.exit_code, missing.ending.error_type) == (127, "OSError")
    assert (own.ending.exit_code, own.ending.error_type) == (127, "")
    killed = box.run(["sh", "-c", "kill -9 $$"])
    assert (killed.ending.kind, killed.ending.signal) == ("tool_error", 9)


def test_streams_directory_and_input_are_the_calls_own(box: Sandbox) -> None:
    outcome = box.run(["sh", "-c", "cat; pwd; echo e >&2; echo y > /workspace/out"], input=b"given", collect=["out"])
    assert (outcome.stdout, outcome.stderr) == (b"given/workspace\n", b"e\n")
    assert outcome.files == {"out": b"y\n"}
    refused = box.run(["sh", "-c", "echo x > /usr/x"])
    assert b"Read-only file system" in refused.stderr


@pytest.mark.needs("cgroup")
def test_limits_of_the_group_hold_the_container_and_are_told_from_its_own_failures(box: Sandbox) -> None:
    hungry = ["python3", "-S", "-c", "x = bytearray(200 << 20); print(len(x))"]
    over = box.run(hungry, memory="64MiB")
    assert over.ending.kind == "limit:memory"
    under = box.run(hungry, memory="512MiB")
    assert under.ok
    assert under.record.usage["memory_peak_bytes"] > 200 << 20
    # The runtime is not in the group: what is counted is the call's own.
    assert box.run(["true"], memory="512MiB").record.usage["memory_peak_bytes"] < 64 << 20
    fork = "import os\nn = 0\ntry:\n    while True:\n        n += os.fork() > 0 or os._exit(0)\nexcept OSError as e:\n"
    bombs = box.run(["python3", "-S", "-c", fork + "    print(e.errno, n)"], pids=12)
    assert bombs.stdout.split()[:1] == [b"11"], (bombs.ending, bombs.stderr)


def test_the_wall_time_ends_daemons_too(box: Sandbox) -> None:
    mark = f"{time.time_ns()}"
    script = f"(setsid sh -c 'trap \"\" TERM HUP; sleep 1{mark}' &) ; sleep 2{mark}"
    started = time.monotonic()
    outcome = box.run(["sh", "-c", script], wall_time="0.7s")
    assert outcome.ending.kind == "limit:wall_time"
    assert time.monotonic() - started < 10
    assert not _running(mark)


@pytest.mark.parametrize("mode", ["rw", "cow"])
def test_a_workspace_of_the_hosts_is_written_or_kept(box: Sandbox, name: str, tmp_path: Path, mode: str) -> None:
    del name
    (tmp_path / "a").write_text("old")
    script = "echo new > a; echo b > b; ls -ln a | cut -d' ' -f3"
    outcome = box.run(["sh", "-c", script], workspace=str(tmp_path), workspace_mode=mode)
    assert outcome.ok, outcome.stderr
    assert outcome.stdout == b"1000\n"
    if mode == "rw":
        assert ((tmp_path / "a").read_text(), (tmp_path / "b").stat().st_uid) == ("new\n", os.geteuid())
    else:
        assert (tmp_path / "a").read_text() == "old"
        assert outcome.changes is not None
        outcome.changes.commit()
        assert (tmp_path / "b").read_text() == "b\n"


def test_a_denied_file_stays_denied_below_a_granted_directory(box: Sandbox, tmp_path: Path) -> None:
    for file in (".env", "open"):
        (tmp_path / file).write_text(file)
    script = f"cat {tmp_path}/open; cat {tmp_path}/.env"
    outcome = box.run(["sh", "-c", script], read=[str(tmp_path)], deny=["**/.env"])
    assert outcome.stdout == b"open"
    assert b"Permission denied" in outcome.stderr


@pytest.mark.needs("x86_64")
def test_egress_goes_through_the_same_gateway_with_the_same_record(name: str) -> None:
    def body() -> Any:
        outside = Outside()
        for address in (WEB, OTHER):
            outside.serve(address, address, 7, echo)
        probe = (
            "import socket\n"
            "for host in ('www.example.test', 'no.example.test'):\n"
            "    try:\n"
            "        with socket.create_connection((host, 7), 5) as s:\n"
            "            s.sendall(b'hello'); s.shutdown(1); print(host, s.recv(9))\n"
            "    except OSError as error:\n"
            "        print(host, type(error).__name__)\n"
        )
        best = {"best_effort": ["memory", "cpus", "pids", "cpu_time"]} if os.geteuid() else {}
        with Sandbox("shell", **WALLS[name], **best) as box:
            allowed = box.run(["python3", "-c", probe], allow_hosts=["www.example.test:7"])
            nothing = box.run(["python3", "-c", probe])
        network = [(item["host"], item["proto"], item["decision"]) for item in allowed.record.network]
        return [
            allowed.stdout.decode(),
            network,
            nothing.stdout.decode(),
            [arrival.label for arrival in outside.reached],
            [str(allowed.ending), allowed.stderr.decode(), str(nothing.ending)],
        ]

    said, network, without, reached, how = run_in_world(body, {"www.example.test": WEB, "no.example.test": OTHER})
    assert said == "www.example.test b'hello'\nno.example.test gaierror\n", how
    assert ["no.example.test", "dns", "deny"] in network
    assert any(host == "www.example.test" and decision == "allow" for host, _, decision in network)
    assert "hello" not in without
    assert reached == [WEB]


def test_nothing_of_a_container_is_left_on_the_host(box: Sandbox, name: str) -> None:
    assert box.run(["true"]).ok
    assert box._link is not None
    supervisor = box._link.supervisor_pid
    before = _traces(name, supervisor)
    for _ in range(3):
        assert box.run(["sh", "-c", "exit 0"], wall_time="9s").ok
    # A standby may be on its way, and runc has a group of its own for as long as that takes.
    assert eventually(lambda: _traces(name, supervisor) <= before), _traces(name, supervisor) - before


def test_a_container_whose_makers_are_killed_ends_and_the_next_call_gets_another(box: Sandbox) -> None:
    mark = f"{time.time_ns()}"
    with box.stream(["sleep", f"3{mark}"]) as stream:
        tool = _wait_running(mark)
        attendant = _ancestor(tool, 2)
        os.kill(attendant, signal.SIGKILL)
        list(stream)
        outcome = stream.outcome
    assert outcome.ending.kind == "lost"
    assert not _running(mark)
    assert box.run(["true"]).ok


def test_a_killed_supervisor_takes_its_containers_with_it(name: str, tmp_path: Path) -> None:
    mark = f"{time.time_ns()}"
    best_effort = ["memory", "cpus", "pids", "cpu_time"] if os.geteuid() else []
    with Sandbox("shell", state=tmp_path, best_effort=best_effort, **WALLS[name]) as box:
        with box.stream(["sleep", f"4{mark}"]) as stream:
            _wait_running(mark)
            assert box._link is not None
            os.kill(box._link.supervisor_pid, signal.SIGKILL)
            with pytest.raises(CallLost):
                _ = stream.outcome
        assert eventually(lambda: not _running(mark))
        # The next one closes what is open and finds nothing in its way.
        assert box.run(["true"]).ok


# -- a kernel of its own ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gvisor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    settings: dict[str, Any] = {"launcher": "oci", "runtime": "runsc", "best_effort": ["pids"]}
    with Sandbox("shell", state=tmp_path_factory.mktemp("state"), **settings) as made:
        yield made


@pytest.mark.needs("runsc", "root")
def test_a_tool_in_gvisor_has_another_kernel_and_the_same_ways_in_and_out(gvisor: Sandbox) -> None:
    script = "id -u; uname -r; cat; echo e >&2; echo y > out; echo x > /usr/x; exit 3"
    outcome = gvisor.run(["sh", "-c", script], input=b"given\n", collect=["out"])
    assert outcome.exit_code == 3, (outcome.ending, outcome.stderr)
    uid, release, given = outcome.stdout.decode().split()
    assert (uid, given) == ("1000", "given")
    assert release != os.uname().release
    assert outcome.stderr.startswith(b"e\n")
    assert b"Permission denied" in outcome.stderr
    assert outcome.files == {"out": b"y\n"}
    assert outcome.record.isolation["grade"] == "userspace-kernel"
    assert not outcome.record.isolation["missing"]


@pytest.mark.needs("runsc", "root")
def test_functions_refusals_and_signals_in_gvisor_end_as_elsewhere(gvisor: Sandbox) -> None:
    def double(a: int) -> dict[str, int]:
        return {"value": a * 2}

    assert gvisor.call(double, 4).value == {"value": 8}
    missing = gvisor.run(["no-such-program"])
    assert (missing.ending.exit_code, missing.ending.error_type) == (127, "OSError")
    killed = gvisor.run(["sh", "-c", "kill -9 $$"])
    assert (killed.ending.kind, killed.ending.signal) == ("tool_error", 9)
    refusal = "import ctypes; c = ctypes.CDLL(None, use_errno=True); c.ptrace(16, 1, 0, 0); print(ctypes.get_errno())"
    assert gvisor.run(["python3", "-S", "-c", refusal]).stdout == b"1\n"


@pytest.mark.needs("runsc", "root", "cgroup")
def test_limits_hold_gvisor_and_its_tool_together(gvisor: Sandbox) -> None:
    hungry = ["python3", "-S", "-c", "x = bytearray(300 << 20); print(len(x))"]
    over = gvisor.run(hungry, memory="200MiB")
    assert over.ending.kind == "limit:memory", over.ending
    assert gvisor.run(hungry, memory="800MiB").ok
    started = time.monotonic()
    assert gvisor.run(["sleep", "60"], wall_time="2s").ending.kind == "limit:wall_time"
    assert time.monotonic() - started < 20


# -- faults of a runtime: stand-ins for its program, in place of the real one ----------------------------------------

RUNTIMES_SAY = {
    "missing": ("", "is not installed"),
    "refuses": ("#!/bin/sh\necho 'bundle: cannot parse' >&2\nexit 3\n", "status 3 and said: bundle: cannot parse"),
    "crashes": ("#!/bin/sh\nkill -SEGV $$\n", "signal 11 and said: nothing"),
    "is no program": ("#!/no/such/interpreter\n", "status 127 and said: FileNotFoundError"),
}


@pytest.mark.parametrize("how", RUNTIMES_SAY)
@pytest.mark.parametrize("wall", ["crun", "nsjail"])
def test_a_runtime_that_fails_fails_the_step_that_it_was_at(short_path: Path, wall: str, how: str) -> None:
    script, says = RUNTIMES_SAY[how]
    program = ""
    if script:
        program = f"{short_path}/runtime"
        Path(program).write_text(script)
        os.chmod(program, 0o755)
    os.chmod(short_path, 0o755)
    failure = asyncio.run(_failure(wall, program, short_path))
    assert says in failure["message"]
    assert failure["step"] == "create"


async def _failure(wall: str, program: str, state: Path) -> dict[str, Any]:
    flavour = replace(nsjail.NSJAIL if wall == "nsjail" else oci.FLAVOURS["crun"], find=lambda: program)
    uids = identity.host_uids()
    launcher = Attending("oci", {"crun": flavour, "": flavour, "runsc": flavour}, Setting(state, None, "test", uids))
    try:
        try:
            jail = launcher.make(launcher.kind(_plan(wall)))
        except Exception as error:  # noqa: BLE001 - it is what is looked at
            return {"message": str(error), "step": getattr(error, "step", "")}
        await asyncio.wait_for(jail.ready.wait(), 20)
        failure = dict(jail.failure)
        await asyncio.wait_for(jail.wait_dead(), 20)
        jail.close()
        return failure
    finally:
        launcher.close()


def _plan(wall: str) -> LaunchPlan:
    from tests.conftest import facts

    known = replace(facts(), runtimes={"crun": "/crun", "nsjail": "/nsjail"})
    manifest = Manifest(
        isolation={**WALLS[wall], "best_effort": ("memory", "cpus", "pids", "cpu_time", "io")},
    )
    call = CallSpec(kind="program", argv=("true",), tool="true")
    plan = decide(manifest, call, known, Surroundings(python_paths=interpreter().paths))
    return replace(plan, limits=())


# -- what the host shows of it ----------------------------------------------------------------------------------------


def _running(mark: str) -> list[int]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[0] == b"sleep" and mark.encode() in b"".join(argv):
            found.append(int(pid))
    return found


def _wait_running(mark: str) -> int:
    return awaited(lambda: _running(mark))[0]


def _ancestor(pid: int, count: int) -> int:
    for _ in range(count):
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return pid


def _traces(name: str, supervisor: int) -> set[str]:
    """Where a runtime would leave something: its own directories, ours, mounts, and cgroups below the calls'."""
    places = [f"/run/{name}", f"/run/user/{os.geteuid()}/{name}", "/run/user", "/tmp", "/dev/shm", "/sys/kernel"]
    found = {f"{place}/{entry}" for place in places if os.access(place, os.R_OK) for entry in os.listdir(place)}
    found = {path for path in found if name in path or path.endswith(("/bundle", "/container"))}
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    own = f"/toolcall-sandbox-{supervisor}-"
    groups = {f"{root}/call" for root, names, _ in os.walk("/sys/fs/cgroup") if own in root and "call" in names}
    return found | groups | {path for path in mounts if path.startswith(("/sys/kernel/", "/run/"))}
