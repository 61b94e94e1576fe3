"""A supervisor that the command line forks has as little of it as one that is executed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox import link_fork
from sandbox._linux.child import Child

ROOT = Path(__file__).parents[2]
# Starts a supervisor as the command line does, and says what has become of it.
CODE = """
import json, os, sys
from sandbox import link
supervisor = link.shared(sys.argv[1])
os.environ["PLANTED"] = "in the caller's memory"
supervisor.start(forked=sys.argv[2] == "fork")
facts = json.loads(supervisor.facts_json())
def seen(pid):
    def of(path):
        try:
            return os.readlink(f"/proc/{pid}/{path}")
        except FileNotFoundError:
            return ""
    fds = {number: of(f"fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    status = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return {
        "streams": [fds.get(number) for number in "01"], "cwd": of("cwd"), "session": os.getsid(pid) == pid,
        "files": sorted({name.partition(":")[0] for name in fds.values() if name.startswith(("/tmp", "pipe"))}),
        "signals": [status[name].strip() for name in ("SigIgn", "SigBlk")], "umask": status["Umask"].strip(),
    }
zygote = open(f"/proc/{supervisor.zygote_pid}/environ").read()
print(json.dumps({
    "supervisor": seen(supervisor.supervisor_pid), "zygote": seen(supervisor.zygote_pid), "facts": facts,
    "zygote environ": zygote,
    "kind": type(supervisor._process).__name__,
    "command": open(f"/proc/{supervisor.zygote_pid}/cmdline").read(),
}))
link.release(supervisor)
"""


# Of a supervisor, which is not dumpable, only root sees these things.
@pytest.mark.needs("root", "jail")
def test_a_forked_supervisor_is_as_an_executed_one(tmp_path: Path) -> None:
    def start(way: str) -> dict[str, object]:
        with (tmp_path / "planted").open("w") as planted:
            os.set_inheritable(planted.fileno(), True)
            argv = [sys.executable, "-c", CODE, str(tmp_path / way), way]
            environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "HOME": str(tmp_path)}
            done = subprocess.run(
                argv, env=environment, capture_output=True, check=True, timeout=60, pass_fds=[planted.fileno()]
            )

        found: dict[str, object] = json.loads(done.stdout)
        return found

    forked, executed = start("fork"), start("exec")
    assert (forked.pop("kind"), executed.pop("kind")) == ("Child", "Popen")
    forked["command"], executed["command"] = (str(found["command"]).split("\0")[:5] for found in (forked, executed))
    assert forked == executed


def child(code: int) -> Child:
    pid = os.fork()
    if pid == 0:
        signal.pause() if code < 0 else os._exit(code)
    return Child(pid)


def test_its_end_is_waited_for_once() -> None:
    process = child(3)
    assert [process.wait(20), process.wait(0), process.poll(), process.returncode] == [3, 3, 3, 3]
    process.kill()


def test_one_that_stays_is_killed() -> None:
    process = child(-1)
    assert process.poll() is None
    with pytest.raises(TimeoutError):
        process.wait(0.01)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL


@contextlib.contextmanager
def thread() -> Iterator[None]:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    yield
    done.set()
    other.join()


def test_a_process_with_threads_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "gettrace", lambda: None)
    if threading.active_count() == 1:
        assert link_fork.is_possible()
    with thread():
        assert not link_fork.is_possible()


def test_what_fails_in_the_child_is_told_and_ends_it(tmp_path: Path) -> None:
    code = """
import socket, sys
from sandbox import link_fork
ours, theirs = socket.socketpair()
link_fork.os.setsid = lambda: 1 / 0
process = link_fork.start(theirs, sys.argv[1], {})
print("status", process.wait(20))
"""
    environment = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    argv = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "status 1\n"
    assert "ZeroDivisionError" in done.stderr
