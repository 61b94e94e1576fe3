"""Every limit ends or refuses what goes beyond it, is named as the ending, and lets pass what stays within."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from sandbox import CallTimeout, LimitExceeded, Outcome, Sandbox, ToolFailed
from tests.helpers.escape import TIME_FACTOR

pytestmark = [pytest.mark.needs("jail")]


def python(box: Sandbox, source: str, **limits: Any) -> Outcome:
    return box.run(["python3", "-c", source], **limits)


def facts(done: Outcome) -> Any:
    """What the probe inside has printed as JSON."""
    assert done.ok, (done, done.stderr[-2000:])
    return json.loads(done.text)


GROW = "import sys; data = bytearray(int(sys.argv[1]) << 20); data[::4096] = b'x' * len(data[::4096]); print(len(data))"


def grow(box: Sandbox, mebibytes: int, **limits: Any) -> Outcome:
    # Slowly enough that a host which can only poll has a chance to see it: the limit is then `polled` and `partial`.
    source = GROW + "; import time; time.sleep(0.3)"
    return box.run(["python3", "-c", source, str(mebibytes)], **limits)


def test_memory(box: Sandbox) -> None:
    assert grow(box, 50, memory="128MiB").ok
    done = grow(box, 300, memory="128MiB")
    assert (done.ending.kind, done.ending.fault, done.exit_code) == ("limit:memory", "tool", 137)
    with pytest.raises(LimitExceeded) as caught:
        done.unwrap()
    assert caught.value.limit == "memory"
    assert caught.value.record.ending.kind == "limit:memory"


def test_memory_of_all_processes_together(box: Sandbox) -> None:
    script = f'for i in 1 2 3 4; do python3 -c "{GROW}; import time; time.sleep(3)" 60 & done; wait'
    assert box.run(["sh", "-c", script.replace("60 &", "15 &").replace("sleep(3)", "sleep(0)")], memory="160MiB").ok
    assert box.run(["sh", "-c", script], memory="160MiB").ending.kind == "limit:memory"


def test_files_in_private_places_count_as_memory(box: Sandbox) -> None:
    fill = "head -c 200M /dev/zero > /tmp/a && sleep 0.5 && echo written"
    assert box.run(["sh", "-c", fill], memory="512MiB").text == "written\n"
    assert box.run(["sh", "-c", fill], memory="96MiB").ending.kind == "limit:memory"


def test_pids(box: Sandbox) -> None:
    source = """
import errno, json, os, time
made, seen = 0, ""
while made < 40:
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError as error:
        seen = errno.errorcode[error.errno]
        break
    made += 1
print(json.dumps([made, seen]))
"""
    assert facts(python(box, source, pids=64)) == [40, ""]
    made, seen = facts(python(box, source, pids=20))
    assert (made, seen) == (19, "EAGAIN")


def test_threads_count_as_tasks(box: Sandbox) -> None:
    source = """
import json, threading, time
made = 0
try:
    for _ in range(40):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); made += 1
    seen = ""
except RuntimeError as error:
    seen = str(error)
print(json.dumps([made, seen]), flush=True)
import os; os._exit(0)
"""
    assert facts(python(box, source, pids=64)) == [40, ""]
    made, seen = facts(python(box, source, pids=20))
    assert made <= 19
    assert seen == "can't start new thread"


def test_wall_time(box: Sandbox) -> None:
    assert box.run(["sleep", "0.1"], wall_time=f"{5 * TIME_FACTOR}s").ok
    started = time.monotonic()
    done = box.run(
        ["sh", "-c", "trap '' TERM INT; echo before; sleep 60 & wait; sleep 60"], wall_time=f"{0.4 * TIME_FACTOR}s"
    )
    assert time.monotonic() - started < 30
    assert (done.ending.kind, done.ending.fault, done.exit_code) == ("limit:wall_time", "tool", 124)
    assert done.stdout == b"before\n"
    with pytest.raises(CallTimeout):
        done.unwrap()


def test_cpu_time_of_all_processes_together(box: Sandbox) -> None:
    burn = "import time, sys\nend = time.process_time() + float(sys.argv[1])\nwhile time.process_time() < end: pass"
    # Without delegated cgroups it is polled, which has to be asked for.
    limits = {"cpus": 2.0, "best_effort": ["memory", "cpus", "io", "cpu_time"]}
    assert box.run(["python3", "-c", burn, "0.2"], cpu_time="5s", **limits).ok
    script = f"for i in 1 2 3; do python3 -c '{burn}' 30 & done; wait"
    started = time.monotonic()
    done = box.run(["sh", "-c", script], cpu_time="1s", **limits)
    assert (done.ending.kind, done.ending.fault) == ("limit:cpu_time", "tool")
    assert time.monotonic() - started < 15
    assert done.record.usage.get("cpu_usage_s", 0) < 3


def test_output(box: Sandbox) -> None:
    script = "head -c 600000 /dev/zero; head -c 300000 /dev/zero >&2"
    within = box.run(["sh", "-c", script], output="1MiB")
    assert (within.ok, len(within.stdout), len(within.stderr)) == (True, 600_000, 300_000)
    done = box.run(["sh", "-c", "yes"], output="1MiB")
    assert (done.ending.kind, done.ending.fault) == ("limit:output", "tool")
    assert len(done.stdout) == 1 << 20
    assert done.record.output.truncated
    together = box.run(["sh", "-c", script + "; yes >&2"], output="1MiB")
    assert len(together.stdout) + len(together.stderr) == 1 << 20


WRITE = """
import errno, json, os, sys
def fill(path, size):
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(size >> 16):
                file.write(b"x" * (1 << 16))
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""
print(json.dumps([fill(f"{place}/file", 6 << 20) for place in ("/tmp", "/dev/shm", os.path.expanduser("~"), ".")]))
"""


def test_disk_is_one_budget_for_all_private_places(box: Sandbox) -> None:
    assert facts(python(box, WRITE, disk="64MiB")) == ["", "", "", ""]
    done = python(box, WRITE, disk="16MiB")
    assert facts(done) == ["", "", "ENOSPC", "ENOSPC"]
    assert done.record.usage.disk_used_bytes <= 16 << 20


def test_one_file_cannot_pass_the_disk_limit_either(box: Sandbox) -> None:
    source = """
import errno, json
try:
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
    print('""')
except OSError as error:
    print(json.dumps(errno.errorcode[error.errno]))
"""
    assert facts(python(box, source.replace("1 << 40", "1 << 20"), disk="16MiB")) == ""
    assert facts(python(box, source, disk="16MiB")) == "EFBIG"


def test_inodes(box: Sandbox) -> None:
    source = """
import errno, json
made, seen = 0, ""
try:
    for made in range(1, 501):
        open(f"f{made}", "w").close()
except OSError as error:
    seen = errno.errorcode[error.errno]
print(json.dumps([made, seen]))
"""
    assert facts(python(box, source, inodes=4096)) == [500, ""]
    done = python(box, source, inodes=128)
    made, seen = facts(done)
    assert seen == "ENOSPC"
    assert 64 < made <= 128
    assert done.record.usage.inodes_used <= 128


def test_open_files(box: Sandbox) -> None:
    source = """
import errno, json
opened, seen = [], ""
try:
    for _ in range(200):
        opened.append(open("/dev/null"))
except OSError as error:
    seen = errno.errorcode[error.errno]
print(json.dumps([len(opened), seen]))
"""
    assert facts(python(box, source, open_files=256)) == [200, ""]
    count, seen = facts(python(box, source, open_files=64))
    assert (count < 64, seen) == (True, "EMFILE")


@pytest.mark.needs("cgroup")
def test_cpus_is_a_rate_over_all_processes(box: Sandbox) -> None:
    burn = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    script = f"for i in 1 2 3; do python3 -c '{burn}' & done; wait"
    done = box.run(["sh", "-c", script], cpus=0.3)
    assert done.ok
    assert done.record.usage.cpu_usage_s < 0.3 * done.record.time.duration_s + 0.3
    assert done.record.usage.throttled_periods > 0


def test_a_limit_that_was_not_reached_is_not_named(box: Sandbox) -> None:
    done = box.run(["sh", "-c", "kill -9 $$"], memory="64MiB")
    assert (done.ending.kind, done.exit_code) == ("tool_error", 137)
    with pytest.raises(ToolFailed):
        done.unwrap()
