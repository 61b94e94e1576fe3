"""Two jails at once: neither sees, signals, traces nor fills the other."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox import Sandbox
from sandbox.supervisor import polling
from tests.helpers.escape import BOUNDS, Errno, Jail

pytestmark = [pytest.mark.needs("jail")]

VICTIM = """
import json, os, signal, time
open("/tmp/victim", "w").write("secret of the victim")
open("/dev/shm/victim", "w").write("secret of the victim")
hit = []
for number in (1, 2, 3, 10, 12, 15, 28):
    signal.signal(number, lambda got, _: hit.append(got))
kinds = ["user", "mnt", "net", "pid", "ipc", "uts", "cgroup"]
print("ready", json.dumps([os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]), flush=True)
time.sleep(1.5)
print("hit" if hit else "unharmed", flush=True)
"""


@contextmanager
def victim(jail: Jail) -> Iterator[list[bytes]]:
    """A neighbour that says at the end whether anything reached it."""
    heard: list[bytes] = []
    with jail.box.stream(["python3", "-S", "-c", VICTIM]) as stream:
        pieces = iter(stream)
        heard.append(next(pieces)[1])
        assert heard[0].startswith(b"ready"), heard
        yield heard
        heard.extend(data for _, data in pieces)
        assert stream.outcome.ok, stream.outcome.stderr


def test_a_neighbours_processes_cannot_be_signalled(jail: Jail) -> None:
    script = """
import os, signal
reached = []
for pid in range(2, 2000):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGTERM)
            reached.append(pid)
        except ProcessLookupError:
            pass
print(reached)
"""
    with victim(jail) as heard:
        assert jail.run(["python3", "-S", "-c", script]).text == "[]\n"
        outcome = jail.run(["sh", "-c", "trap : TERM; kill -TERM -1; echo sent"])
        assert outcome.text == "sent\n"
    assert heard[-1] == b"unharmed\n"


def test_a_neighbours_processes_and_files_cannot_be_seen(jail: Jail) -> None:
    with victim(jail) as heard:
        found = jail.act(["pids"], ["identity"], ["exists", "/tmp/victim"], ["exists", "/dev/shm/victim"])
        assert found[0] == [found[1]["pid"]]
        assert found[2:] == [False, False]
    assert heard[-1] == b"unharmed\n"


def test_neighbours_share_no_namespace(jail: Jail) -> None:
    kinds = ["user", "mnt", "net", "pid", "ipc", "uts", "cgroup"]
    with victim(jail) as heard:
        theirs = json.loads(heard[0].split(b" ", 1)[1])
        ours = jail.act(*(["readlink", f"/proc/self/ns/{kind}"] for kind in kinds))
    assert not set(theirs) & set(ours)
    assert len(set(theirs)) == len(set(ours)) == len(kinds)


@pytest.mark.needs("root")
def test_neighbours_have_different_uids_outside(jail: Jail) -> None:
    """What a broken namespace would otherwise let through, the kernel's own permission checks stop."""
    with victim(jail), victim(jail):
        assert jail.box._link is not None
        uids = set()
        for pid in polling.descendants(jail.box._link.zygote_pid):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"secret of the victim" in command:
                uids.add(next(line for line in text.splitlines() if line.startswith("Uid:")))
    assert len(uids) == 2
    assert not any("\t0" in uid.split("Uid:")[1][:3] for uid in uids)


def test_nothing_of_one_call_is_there_in_the_next(jail: Jail) -> None:
    places = ["/tmp", "/var/tmp", "/home/user", "/dev/shm", "/workspace", "/dev/mqueue"]
    made = jail.act(*(["create", f"{place}/left"] for place in places[:-1]))
    assert made == [1] * 5
    found = jail.act(*(["listdir", place] for place in places))
    assert found == [[]] * 6


def test_what_a_function_changes_in_its_interpreter_is_not_there_in_the_next(state_root: Path) -> None:
    """Warm calls are forked from one process that has imported what they need; none of them writes to it."""

    def poison() -> list[int]:
        import builtins
        import json
        import os
        import sys
        import threading

        json.JSONEncoder.item_separator = "poisoned"
        builtins.sorted = lambda _: [42]
        sys.modules["base64"] = sys
        os.environ["LEFT"] = "behind"
        threading.Thread(target=lambda: None).start()
        return [os.getpid(), os.getuid()]

    def look() -> list[object]:
        import json
        import os

        text = __import__("base64").b64encode(b"x").decode()
        return [json.JSONEncoder.item_separator, sorted([2, 1]), os.environ.get("LEFT"), text]

    with Sandbox("python", state=state_root, **BOUNDS) as box:
        for _ in range(3):
            assert box.call(poison).unwrap()[1] == 1000
            assert box.call(look).unwrap() == [", ", [1, 2], None, "eA=="]


def test_two_jails_on_one_workspace_meet_only_there(jail: Jail, tmp_path: Path) -> None:
    """Who grants one directory to two calls joins them there, and nowhere else."""
    shared = tmp_path / "shared"
    shared.mkdir()
    overrides = {"workspace": str(shared), "workspace_mode": "rw"}
    assert jail.one("create", "note", **overrides) == 1
    assert jail.act(["read", "note"], ["exists", "/tmp/note"], **overrides) == ["x", False]
    assert (shared / "note").stat().st_uid == os.geteuid()
    assert jail.one("read", f"{shared}/note") == Errno("ENOENT")
