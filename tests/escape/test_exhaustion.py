"""Using up what belongs to all: tasks, memory of every kind, files, CPU, descriptors. Each bounded twice over."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from sandbox import Outcome
from tests.helpers.escape import TIME_FACTOR, Jail

pytestmark = [pytest.mark.needs("jail")]

MIB = 1 << 20


def python(jail: Jail, script: str, **overrides: Any) -> Outcome:
    return jail.run(["python3", "-S", "-c", script], **overrides)


def test_a_fork_bomb_meets_its_limit(jail: Jail) -> None:
    script = """
import errno, os, time
made, answer = 0, ""
while made < 500:
    try:
        pid = os.fork()
    except OSError as error:
        answer = errno.errorcode[error.errno]
        break
    if pid == 0:
        time.sleep(5)
        os._exit(0)
    made += 1
print(made, answer)
"""
    outcome = python(jail, script, pids=16)
    made, answer = outcome.text.split()
    assert (int(made), answer) == (15, "EAGAIN")
    assert python(jail, script.replace("500", "15"), pids=16).text == "15 \n"


def test_threads_count_as_tasks(jail: Jail) -> None:
    script = """
import threading, time
made = 0
try:
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(3,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
print(made, flush=True)
import os; os._exit(0)
"""
    assert int(python(jail, script, pids=16).text) == 15


def test_a_classic_fork_bomb_harms_nobody(jail: Jail) -> None:
    started = time.monotonic()
    outcome = jail.run(["bash", "-c", ":(){ :|:& };:; sleep 20"], pids=32, wall_time="1.5s")
    assert outcome.ending.kind in ("limit:wall_time", "tool_error", "ok")
    assert time.monotonic() - started < 15 * TIME_FACTOR
    assert jail.run(["echo", "alive"]).text == "alive\n"


MEMORY = {
    "heap": """
held = []
while True: held.append(bytearray(b"x") * (4 << 20))""",
    "shared-mapping": """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 4 << 20))
    held[-1].write(b"x" * (4 << 20))""",
    "many-processes": """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(b"x") * (24 << 20)
        time.sleep(20)
time.sleep(20)""",
    "tmpfs": """
held = open("/tmp/big", "wb", buffering=0)
while True: held.write(b"x" * (1 << 20))""",
    "dev-shm": """
held = open("/dev/shm/big", "wb", buffering=0)
while True: held.write(b"x" * (1 << 20))""",
}
# Memory that no process maps is not seen by polling (docs/threat-model.md).
UNMAPPED = {
    "memfd": """
import os
fd = os.memfd_create("x")
while True: os.write(fd, b"x" * (1 << 20))""",
    "sysv": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
for _ in range(64):
    at = libc.shmat(libc.shmget(0, 4 << 20, 0o600), None, 0)
    ctypes.memset(at, 1, 4 << 20)
    libc.shmdt(ctypes.c_void_p(at))""",
    "pipes": """
import os, fcntl
held = []
while True:
    held.append(os.pipe())
    fcntl.fcntl(held[-1][1], 1031, 1 << 20)
    os.write(held[-1][1], b"x" * (1 << 20))""",
}


@pytest.mark.parametrize("kind", MEMORY)
def test_memory_of_every_kind_meets_its_limit(jail: Jail, kind: str) -> None:
    outcome = python(jail, MEMORY[kind], memory="64MiB", disk="256MiB", wall_time=f"{15 * TIME_FACTOR}s")
    assert (outcome.ending.kind, outcome.ending.fault) == ("limit:memory", "tool"), outcome.stderr
    assert outcome.record.ending.kind == "limit:memory"
    assert jail.run(["echo", "fine"], memory="64MiB").text == "fine\n"


@pytest.mark.needs("cgroup")
@pytest.mark.parametrize("kind", UNMAPPED)
def test_memory_that_nobody_maps_meets_its_limit(jail: Jail, kind: str) -> None:
    outcome = python(jail, UNMAPPED[kind], memory="64MiB", disk="256MiB", wall_time=f"{15 * TIME_FACTOR}s")
    assert outcome.ending.kind == "limit:memory", (outcome, outcome.stderr)


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp", "/home/user", "/dev/shm", "/workspace"])
def test_a_full_disk_is_the_jails_own(jail: Jail, place: str) -> None:
    """All private places share one size: filling one after the other gives no more."""
    script = f"""
import errno
written = 0
for place in ({place!r}, "/tmp", "/dev/shm"):
    try:
        with open(place + "/big", "ab", buffering=0) as file:
            while True: written += file.write(b"x" * 65536)
    except OSError as error:
        print(errno.errorcode[error.errno], end=" ")
print(written)
"""
    outcome = python(jail, script, disk="4MiB")
    *answers, written = outcome.text.split()
    assert set(answers) == {"ENOSPC"}
    assert int(written) <= 4 * MIB
    assert outcome.record.usage.disk_used_bytes <= 4 * MIB + 65536
    assert python(jail, f"open({place!r} + '/x', 'wb').write(b'x' * 1000000)", disk="4MiB").ok


def test_files_without_end_meet_their_limit(jail: Jail) -> None:
    script = """
import errno, os
made = 0
try:
    while made < 10000:
        os.close(os.open(f"/tmp/{made}", os.O_CREAT | os.O_WRONLY)); made += 1
except OSError as error:
    print(errno.errorcode[error.errno], made)
"""
    answer, made = python(jail, script, inodes=200).text.split()
    assert answer == "ENOSPC"
    assert 150 < int(made) < 200


def test_open_files_meet_their_limit(jail: Jail) -> None:
    script = """
import errno, os
held = []
try:
    while len(held) < 5000: held.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    print(errno.errorcode[error.errno], len(held))
"""
    assert python(jail, script, open_files=64).text == "EMFILE 61\n"


def test_the_limit_on_open_files_cannot_be_raised(jail: Jail) -> None:
    script = """
import resource
for name, value in (("NOFILE", 100000), ("CORE", 1 << 20), ("NICE", 40), ("RTPRIO", 1), ("MEMLOCK", 1 << 30)):
    try:
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        print("raised", name)
    except (ValueError, OSError):
        pass
print("done")
"""
    assert python(jail, script, open_files=64).text == "done\n"


def test_a_crash_leaves_no_core_and_wakes_no_handler(jail: Jail) -> None:
    """A handler in core_pattern would run on the host, as root, and read what the tool wrote into its own memory."""
    script = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    assert python(jail, script).text == "(1, 1)\n"
    outcome = jail.run(["sh", "-c", "kill -SEGV $$"], collect=["*"])
    assert (outcome.ending.kind, outcome.ending.signal) == ("tool_error", 11)
    assert dict(outcome.files) == {}


def test_storage_limits_say_what_they_do_not_hold(jail: Jail, tmp_path: Path) -> None:
    """Never weaker in silence: what is written to the host's own directories is not in `disk`."""
    for overrides in ({"write": [str(tmp_path)]}, {"workspace": str(tmp_path), "workspace_mode": "rw"}):
        enforcement = jail.run(["true"], **overrides).record.enforcement
        for control in ("disk", "inodes"):
            assert "host directory" in enforcement[control].reason
    overrides = {"workspace": str(tmp_path), "workspace_mode": "cow"}
    outcome = jail.run(["sh", "-c", "head -c 9000000 /dev/zero > big"], disk="4MiB", **overrides)
    assert b"No space left" in outcome.stderr
    assert outcome.record.enforcement.disk.reason == ""
    outcome.changes.discard()


def test_priorities_cannot_be_raised(jail: Jail) -> None:
    script = """
import os
for attempt in (lambda: os.nice(-5), lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))):
    try:
        attempt()
        print("raised")
    except PermissionError:
        pass
print(os.nice(5))
"""
    # Calls inherit the niceness of whoever runs the tests; 19 is the last.
    assert python(jail, script).text == f"{min(os.nice(0) + 5, 19)}\n"


def test_cpu_time_ends_a_miner(jail: Jail) -> None:
    started = time.monotonic()
    outcome = jail.run(["sh", "-c", "while :; do :; done & while :; do :; done"], cpu_time="0.5s", **_lenient())
    assert (outcome.ending.kind, outcome.ending.fault) == ("limit:cpu_time", "tool")
    assert time.monotonic() - started < 15 * TIME_FACTOR
    assert jail.run(["sh", "-c", "echo short"], cpu_time=f"{5 * TIME_FACTOR}s", **_lenient()).ok


def test_cpu_time_counts_children_that_were_waited_for(jail: Jail) -> None:
    """A chain of short-lived children keeps each process's own clock near zero."""
    script = "while :; do sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done'; done"
    assert jail.run(["sh", "-c", script], cpu_time="1s", **_lenient()).ending.kind == "limit:cpu_time"


def _lenient() -> dict[str, Any]:
    """An ordinary user without cgroups gets this limit by polling."""
    return {"best_effort": ["cpu_time"]}


def test_mounts_without_end_cannot_be_made(jail: Jail) -> None:
    outcome = jail.run(["sh", "-c", "for i in 1 2 3; do mount -t tmpfs none /tmp; done; grep -c . /proc/self/mounts"])
    assert b"permission denied" in outcome.stderr.lower() or b"superuser" in outcome.stderr.lower()
    assert int(outcome.text) < 100


def test_watchers_are_the_jails_own_allowance(jail: Jail) -> None:
    """They are counted per user: an ordinary user's jail could otherwise take all that his desktop has."""
    script = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
held = 0
while held < 10000:
    if libc.inotify_init() < 0: break
    held += 1
print(errno.errorcode[ctypes.get_errno()], held)
"""
    assert python(jail, script).text == "EMFILE 64\n"
