"""Records survive what kills processes and fills disks: nothing acknowledged is lost, nothing is closed twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sandbox.audit.recover import recover
from sandbox.audit.store import iter_entries
from sandbox.audit.verify import verify_state

ROOT = Path(__file__).resolve().parents[2]

FILLER = """
import json, os, sys
from pathlib import Path
from sandbox.audit.store import Store, iter_entries
from sandbox.audit.verify import verify_chain
from sandbox.errors import AuditError
from tests.helpers.audit import pair

mount = Path(sys.argv[1])
ballast = mount / "ballast"
ballast.write_bytes(b"x" * 24 * 1024)
chain = Store(mount / "state").open_chain()
acknowledged, failure = [], None
for number in range(1000):
    opened, closed = pair(number)
    try:
        acknowledged.append(chain.append_opened(opened, durability=sys.argv[2]).hash)
        acknowledged.append(chain.append_closed(closed, durability=sys.argv[2]).hash)
    except AuditError as err:
        failure = err.__cause__.errno
        break
was_open = len(chain.open_records)
full = verify_chain(chain.path)
stored = [entry["integrity"]["hash"] for entry in iter_entries(chain.path)]
ballast.unlink()
opened, closed = pair(2000)
chain.append_opened(opened, durability="fsync")
chain.append_closed(closed, durability="fsync")
chain.close()
after = verify_chain(chain.path)
print(json.dumps({
    "errno": failure, "acknowledged": len(acknowledged), "same": stored == acknowledged, "torn": full.torn,
    "more": after.entries - full.entries - was_open, "open": after.open_records, "clean": after.is_clean,
}))
"""

WRITER = """
import sys
from pathlib import Path
from sandbox.audit.record import new_record_id
from sandbox.audit.recover import recover
from sandbox.audit.store import Store
from tests.helpers.audit import pair

state, size = Path(sys.argv[1]), int(sys.argv[2])
recover(state)
chain = Store(state).open_chain(sys.argv[3])
opened, closed = pair()
while True:
    name = new_record_id()
    chain.append_opened({**opened, "record_id": name, "filling": ["x" * 10000] * size})
    print("opened", name, flush=True)
    chain.append_closed({**closed, "record_id": name, "filling": ["x" * 10000] * size})
    print("closed", name, flush=True)
"""


def python(code: str, *args: str) -> list[str]:
    return [sys.executable, "-c", code, *args]


@pytest.mark.needs("userns")
@pytest.mark.parametrize("durability", ["flush", "fsync"])
def test_a_full_disk_is_told_damages_nothing_and_ends_when_there_is_room(durability: str, tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=64k,mode=0700 none "$1" && shift && exec "$@"'
    inside = ["sh", "-c", mount, "sh", str(tmp_path), *python(FILLER, str(tmp_path), durability)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *inside],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["errno"] == 28
    assert facts["acknowledged"] > 4
    assert facts["same"]
    assert facts["torn"] == []
    assert facts["more"] == 2
    assert facts["open"] == []
    assert facts["clean"]


def start_writer(state: Path, size: int, name: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(python(WRITER, str(state), str(size), name), cwd=ROOT, stdout=out)


def acknowledged(log: Path) -> list[tuple[str, str]]:
    """What the writer was told had been written; a line cut by its death was never read by anybody."""
    lines = log.read_text().split("\n")[:-1]
    return [(kind, name) for kind, name in (line.split() for line in lines)]


def test_writers_killed_at_random_points_lose_nothing_and_each_record_is_closed_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    moments = random.Random(7)
    told: list[tuple[str, str]] = []
    for turn in range(6):
        logs = [tmp_path / f"log-{turn}-{number}" for number in range(4)]
        writers = [start_writer(state, (0, 20)[n % 2], f"writer-{n}", log) for n, log in enumerate(logs)]
        deadline = time.monotonic() + 20
        while not all(log.stat().st_size for log in logs) and time.monotonic() < deadline:
            time.sleep(0.005)
        for writer in moments.sample(writers, len(writers)):
            time.sleep(moments.uniform(0, 0.03))
            os.kill(writer.pid, signal.SIGKILL)
            assert writer.wait(timeout=10) == -signal.SIGKILL
        told += [line for log in logs for line in acknowledged(log)]
    assert [result.error for result in recover(state) if result.error] == []
    assert not (state / "broken").exists()
    reports = verify_state(state)
    assert len(reports) >= 24
    assert all(report.broken is None and report.is_clean and not report.open_records for report in reports)
    stored = {(entry["entry"], entry["record_id"]) for entry in iter_entries(state) if "record_id" in entry}
    assert set(told) <= stored
    endings = [entry for entry in iter_entries(state) if entry["entry"] == "closed"]
    lost = [entry["record_id"] for entry in endings if entry["ending"]["kind"] == "lost"]
    assert lost
    assert not {("closed", name) for name in lost} & set(told)
    assert len(endings) == len({entry["record_id"] for entry in endings})


def test_starts_at_the_same_time_recover_each_record_once(tmp_path: Path) -> None:
    state, log = tmp_path / "state", tmp_path / "log"
    writer = start_writer(state, 0, "writer", log)
    while not log.exists() or not log.stat().st_size:
        time.sleep(0.01)
    writer.kill()
    writer.wait(timeout=10)
    code = (
        "import sys; from pathlib import Path; from sandbox.audit.recover import recover;"
        "print(sum(len(r.lost) + bool(r.error) * 100 for r in recover(Path(sys.argv[1]))))"
    )
    starts = [subprocess.Popen(python(code, str(state)), cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    counts = [int(start.communicate(timeout=30)[0]) for start in starts]
    (report,) = verify_state(state)
    assert report.broken is None
    assert report.open_records == ()
    ends = [entry for entry in iter_entries(state) if entry["entry"] == "closed" and entry["ending"]["kind"] == "lost"]
    assert sum(counts) == len(ends) <= 1


def test_a_write_that_comes_up_short_is_taken_back(tmp_path: Path) -> None:
    code = """
import json, resource, sys
from pathlib import Path
from sandbox.audit.store import Store
from sandbox.audit.verify import verify_chain
from sandbox.errors import AuditError
from tests.helpers.audit import pair
chain = Store(Path(sys.argv[1])).open_chain()
chain.append_opened(pair()[0])
size = (chain.path / "000001.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
try:
    chain.append_closed(pair()[1])
except AuditError as err:
    failure = err.__cause__.errno
left = (chain.path / "000001.jsonl").stat().st_size - size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
chain.append_closed(pair()[1])
chain.close()
print(json.dumps([failure, left, verify_chain(chain.path).is_clean]))
"""
    done = subprocess.run(
        python(code, str(tmp_path / "state")), cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [27, 0, True]
