"""Which unprivileged host uid a jail gets.

Root gives each jail an own uid from a range that no account uses, so that two jails cannot touch each other's files
or processes even where a namespace failed; an ordinary user can map nothing but himself.
Source: user_namespaces(7), /proc/PID/uid_map.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

FIRST_UID = 0x70000000
RANGE = 1 << 18
# A template gives an own uid to each of its children, in turn.
BLOCK = 64
INITIAL_MAP_LENGTH = 4294967295


def mapped_ranges(text: str) -> list[tuple[int, int]]:
    """(first inside id, length) of each line of a uid_map."""
    return [(int(fields[0]), int(fields[2])) for fields in (line.split() for line in text.splitlines())]


def choose_range(ranges: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The range of ids to give to jails: (first, length), or None where only our own id is mapped.

    In the initial namespace that is FIRST_UID on, above what accounts, containers and systemd use. In a container the
    upper half of the longest range, away from its accounts.
    """
    first, length = max(ranges, key=lambda item: item[1])
    if first <= FIRST_UID and first + length >= FIRST_UID + RANGE:
        return FIRST_UID, RANGE
    usable = length - length // 2
    if length < 1024:
        return None
    return first + length // 2, min(usable, RANGE)


def gateway_uid() -> int | None:
    """A uid for the egress gateway, from the block that no jail gets; None for an ordinary user."""
    chosen = _chosen_range()
    if chosen is None:
        return None
    first, length = chosen
    return first + (length // BLOCK - 1) * BLOCK + os.getpid() % BLOCK


def host_uids() -> Iterator[int] | None:
    """An endless supply of blocks of BLOCK uids for jails, by their first uid; None for an ordinary user."""
    chosen = _chosen_range()
    if chosen is None:
        return None
    first, length = chosen
    # Not from the start each time: two supervisors at once should not hand out the same uids in the same order.
    blocks = length // BLOCK - 1
    return (first + (os.getpid() * 16 + index) % blocks * BLOCK for index in itertools.count())


def _chosen_range() -> tuple[int, int] | None:
    if os.geteuid() != 0:
        return None
    with open("/proc/self/uid_map", encoding="utf-8") as file:
        return choose_range(mapped_ranges(file.read()))
