"""`Sandbox` as a caller sees it: calls from threads, loops and forked children, their ends, and what comes out."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sandbox import ManifestError, Outcome, ProfileError, Sandbox, Unenforceable
from sandbox.audit.store import iter_entries
from sandbox.launchers.zygote import Zygote
from tests.helpers.escape import TIME_FACTOR
from tests.helpers.waiting import eventually

pytestmark = [pytest.mark.needs("jail")]


def is_running(mark: str) -> bool:
    """Whether any process of this machine has `mark` among its arguments, inside a jail or not."""
    needle = mark.encode()
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(pid) != os.getpid() and needle in arguments:
            return True
    return False


def closed_records(state: Path) -> list[dict[str, Any]]:
    return [entry for entry in iter_entries(state) if entry.get("entry") == "closed"]


def record_of_mark(state: Path, mark: str) -> dict[str, Any]:
    """The closed record of the call whose arguments hold `mark`. The supervisor writes it when all is over."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [r for r in closed_records(state) if mark in (r.get("command") or {}).get("argv", [])]
        return bool(found)

    assert eventually(look), "no closed record"
    return found[0]


@pytest.fixture
def mark() -> str:
    return f"mark-{uuid.uuid4().hex}"


def sleeper(mark: str) -> list[str]:
    # A child that has left the session and ignores signals: only the end of the jail ends it.
    script = "trap '' TERM INT HUP; (setsid sleep 300 & setsid sh -c 'sleep 300' $0 &); echo up; sleep 300"
    return ["sh", "-c", script, mark]


# -- run, arun, stream ----------------------------------------------------------------------------------------------


def test_run_gives_output_exit_code_and_record(box: Sandbox) -> None:
    done = box.run(["sh", "-c", "echo out; echo err >&2; exit 3"], why="to see")
    assert (done.stdout, done.stderr, done.exit_code, done.ok) == (b"out\n", b"err\n", 3, False)
    assert (done.ending.kind, done.ending.fault) == ("tool_error", "tool")
    assert done.record.context.why == "to see"
    assert done.record.command.argv == ("sh", "-c", "echo out; echo err >&2; exit 3")
    assert {"seccomp", "no_new_privs", "exec"} <= set(done.record.isolation.applied)


def test_run_passes_input_environment_and_directory(box: Sandbox) -> None:
    assert box.run(["cat"], input="text").stdout == b"text"
    assert box.run(["cat"], input=b"\0\xff").stdout == b"\0\xff"
    assert box.run(["printenv", "GIVEN"], env={"GIVEN": "value"}).text == "value\n"
    assert box.run(["printenv", "GIVEN"]).exit_code == 1
    assert box.run(["pwd"], cwd="/tmp").text == "/tmp\n"
    assert box.run(["pwd"]).text == "/workspace\n"
    for cwd, code, why in (("/none", 127, "No such file or directory"), ("/etc/passwd", 126, "Not a directory")):
        ending = box.run(["pwd"], cwd=cwd).ending
        assert (ending.exit_code, ending.message) == (code, f"it cannot start in {cwd!r}: {why}")
    with pytest.raises(ManifestError, match="cwd: 'sub' is not an absolute path inside"):
        box.run(["pwd"], cwd="sub")


def test_overrides_of_one_call_hold_for_that_call_alone(box: Sandbox) -> None:
    def limit() -> list[str]:
        return ["sh", "-c", "ulimit -n"]

    assert box.run(limit(), open_files=77).text == "77\n"
    assert box.run(limit()).text == "1024\n"
    assert box.run(["printenv", "A"], env_set={"A": "b"}).text == "b\n"


def test_collected_files_come_out_as_bytes_and_nothing_else_does(box: Sandbox) -> None:
    script = "mkdir out; echo 1 > out/a.json; echo 2 > out/b.txt; ln -s /etc/passwd out/link.json"
    done = box.run(["sh", "-c", script], collect=["out/*.json"])
    assert done.files == {"out/a.json": b"1\n"}
    assert [item.path for item in done.record.files.skipped] == ["out/link.json"]
    assert box.run(["sh", "-c", script]).files == {}


def test_a_program_that_is_not_there_or_not_executable_is_the_tools_error(box: Sandbox) -> None:
    for argv, code in ((["/no/such"], 127), (["no-such-program"], 127), (["/etc/passwd"], 126), (["/tmp"], 126)):
        done = box.run(argv)
        assert (done.exit_code, done.ending.kind, done.ending.fault) == (code, "tool_error", "tool"), argv
    assert box.run(["sh", "-c", "no-such-program"]).exit_code == 127
    assert box.run(["/no/such"]).ending.message == "there is no such program inside"


def test_wrong_arguments_raise_before_anything_runs(box: Sandbox, mark: str) -> None:
    before = len(closed_records(box.state))
    for argv in ([], "a string", ["nul\0"], [1]):
        with pytest.raises(ManifestError, match="argv"):
            box.run(argv)  # type: ignore[arg-type]
    for wrong in ({"memory": "lots"}, {"no_such": 1}, {"pids": 0}, {"wall_time": "-1s"}, {"read": ["/no/such/path"]}):
        with pytest.raises(ManifestError):
            box.run(["touch", mark], **wrong)
    with pytest.raises(ProfileError, match="no-such-profile"):
        Sandbox("no-such-profile", state=box.state)
    assert len(closed_records(box.state)) == before


def test_a_refused_call_raises_with_its_record_and_nothing_runs(box: Sandbox, mark: str) -> None:
    with pytest.raises(Unenforceable) as caught:
        box.run(["true", mark], **{"isolation.minimum": "microvm"})
    assert "isolation" in caught.value.controls
    record = caught.value.record
    assert (record.ending.kind, record.ending.fault, record.entry) == ("refused", "host", "closed")
    assert record_of_mark(box.state, mark)["record_id"] == record.record_id
    assert box.run(["true"]).ok


def test_stream_gives_output_as_it_comes(box: Sandbox) -> None:
    with box.stream(["sh", "-c", "echo one; read x; echo $x >&2; exit 4"], input="two\n") as stream:
        assert sorted(stream) == [("stderr", b"two\n"), ("stdout", b"one\n")]
        assert stream.outcome.exit_code == 4
        assert stream.outcome is stream.outcome


def test_stream_is_live_and_takes_signals(box: Sandbox) -> None:
    started = time.monotonic()
    with box.stream(["sh", "-c", "trap 'echo caught; exit 9' TERM; echo up; while :; do sleep 0.05; done"]) as stream:
        for name, data in stream:
            if b"up" in data:
                assert name == "stdout"
                stream.signal(signal.SIGTERM)
        assert stream.outcome.exit_code == 9
    assert time.monotonic() - started < 10


def test_leaving_a_stream_early_ends_the_call(box: Sandbox, mark: str) -> None:
    with box.stream(sleeper(mark)) as stream:
        next(iter(stream))
        assert is_running(mark)
    ending = record_of_mark(box.state, mark)["ending"]
    assert (ending["kind"], ending["fault"]) == ("killed", "caller")
    assert not is_running(mark)


# -- threads, loops, cancellation -----------------------------------------------------------------------------------


def test_thirty_two_threads_call_at_once(box: Sandbox) -> None:
    def work(number: int) -> list[str]:
        return [box.run(["echo", f"{number}.{serial}"]).text.strip() for serial in range(3)]

    with ThreadPoolExecutor(32) as pool:
        results = [line for lines in pool.map(work, range(32)) for line in lines]
    assert results == [f"{number}.{serial}" for number in range(32) for serial in range(3)]


def test_two_hundred_calls_of_one_event_loop_complete(box: Sandbox) -> None:
    async def main() -> list[Outcome]:
        return await asyncio.gather(*(box.arun(["sh", "-c", f"sleep 0.05; echo {n}"]) for n in range(200)))

    done = asyncio.run(main())
    assert [outcome.text for outcome in done] == [f"{n}\n" for n in range(200)]
    assert len({outcome.record.record_id for outcome in done}) == 200


def test_the_event_loop_goes_on_while_calls_run(box: Sandbox) -> None:
    async def main() -> float:
        worst = 0.0
        call = asyncio.ensure_future(box.arun(["sleep", "0.5"]))
        while not call.done():
            before = time.monotonic()
            await asyncio.sleep(0.01)
            worst = max(worst, time.monotonic() - before)
        assert call.result().ok
        return worst

    box.run(["true"])
    assert asyncio.run(main()) < 0.4


def test_cancelling_arun_ends_the_call(box: Sandbox, mark: str) -> None:
    async def main() -> None:
        call = asyncio.ensure_future(box.arun(sleeper(mark)))
        assert await asyncio.to_thread(eventually, lambda: is_running(mark))
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.arun(sleeper(mark + "-2")), 0.3)

    asyncio.run(main())
    for each in (mark, mark + "-2"):
        ending = record_of_mark(box.state, each)["ending"]
        assert (ending["kind"], ending["fault"]) == ("killed", "caller")
        assert not is_running(each)


def test_a_child_forked_meanwhile_does_not_keep_a_cancelled_call_alive(tmp_path: Path, mark: str) -> None:
    body = """
    import asyncio
    async def main(box):
        call = asyncio.ensure_future(box.arun(["sh", "-c", script, mark]))
        await asyncio.sleep(0.5)
        pid = os.fork()
        if pid == 0:
            signal.pause()
        call.cancel()
        await asyncio.wait([call])
        print(call.cancelled(), flush=True)
        sys.stdin.read()
        os.kill(pid, signal.SIGKILL)
    with Sandbox("shell", state=state) as box:
        box.run(["true"])
        asyncio.run(main(box))
    """
    with child(tmp_path, mark, body) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        assert record_of_mark(tmp_path / "state", mark)["ending"]["kind"] == "killed"
        assert not is_running_inside(mark)
        process.communicate()


def test_closing_the_sandbox_ends_its_calls(tmp_path: Path, mark: str) -> None:
    with Sandbox("shell", state=tmp_path) as box:
        box.run(["true"])
        thread = threading.Thread(target=lambda: box.run(sleeper(mark)))
        thread.start()
        assert eventually(lambda: is_running(mark))
    thread.join(15)
    assert not thread.is_alive()
    assert record_of_mark(tmp_path, mark)["ending"]["kind"] == "killed"
    assert not is_running(mark)


# -- callers that are interrupted, fork, or die ---------------------------------------------------------------------

CALLER = """
import os, signal, sys, threading, time
from sandbox import Sandbox
state, mark = sys.argv[1:]
script = "(trap '' INT TERM; setsid sleep 300 &); sleep 300"
"""


def child(tmp_path: Path, mark: str, body: str) -> subprocess.Popen[str]:
    """A Python process of its own that runs `body` after the lines above."""
    program = CALLER + textwrap.dedent(body)
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "state"), mark],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        start_new_session=True,
    )


def test_a_keyboard_interrupt_in_run_ends_the_call(tmp_path: Path, mark: str) -> None:
    body = """
    with Sandbox("shell", state=state) as box:
        try:
            box.run(["sh", "-c", script, mark])
        except KeyboardInterrupt:
            print("interrupted", flush=True)
        print(box.run(["echo", "still works"]).text, flush=True)
    """
    with child(tmp_path, mark, body) as process:
        assert eventually(lambda: is_running_inside(mark), 20)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30 * TIME_FACTOR)
    assert out.split("\n")[:2] == ["interrupted", "still works"]
    assert record_of_mark(tmp_path / "state", mark)["ending"]["kind"] == "killed"
    assert not is_running(mark)


def is_running_inside(mark: str) -> bool:
    """The caller itself has the mark among its arguments, so look for the shell's."""
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in arguments and arguments[0] == b"sh":
            return True
    return False


def test_a_caller_that_dies_takes_its_calls_along(tmp_path: Path, mark: str) -> None:
    body = """
    with Sandbox("shell", state=state) as box:
        box.run(["sh", "-c", script, mark])
    """
    with child(tmp_path, mark, body) as process:
        assert eventually(lambda: is_running_inside(mark), 20)
        process.kill()
        process.communicate()
    ending = record_of_mark(tmp_path / "state", mark)["ending"]
    assert (ending["kind"], ending["fault"]) == ("killed", "caller")
    assert eventually(lambda: not is_running(mark))


def test_forked_children_get_supervisors_of_their_own_and_the_parent_keeps_its(tmp_path: Path, mark: str) -> None:
    body = """
    def pids(box):
        return box._link.supervisor_pid
    with Sandbox("shell", state=state) as box:
        assert box.run(["true"]).ok
        first = pids(box)
        children = []
        for n in range(2):
            read_end, write_end = os.pipe()
            pid = os.fork()
            if pid == 0:
                text = box.run(["echo", f"child {n}"]).text.strip()
                os.write(write_end, f"{text} {pids(box) != first}".encode())
                box.close()
                os._exit(0)
            os.close(write_end)
            assert box.run(["echo", "parent"]).text == "parent\\n"
            children.append((pid, read_end))
        for pid, read_end in children:
            print(os.read(read_end, 100).decode(), os.waitpid(pid, 0)[1])
        print(box.run(["true"]).ok, pids(box) == first)
    """
    with child(tmp_path, mark, body) as process:
        out, _ = process.communicate(timeout=60 * TIME_FACTOR)
    assert out.splitlines() == ["child 0 True 0", "child 1 True 0", "True True"]


def _in_worker(arguments: tuple[str, int]) -> tuple[str, int, int]:
    state, number = arguments
    with Sandbox("shell", state=state) as box:
        text = box.run(["echo", str(number)]).text.strip()
        assert box._link is not None
        return text, box._link.supervisor_pid, os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_multiprocessing_workers_call_too(box: Sandbox, method: str) -> None:
    box.run(["true"])
    with multiprocessing.get_context(method).Pool(2) as pool:
        results = pool.map(_in_worker, [(str(box.state), n) for n in range(6)])
        pool.close()
        pool.join()
    assert [text for text, _, _ in results] == [str(n) for n in range(6)]
    assert box._link is not None
    assert box._link.supervisor_pid not in {supervisor for _, supervisor, _ in results}
    assert box.run(["true"]).ok


def test_a_supervisor_that_died_is_started_anew(tmp_path: Path) -> None:
    with Sandbox("shell", state=tmp_path) as box:
        assert box.run(["true"]).ok
        link = box._link
        assert link is not None
        first = link.supervisor_pid
        os.kill(first, signal.SIGKILL)
        eventually(lambda: link._process is not None and link._process.poll() is not None)
        assert box.run(["true"]).ok
        assert link.supervisor_pid != first


# -- workspaces -----------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = tmp_path / "project"
    (root / ".git" / "hooks").mkdir(parents=True)
    (root / "a.txt").write_text("a\n")
    (root / "b.txt").write_text("b\n")
    return root


CHANGE = "set -e; cat a.txt b.txt; echo new > new.txt; echo A >> a.txt; rm b.txt"


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_a_private_workspace_is_empty_and_gone_afterwards(box: Sandbox, project: Path) -> None:
    assert box.run(["sh", "-c", "ls -A; echo x > left"]).stdout == b""
    done = box.run(["sh", "-c", f"ls -A; ls {project}"])
    assert (done.stdout, done.exit_code) == (b"", 2)


def test_a_read_only_workspace_can_be_read_and_not_written(box: Sandbox, project: Path) -> None:
    done = box.run(["sh", "-c", CHANGE], workspace=str(project), workspace_mode="ro")
    assert done.stdout == b"a\nb\n"
    assert b"Read-only file system" in done.stderr
    assert names(project) == {"a.txt", "b.txt"}


def test_a_writable_workspace_is_the_hosts_own(box: Sandbox, project: Path) -> None:
    done = box.run(["sh", "-c", CHANGE + "; pwd"], workspace=str(project), workspace_mode="rw")
    assert done.text == f"a\nb\n{project}\n"
    assert names(project) == {"a.txt", "new.txt"}
    info = (project / "new.txt").stat()
    assert (info.st_uid, info.st_gid) == (os.geteuid(), os.getegid())
    assert sorted(item.path for item in done.record.files.written) == ["a.txt", "new.txt"]
    assert [item.path for item in done.record.files.deleted] == ["b.txt"]


@pytest.mark.needs("overlay")
def test_a_cow_workspace_is_committed_or_discarded_by_the_caller(box: Sandbox, project: Path) -> None:
    def change() -> Any:
        done = box.run(["sh", "-c", CHANGE], workspace=str(project), workspace_mode="cow")
        assert done.ok, done.stderr
        assert names(project) == {"a.txt", "b.txt"}
        return done.changes

    changes = change()
    assert [c.path for c in changes.added] == ["new.txt"]
    assert [c.path for c in changes.modified] == ["a.txt"]
    assert [c.path for c in changes.deleted] == ["b.txt"]
    changes.discard()
    assert names(project) == {"a.txt", "b.txt"}
    assert change().commit().complete
    assert names(project) == {"a.txt", "new.txt"}
    assert (project / "a.txt").read_text() == "a\nA\n"
    assert (project / "new.txt").stat().st_uid == os.geteuid()


@pytest.mark.parametrize("mode", ["rw", "cow"])
def test_a_git_hook_cannot_be_planted(box: Sandbox, project: Path, mode: str) -> None:
    plant = "echo '#!/bin/sh' > .git/hooks/pre-commit; chmod +x .git/hooks/pre-commit; echo x > plain"
    done = box.run(["sh", "-c", plant], workspace=str(project), workspace_mode=mode)
    if mode == "cow":
        result = done.changes.commit()
        assert ".git/hooks/pre-commit" in {path for path, _ in result.protected}
    assert not (project / ".git" / "hooks" / "pre-commit").exists()
    assert (project / "plain").exists()


# -- the record -----------------------------------------------------------------------------------------------------


def test_the_record_says_what_ran_under_what_and_how_it_ended(box: Sandbox) -> None:
    done = box.run(["sh", "-c", "echo hello; head -c 3000000 /dev/zero > big"], env={"NAMED": "secret-value"}, why="w")
    record = done.record.to_json()
    assert record["tool"]["name"] == "sh"
    assert record["policy"]["profile"] == "shell"
    assert record["policy"]["resolved_manifest"]["resources"]["pids"] == 256
    assert "NAMED" in record["command"]["env_names"]
    assert "secret-value" not in json.dumps(record)
    assert "hello" not in json.dumps(record).replace("echo hello", "")
    assert record["output"]["stdout_bytes"] == 6
    assert record["usage"]["disk_used_bytes"] >= 3_000_000
    assert record["usage"]["cpu_user_s"] + record["usage"]["cpu_system_s"] > 0
    assert record["usage"]["memory_peak_bytes"] > 100_000
    assert record["time"]["duration_s"] > 0
    assert set(record["enforcement"]) >= {"memory", "pids", "cpus", "disk", "network", "filesystem", "syscalls"}
    assert record["principal"]["uid"] == os.getuid()
    assert [r for r in closed_records(box.state) if r["record_id"] == record["record_id"]] == [record]


def test_a_zygote_whose_supervisor_did_not_come_up_ends_without_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    zygote = Zygote.begin()
    zygote._control.close()
    assert zygote._process.wait(60) == 0
    assert capfd.readouterr().err == ""
