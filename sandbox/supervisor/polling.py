"""Memory and CPU time of a jail's processes by reading /proc: for users to whom no cgroup is delegated.

It sees what has happened, so it bounds abuse in time and does not prevent it: such limits are `polled`, `partial`.
Memory that no process maps (a memfd that is written but not mapped) is not seen; files on the jail's tmpfs are.
Source: proc(5): /proc/PID/task/TID/children, /proc/PID/stat, /proc/PID/smaps_rollup.
"""

from __future__ import annotations

import os

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PROCESSES_MAX = 65536


def descendants(pid: int) -> list[int]:
    """`pid` and everything below it, as far as it can be seen right now."""
    found = [pid]
    for parent in found:
        if len(found) > PROCESSES_MAX:
            break
        found.extend(_children(parent))
    return found


def _children(pid: int) -> list[int]:
    result: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                result.extend(map(int, file.read().split()))
    except (FileNotFoundError, ProcessLookupError):
        return result
    return result


def cpu_time_s(pids: list[int]) -> float:
    """User and system time of these processes and of those which they have waited for."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rsplit(b")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(map(int, fields[11:15]))
    return total * TICK_S


def resident_bytes(pids: list[int]) -> int:
    """Resident memory; pages shared between processes count once for each, so this is an upper bound."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                total += int(file.read().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total * PAGE_BYTES


def proportional_bytes(pids: list[int]) -> int:
    """Memory with shared pages split among their users (PSS), and swap. Dearer than `resident_bytes`."""
    total = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                lines = file.read().splitlines()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith((b"Pss:", b"SwapPss:")))
    return total * 1024


def used_bytes(fd: int) -> tuple[int, int]:
    """Bytes and inodes in use on the filesystem of `fd`."""
    info = os.fstatvfs(fd)
    return (info.f_blocks - info.f_bfree) * info.f_frsize, info.f_files - info.f_ffree
