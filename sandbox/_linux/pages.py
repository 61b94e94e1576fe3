"""Pages of the calling process that a fork shares and a child will write to: which they are, and copying them at once.

The first write to a shared page costs a fault, in which the kernel copies it. Where it is known which pages will be
written to, one madvise(2) for a run of them does the same without the faults, and at a time of our choosing.
Source: madvise(2) MADV_POPULATE_WRITE (Linux 5.14), Documentation/admin-guide/mm/pagemap.rst.
"""

from __future__ import annotations

import errno
import os
import struct

from sandbox._linux import syscalls
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_POPULATE_WRITE = 23
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _SHARED, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
# Mappings beyond that are data of some library, of which little is touched.
_MAPPING_MAX_BYTES = 256 << 20
_ENTRY_BYTES = 8
# The process may have given memory back meanwhile, and no kernel has to do it: it only saves time.
_NO_MATTER = dict.fromkeys((errno.EINVAL, errno.ENOMEM, errno.EFAULT, errno.ENOSYS, errno.EPERM))


def written_after_fork(before: Callable[[], object], act: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of the runs of pages that `act` writes to in a forked child, and `before` does not.

    Empty where that cannot be told. Only for single-threaded processes. Raises OSError when there is no fork.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        fields = [line.split(None, 2)[:2] for line in maps]
    places = [tuple(int(text, 16) for text in addresses.split("-")) for addresses, access in fields if access == "rw-p"]
    mappings = [(first, end) for first, end in places if end - first <= _MAPPING_MAX_BYTES]
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = syscalls.fork()
    if pid == 0:
        _tell_pages((before, act), mappings, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    size = sum(end - first for first, end in mappings) // _PAGE_BYTES * _ENTRY_BYTES
    if len(data) != 2 * size:
        return []
    runs: list[tuple[int, int]] = []
    at = 0
    for first, end in mappings:
        count = (end - first) // _PAGE_BYTES
        earlier, later = (struct.unpack_from(f"={count}Q", data, start + at) for start in (0, size))
        runs += _runs(first, earlier, later)
        at += count * _ENTRY_BYTES
    return runs


def _tell_pages(acts: Iterable[Callable[[], object]], mappings: list[tuple[int, int]], to_fd: int) -> None:
    """In the child: after each act hand over our page table, making little of our own. Does not return."""
    try:
        syscalls.after_fork_in_child()
        for act in acts:
            act()
            pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            for first, end in mappings:
                at, stop = (address // _PAGE_BYTES * _ENTRY_BYTES for address in (first, end))
                while at < stop:
                    at += os.write(to_fd, os.pread(pagemap, min(_PAGE_BYTES, stop - at), at) or b"\0" * 8)
            os.close(pagemap)
        os._exit(0)
    finally:
        # Whatever failed, what was told is too short, and nothing is made of it.
        os._exit(1)


def _runs(first: int, earlier: tuple[int, ...], later: tuple[int, ...]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index, (before, after) in enumerate(zip(earlier, later, strict=True)):
        if _is_own(after) and not _is_own(before):
            address = first + index * _PAGE_BYTES
            if runs and address == sum(runs[-1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + _PAGE_BYTES)
            else:
                runs.append((address, _PAGE_BYTES))
    return runs


def _is_own(entry: int) -> bool:
    return bool(entry & _PRESENT and entry & _EXCLUSIVE and not entry & _SHARED)


def add_copies(batch: Batch, runs: list[tuple[int, int]]) -> None:
    """Calls that make these pages the process's own now."""
    number = syscalls.number("madvise")
    for address, size in runs:
        batch.add("madvise", number, address, size, _POPULATE_WRITE, instead=_NO_MATTER)
