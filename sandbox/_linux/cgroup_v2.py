"""Groups in the unified tree: limits, kill, freeze, counters.

In a hybrid layout the tree may hold no useful controller; kill, freeze, birth by CLONE_INTO_CGROUP and device
programs work there all the same, so a group is made in it whenever it is writable.
Source: Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection

from sandbox._linux.cgroup_files import (
    make_group,
    read_int,
    read_keyed,
    read_pids,
    read_text,
    read_words,
    try_write,
    write_value,
)
from sandbox._linux.cgroup_layout import CONTROLS, LEAF, Home

CPU_PERIOD_US = 100_000
CPU_QUOTA_MIN_US = 1_000
_MOVE_ROUNDS = 50


def open_parent(home: Home, name: str) -> tuple[str, dict[str, str]]:
    """Make the group `name` below `home` with every controller that can be had enabled for its children.

    Returns its path and, for each controller refused although it was offered, the reason.
    """
    if home.move_first:
        _move_to_leaf(home.path)
    refused = _enable(home.path, home.controllers - read_words(home.path + "/cgroup.subtree_control"))
    path = f"{home.path}/{name}"
    make_group(path)
    available = read_words(path + "/cgroup.controllers") & frozenset(CONTROLS)
    refused.update(_enable(path, available))
    return path, refused


def _enable(group: str, controllers: frozenset[str]) -> dict[str, str]:
    refused = {}
    for controller in sorted(controllers):
        # One write each: a write that names several controllers enables none of them when one is refused.
        try:
            write_value(group + "/cgroup.subtree_control", "+" + controller)
        except OSError as err:
            refused[controller] = str(err)
    return refused


def _move_to_leaf(group: str) -> None:
    # A non-root group that holds processes cannot enable controllers for its children (EBUSY), so ours move to a
    # leaf first. Rounds: a process that forks between the read and its own move leaves its child behind.
    leaf = f"{group}/{LEAF}"
    try:
        make_group(leaf)
        # What moves there may run as another user later, and must still be able to see where it is: our umask must
        # not decide.
        os.chmod(leaf, 0o755)  # noqa: S103 - a cgroup directory: listing it is all that this permits
    except FileExistsError:
        pass  # an earlier supervisor in the same delegated group made it
    for _ in range(_MOVE_ROUNDS):
        pids = read_pids(group)
        if not pids:
            return
        for pid in pids:
            try:
                write_value(leaf + "/cgroup.procs", pid)
            except ProcessLookupError:
                pass  # it has ended meanwhile
    raise OSError(errno.EBUSY, f"processes keep appearing, last {pids[:5]}", group)


def apply_limits(group: str, limits: dict[str, float | int], devices: list[str]) -> None:
    """Write the limits whose controller is enabled here. Raises OSError naming the file."""
    if "memory_bytes" in limits:
        write_value(group + "/memory.max", int(limits["memory_bytes"]))
        try_write(group + "/memory.swap.max", 0)
        # Without it the kernel kills one process of the jail and the rest runs on, half dead.
        write_value(group + "/memory.oom.group", 1)
    if "pids" in limits:
        write_value(group + "/pids.max", int(limits["pids"]))
    if "cpus" in limits:
        write_value(group + "/cpu.max", f"{cpu_quota_us(limits['cpus'])} {CPU_PERIOD_US}")
    if "io_bytes_per_s" in limits:
        rate = int(limits["io_bytes_per_s"])
        for device in devices:
            write_value(group + "/io.max", f"{device} rbps={rate} wbps={rate}")


def cpu_quota_us(cpus: float) -> int:
    """The run time per period for that many cores. The kernel refuses less than a millisecond, so that is the least."""
    return max(CPU_QUOTA_MIN_US, round(cpus * CPU_PERIOD_US))


def kill(group: str) -> bool:
    """Kill every process of the group and below it at once; False before Linux 5.14, which has no cgroup.kill."""
    return try_write(group + "/cgroup.kill", 1)


def set_frozen(group: str, *, frozen: bool, timeout_s: float) -> bool:
    """Freeze or thaw; True once the kernel says that it is done."""
    write_value(group + "/cgroup.freeze", int(frozen))
    deadline = time.monotonic() + timeout_s
    while read_keyed(group + "/cgroup.events").get("frozen") != int(frozen):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def is_populated(group: str) -> bool:
    return read_keyed(group + "/cgroup.events").get("populated", 0) != 0


def stats(group: str, elsewhere: Collection[str] = ()) -> dict[str, float | int]:
    """The counters that this group has; absent ones are left out.

    `elsewhere`: controllers of v1 trees, which a unified tree cannot have as well.
    """
    found: dict[str, float | int] = {}
    if "memory" not in elsewhere:
        _put(found, "memory_peak_bytes", read_int(group + "/memory.peak"))
        events = read_keyed(group + "/memory.events")
        _put(found, "oom_kills", events.get("oom_kill"))
        _put(found, "memory_refused", events.get("max"))
    if "pids" not in elsewhere:
        _put(found, "pids_current", read_int(group + "/pids.current"))
        _put(found, "pids_peak", read_int(group + "/pids.peak"))
        _put(found, "pids_refused", read_keyed(group + "/pids.events").get("max"))
    cpu = read_keyed(group + "/cpu.stat")
    for key, name in (("usage", "usage_usec"), ("user", "user_usec"), ("system", "system_usec")):
        if name in cpu:
            found[f"cpu_{key}_s"] = cpu[name] / 1e6
    if "nr_throttled" in cpu:
        found["throttled_periods"] = cpu["nr_throttled"]
        found["throttled_s"] = cpu.get("throttled_usec", 0) / 1e6
    if "blkio" not in elsewhere:
        found.update(_io_stats(group))
    return found


def _io_stats(group: str) -> dict[str, int]:
    text = read_text(group + "/io.stat")
    if text is None:
        return {}
    totals = {"io_read_bytes": 0, "io_write_bytes": 0}
    for field in text.split():
        key, _, number = field.partition("=")
        if key in ("rbytes", "wbytes") and number.isdigit():
            totals["io_read_bytes" if key == "rbytes" else "io_write_bytes"] += int(number)
    return totals


def _put(found: dict[str, float | int], key: str, value: int | None) -> None:
    if value is not None:
        found[key] = value


def open_directory(group: str) -> int:
    """A descriptor for clone3's CLONE_INTO_CGROUP; the caller closes it."""
    return os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
