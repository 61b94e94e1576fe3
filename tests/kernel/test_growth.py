"""Two thousand calls in a row: nothing of ours grows, in no process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox import Sandbox

pytestmark = [pytest.mark.needs("jail"), pytest.mark.once]

CALLS = 2000
THREADS = 8
WARM_UP = 200
# Heaps settle late, and the caller is a test process with a long past: what leaks grows in both halves of the calls.
# A leak of 2 KiB a call would show.
GROWTH_BYTES = 2 << 20
OTHERS_MOUNTS = 20


@dataclass(frozen=True)
class Size:
    """What one process holds; -1 where it may not be known."""

    fds: int
    resident_bytes: int
    mounts: int
    children: int


def size_of(pid: int) -> Size:
    children = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        children += len(Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    try:
        fds = len(os.listdir(f"/proc/{pid}/fd"))
        mounts = len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines())
    except PermissionError:
        # The supervisor is not dumpable: only root looks into it. Its memory and children can be seen all the same.
        fds = mounts = -1
    return Size(
        fds=fds,
        resident_bytes=int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        mounts=mounts,
        children=children,
    )


def groups_of(supervisor_pid: int) -> set[str]:
    """The cgroups of this supervisor's calls."""
    found = set()
    for root, names, _ in os.walk("/sys/fs/cgroup"):
        if f"toolcall-sandbox-{supervisor_pid}" in root:
            found |= {f"{root}/{name}" for name in names}
    return found


def files_below(state: Path) -> set[str]:
    """What lies in the state directory, but for records, whose purpose is to stay."""
    return {str(path) for path in state.rglob("*") if "chains" not in path.parts}


def settled(look: Callable[[], object]) -> object:
    """What `look` says when it has said the same for a while: standbys and the last call's remains have gone."""
    seen, since, deadline = look(), time.monotonic(), time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.2)
        now = look()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > 1:
            break
    return seen


@pytest.mark.timeout(150)
@pytest.mark.parametrize("kind", ["program", "function"])
def test_two_thousand_calls_leave_nothing_behind(tmp_path: Path, kind: str) -> None:
    calls = CALLS if kind == "program" else CALLS // 5
    with Sandbox("shell", state=tmp_path) as box, ThreadPoolExecutor(THREADS) as pool:

        def one(_: int) -> bool:
            return box.run(["true"]).ok if kind == "program" else box.call(int, "7").value == 7

        def many(count: int) -> None:
            assert all(pool.map(one, range(count)))

        many(WARM_UP)
        assert box._link is not None
        supervisor, zygote = box._link.supervisor_pid, box._link.zygote_pid
        pids = {"caller": os.getpid(), "supervisor": supervisor, "zygote": zygote}

        def sizes() -> dict[str, Size]:
            return {name: size_of(pid) for name, pid in pids.items()}

        def shapes() -> object:
            counts = {name: (size.fds, size.children) for name, size in sizes().items()}
            return counts, len(groups_of(supervisor)), files_below(tmp_path)

        before, sizes_before = settled(shapes), sizes()
        many(calls // 2)
        sizes_between = sizes()
        many(calls // 2)
        after, sizes_after = settled(shapes), sizes()
        assert after == before
        for name in pids:
            # They are in the machine's mount namespace, where others mount too, though not once a call.
            assert sizes_after[name].mounts - sizes_before[name].mounts < OTHERS_MOUNTS
            held = [size[name].resident_bytes for size in (sizes_before, sizes_between, sizes_after)]
            growth = min(held[1] - held[0], held[2] - held[1])
            assert growth < GROWTH_BYTES, f"{name} grew by {growth >> 10} KiB in {calls // 2} calls, twice"
