"""Where the numbers come from: without it they say nothing."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import Any

from sandbox import __version__


def describe() -> dict[str, Any]:
    """The machine, the user, and what else it is doing."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "virtual": "hypervisor" in _cpu_info().get("flags", ""),
        "python": platform.python_version(),
        "toolcall_sandbox": __version__,
        "as_root": os.geteuid() == 0,
        "load": load(),
    }


def load() -> dict[str, float]:
    """The load averages, and the share of the last tenth of a second in which the cores were busy."""
    busy, total = _cpu_ticks()
    time.sleep(0.1)
    busy_after, total_after = _cpu_ticks()
    one, five, fifteen = os.getloadavg()
    share = (busy_after - busy) / max(1, total_after - total)
    return {"one_minute": one, "five_minutes": five, "fifteen_minutes": fifteen, "busy_share": round(share, 3)}


def cpu_seconds() -> float:
    """What all processes of the machine have used of its cores, since it booted."""
    return _cpu_ticks()[0] / os.sysconf("SC_CLK_TCK")


def _cpu_ticks() -> tuple[int, int]:
    fields = list(map(int, Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]))
    total = sum(fields)
    return total - fields[3] - fields[4], total


def _cpu_info() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu_model() -> str:
    info = _cpu_info()
    return info.get("model name") or info.get("CPU implementer") or platform.processor() or "unknown"
