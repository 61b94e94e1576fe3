"""Whose process is it: from a pid that NVML reports to the jail that it runs in.

By the cgroup, which no tool can leave; where calls have none, by descent from the jail's pid 1, which adopts every
orphan inside. Only meaningful where NVML's pids are those of our own pid namespace (see `inventory`).
Source: proc_pid_cgroup(5), proc_pid_stat(5), pid_namespaces(7).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping

_TICKS = os.sysconf("SC_CLK_TCK")
_DEPTH_MAX = 256


def boot_time_s() -> float:
    """The clock that process start times are given in."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def jail_of(pid: int, tree: str, jails: Mapping[int, str], asked_at_s: float) -> str | None:
    """The name of our jail that `pid` runs in. None: no jail of ours, or the pid was given to another process since.

    `tree`: the name of the supervisor's cgroups, empty where it has none. `jails`: pid of each jail's pid 1 to its
    name. `asked_at_s`: `boot_time_s` from before NVML was asked.
    """
    try:
        if tree:
            found = _group_below(pid, tree)
        else:
            found = _by_descent(pid, jails)
        # A process that started since cannot be the one that NVML spoke of: its number was used again.
        return found if found is not None and _started_s(pid) < asked_at_s - 1 / _TICKS else None
    except (OSError, ValueError, IndexError):
        return None  # it has ended meanwhile


def call_of(pid: int) -> str | None:
    """The group of any supervisor's call that `pid` runs in, as "tree/jail"; None when it is in none."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
            for line in file:
                parts = line.rstrip("\n").split(":", 2)[2].split("/")
                for above, name in itertools.pairwise(parts):
                    if above.startswith("toolcall-sandbox-"):
                        return f"{above}/{name}"
    except OSError:
        return None
    return None


def _group_below(pid: int, tree: str) -> str | None:
    with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
        for line in file:
            parts = line.rstrip("\n").split(":", 2)[2].split("/")
            if tree in parts[:-1]:
                return parts[parts.index(tree) + 1]
    return None


def _by_descent(pid: int, jails: Mapping[int, str]) -> str | None:
    for _ in range(_DEPTH_MAX):
        if pid in jails:
            return jails[pid]
        if pid <= 1:
            return None
        pid = int(_stat(pid)[1])
    return None


def _started_s(pid: int) -> float:
    return int(_stat(pid)[19]) / _TICKS


def _stat(pid: int) -> list[str]:
    """The fields from the third on: the second, the name, may hold anything."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()
