"""Many calls: how many a second, how many at once, and what they hold meanwhile."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sandbox.bench import machine
from sandbox.bench.jobs import Job, one
from sandbox.bench.ours import PROFILE, wait_warm
from sandbox.bench.stats import summarise
from sandbox.runtime import Sandbox


def throughput(call: Callable[[], object], callers: int, seconds: float) -> dict[str, float]:
    """Calls a second from so many threads. `cpu_ms_per_call`: what the whole machine used, others' work included."""
    deadline = time.monotonic() + seconds

    def work(_: int) -> int:
        made = 0
        while time.monotonic() < deadline:
            call()
            made += 1
        return made

    used, started = machine.cpu_seconds(), time.monotonic()
    with ThreadPoolExecutor(callers) as pool:
        made = sum(pool.map(work, range(callers)))
    elapsed = time.monotonic() - started
    cpu_ms = (machine.cpu_seconds() - used) / max(1, made) * 1000
    return {"callers": callers, "calls": made, "calls_per_s": made / elapsed, "cpu_ms_per_call": cpu_ms}


def own_cpu_ms(box: Sandbox, call: Callable[[], object], count: int) -> float:
    """Processor time of one call in all of our processes, in milliseconds: caller, supervisor, templates, jails.

    Without what the kernel does afterwards in threads of its own, such as taking network namespaces down.
    """
    before, mine = _tree_cpu_s(box), time.process_time()
    for _ in range(count):
        call()
    time.sleep(0.2)  # until the last jail has been waited for
    return (_tree_cpu_s(box) - before + time.process_time() - mine) / count * 1000


def spawned_cpu_ms(do: Callable[[], object], count: int) -> float:
    """Processor time of the processes that `do` starts and waits for, and of all of theirs, in milliseconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(count):
        do()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / count * 1000


def _tree_cpu_s(box: Sandbox) -> float:
    assert box._link is not None
    pids = [box._link.supervisor_pid]
    for pid in pids:
        pids += _children(pid)
    ticks = sum(sum(map(int, _stat(pid)[11:15])) for pid in pids if _stat(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text(encoding="ascii").split())
    except OSError:
        return found
    return found


def _pss_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def memory(state: Path, job: Job) -> dict[str, float]:
    """What an idle standby of a function's kind holds (PSS: shared pages counted by share), and the rest of us."""
    with Sandbox(PROFILE, state=state) as box:
        work = job.function or one
        wait_warm(lambda: box.call(work))
        with ThreadPoolExecutor(8) as pool:  # demand for more than one
            list(pool.map(lambda _: box.call(work), range(32)))
        time.sleep(1.0)
        assert box._link is not None
        supervisor, zygote = box._link.supervisor_pid, box._link.zygote_pid
        templates = [pid for builder in _children(zygote) for init in _children(builder) for pid in _children(init)]
        standbys = [pid for template in templates for pid in _children(template)]
        sizes = [_pss_bytes(pid) for pid in standbys]
        return {
            "standbys": len(standbys),
            "standby_pss_bytes": sum(sizes) / max(1, len(sizes)),
            "template_pss_bytes": sum(map(_pss_bytes, templates)),
            "supervisor_pss_bytes": _pss_bytes(supervisor),
            "zygote_pss_bytes": _pss_bytes(zygote),
        }


_FIRST_CALL = """
import time, tempfile
started = time.perf_counter()
import sandbox
imported = time.perf_counter()
with tempfile.TemporaryDirectory() as place, sandbox.Sandbox("python", state=place) as box:
    made = time.perf_counter()
    assert box.run(["/bin/true"]).ok
    done = time.perf_counter()
print(imported - started, done - imported)
"""


def first_call(count: int) -> dict[str, Any]:
    """In fresh processes: importing us, and from then to the end of the first call, in milliseconds."""
    imports, calls = [], []
    for _ in range(count):
        done = subprocess.run(
            [sys.executable, "-c", _FIRST_CALL], capture_output=True, text=True, check=True, timeout=60
        )
        imported, called = map(float, done.stdout.split())
        imports.append(imported * 1000)
        calls.append(called * 1000)
    return {"import_ms": summarise(imports), "first_call_ms": summarise(calls)}


def record_cost(state: Path, count: int) -> dict[str, Any]:
    """A trivial function with a record that is written, and with one that is on the disk before the outcome is told."""
    found = {}
    settings: dict[str, dict[str, Any]] = {name: {"audit.durability": name} for name in ("flush", "fsync")}
    boxes = {name: Sandbox(PROFILE, state=state, **setting) for name, setting in settings.items()}
    try:
        for box in boxes.values():
            wait_warm(lambda box=box: box.call(one))
        times: dict[str, list[float]] = {name: [] for name in boxes}
        for _ in range(count):
            for name, box in boxes.items():
                time.sleep(0.005)
                started = time.perf_counter()
                box.call(one)
                times[name].append((time.perf_counter() - started) * 1000)
        found = {name: summarise(values) for name, values in times.items()}
    finally:
        for box in boxes.values():
            box.close()
    return found


def alive_at_once(count: int) -> dict[str, float]:
    """So many jails that all run at the same time: until all were up, and what they hold together."""
    _raise_open_files(4 * count + 1024)
    before = _available_bytes()
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as place, Sandbox(PROFILE, state=place) as box:
        wait_warm(lambda: box.run(["/bin/true"]))
        ups = threading.Semaphore(0)
        ends = threading.Event()
        failures: list[str] = []

        def hold(_: int) -> None:
            try:
                with box.stream(["sh", "-c", "echo up; read end"], input=None, wall_time="600s") as stream:
                    next(iter(stream))
                    ups.release()
                    ends.wait()
            except Exception as error:  # noqa: BLE001 - counted, and told
                failures.append(f"{type(error).__name__}: {error}")
                ups.release()

        started = time.monotonic()
        threads = [threading.Thread(target=hold, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        for _ in threads:
            ups.acquire()
        elapsed, held = time.monotonic() - started, before - _available_bytes()
        ends.set()
        for thread in threads:
            thread.join()
    return {"jails": count, "failed": len(failures), "all_up_s": elapsed, "bytes_each": held / count}


def submissions(count: int) -> dict[str, Any]:
    """So many calls submitted at once from one event loop.

    `displaced_most`: how far from its place in the queue the worst served call ended.
    """
    _raise_open_files(4 * count + 1024)
    order: list[int] = []

    async def main(box: Sandbox) -> int:
        async def submit(number: int) -> bool:
            done = await box.acall(one)
            order.append(number)
            return done.ok

        return sum(await asyncio.gather(*(submit(number) for number in range(count))))

    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as place, Sandbox(PROFILE, state=place) as box:
        wait_warm(lambda: box.call(one))
        assert box._link is not None
        started = time.monotonic()
        done = asyncio.run(main(box))
        elapsed = time.monotonic() - started
        most = _peak_bytes(box._link.supervisor_pid)
    displaced = max(abs(place - number) for place, number in enumerate(order)) if order else 0
    return {
        "submitted": count,
        "completed": done,
        "seconds": elapsed,
        "displaced_most": displaced,
        "supervisor_peak_bytes": most,
    }


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _available_bytes() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _raise_open_files(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
