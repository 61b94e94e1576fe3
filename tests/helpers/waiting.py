"""Waiting for something to come true, on machines that may be slow or stand still for a while."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tests.helpers.escape import TIME_FACTOR

T = TypeVar("T")


def awaited(look: Callable[[], T], within_s: float = 20.0, pause_s: float = 0.01) -> T:
    """Poll until `look` gives something true; what it gave last.

    It is the pauses that are counted, not the clock: a virtual machine that is held up for seconds by its host gives
    nobody inside a turn, and whoever then looks at the clock first has waited for nothing.
    """
    for _ in range(math.ceil(within_s * TIME_FACTOR / pause_s)):
        if found := look():
            return found
        time.sleep(pause_s)
    return look()


def eventually(condition: Callable[[], object], within_s: float = 20.0) -> bool:
    """Poll until it holds; whether it did."""
    return bool(awaited(condition, within_s))


def left(find: Callable[[], Sequence[T]], within_s: float = 20.0) -> Sequence[T]:
    """What `find` still finds when the time is over; empty as soon as it has found nothing once."""
    found: Sequence[T] = ()

    def is_none_left() -> bool:
        nonlocal found
        found = find()
        return not found

    eventually(is_none_left, within_s)
    return found


def describe(pid: int) -> str:
    """What the kernel says of a process that should not be there: its state, what it waits in, its groups' freezer."""
    parts = [f"pid {pid}"]
    for name in ("cmdline", "status", "wchan", "stack", "cgroup"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parts.append(f"{name}: {text.strip()}")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        own = next(line.split(":", 2)[2] for line in lines if "freezer" in line.split(":")[1])
        parts.append("freezer: " + Path(f"/sys/fs/cgroup/freezer{own}/freezer.state").read_text().strip())
    return "\n".join(parts)
