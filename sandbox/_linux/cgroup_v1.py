"""One call's groups in the v1 trees: one directory per controller in use.

v1 has no group kill and no directory descriptor for clone3: the freezer, or a loop behind `pids.max` 0, kills, and
the builder writes its pid into each `cgroup.procs`.
Source: Documentation/admin-guide/cgroup-v1/.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from sandbox._linux.cgroup_files import (
    read_int,
    read_keyed,
    read_pids,
    read_text,
    try_write,
    write_value,
)
from sandbox._linux.cgroup_v2 import cpu_quota_us


def apply_limits(groups: dict[str, str], limits: dict[str, float | int], devices: list[str]) -> None:
    """Write the limits whose controller has a group here. Raises OSError naming the file."""
    if "memory_bytes" in limits and "memory" in groups:
        _apply_memory(groups["memory"], int(limits["memory_bytes"]))
    if "pids" in limits and "pids" in groups:
        write_value(groups["pids"] + "/pids.max", int(limits["pids"]))
    if "cpus" in limits and "cpu" in groups:
        # A new group's period is 100 ms, CPU_PERIOD_US (Documentation/scheduler/sched-bwc.rst).
        write_value(groups["cpu"] + "/cpu.cfs_quota_us", cpu_quota_us(limits["cpus"]))
    if "io_bytes_per_s" in limits and "blkio" in groups:
        for device in devices:
            for direction in ("read", "write"):
                path = f"{groups['blkio']}/blkio.throttle.{direction}_bps_device"
                write_value(path, f"{device} {int(limits['io_bytes_per_s'])}")


def _apply_memory(group: str, memory_bytes: int) -> None:
    plain, with_swap = group + "/memory.limit_in_bytes", group + "/memory.memsw.limit_in_bytes"
    # The kernel keeps limit <= limit with swap at every moment: to raise both, swap's goes first.
    try:
        write_value(plain, memory_bytes)
        is_set = True
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
        is_set = False
    if not try_write(with_swap, memory_bytes):
        # Swap is not accounted (boot option swapaccount=0): at least do not swap by choice.
        write_value(group + "/memory.swappiness", 0)
    if not is_set:
        write_value(plain, memory_bytes)


def kill(groups: dict[str, str], *, timeout_s: float) -> bool:
    """Kill every process in these groups; True once all are empty.

    Source: a forking tree outruns a plain loop of signals, so it is frozen, or refused new tasks, first.
    """
    if "pids" in groups:
        try_write(groups["pids"] + "/pids.max", 0)
    if "freezer" in groups:
        set_frozen(groups["freezer"], frozen=True, timeout_s=0.05)
        _signal_all(groups)
        try_write(groups["freezer"] + "/freezer.state", "THAWED")
    deadline = time.monotonic() + timeout_s
    while _signal_all(groups):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def _signal_all(groups: dict[str, str]) -> int:
    """SIGKILL to every process found; how many there were."""
    pids = {pid for group in groups.values() for pid in read_pids(group)}
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended meanwhile
    return len(pids)


def set_frozen(group: str, *, frozen: bool, timeout_s: float) -> bool:
    """Freeze or thaw through the freezer controller; True once the kernel says that it is done."""
    state = "FROZEN" if frozen else "THAWED"
    path = group + "/freezer.state"
    deadline = time.monotonic() + timeout_s
    while True:
        # Writing again restarts a freeze that met a task which could not be frozen at that moment.
        if not try_write(path, state):
            return False
        if (read_text(path) or "").strip() == state:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)


def open_oom_event(group: str) -> int:
    """An eventfd that becomes readable when the group runs out of memory; the caller closes it."""
    control_fd = os.open(group + "/memory.oom_control", os.O_RDONLY | os.O_CLOEXEC)
    event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    try:
        write_value(group + "/cgroup.event_control", f"{event_fd} {control_fd}")
    except BaseException:
        os.close(event_fd)
        raise
    finally:
        os.close(control_fd)
    return event_fd


def stats(groups: dict[str, str]) -> dict[str, float | int]:
    """The counters that these groups have; absent ones are left out."""
    found: dict[str, float | int] = {}
    memory, pids = groups.get("memory"), groups.get("pids")
    sources: list[tuple[str, int | None]] = []
    if memory:
        sources += [
            ("memory_peak_bytes", read_int(memory + "/memory.max_usage_in_bytes")),
            # failcnt stays 0 when the charge was refused through the limit with swap; oom_kill is the proof.
            ("oom_kills", read_keyed(memory + "/memory.oom_control").get("oom_kill")),
            ("memory_refused", _sum(memory + "/memory.failcnt", memory + "/memory.memsw.failcnt")),
        ]
    if pids:
        sources += [
            ("pids_current", read_int(pids + "/pids.current")),
            ("pids_peak", read_int(pids + "/pids.peak")),
            ("pids_refused", read_keyed(pids + "/pids.events").get("max")),
        ]
    found.update({key: value for key, value in sources if value is not None})
    found.update(_cpu_stats(groups))
    if "blkio" in groups:
        found.update(_io_stats(groups["blkio"]))
    return found


def _sum(*paths: str) -> int | None:
    values = [value for value in map(read_int, paths) if value is not None]
    return sum(values) if values else None


def _cpu_stats(groups: dict[str, str]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    if "cpuacct" in groups:
        for key, name in (("usage", "usage"), ("user", "usage_user"), ("system", "usage_sys")):
            value = read_int(f"{groups['cpuacct']}/cpuacct.{name}")
            if value is not None:
                found[f"cpu_{key}_s"] = value / 1e9
    if "cpu" in groups:
        throttling = read_keyed(groups["cpu"] + "/cpu.stat")
        if "nr_throttled" in throttling:
            found["throttled_periods"] = throttling["nr_throttled"]
            found["throttled_s"] = throttling.get("throttled_time", 0) / 1e9
    return found


def _io_stats(group: str) -> dict[str, int]:
    text = read_text(group + "/blkio.throttle.io_service_bytes")
    if text is None:
        return {}
    totals = {"io_read_bytes": 0, "io_write_bytes": 0}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[1] in ("Read", "Write"):
            totals["io_read_bytes" if words[1] == "Read" else "io_write_bytes"] += int(words[2])
    return totals
