"""Pages of the calling process that a fork shares: which of them will be written to, and copying those at once.

The first write to a shared page costs a fault, in which the kernel copies it; the first look at a page of a file costs
one, too. Where it is known which pages will be needed, one call does the same for all of them in half of the
time, and at a moment of our choosing. Source: madvise(2) MADV_POPULATE_WRITE (Linux 5.14), process_madvise(2),
Documentation/admin-guide/mm/pagemap.rst, PIDFD_SELF in linux/pidfd.h (Linux 6.15).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from sandbox._linux import syscalls
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # (address, bytes)
    Run = tuple[int, int]

_POPULATE_READ, _POPULATE_WRITE = 22, 23
_PIDFD_SELF = -10001
_RUNS_MAX = 1024  # IOV_MAX
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_PRESENT, _SHARED, _EXCLUSIVE = 1 << 63, 1 << 61, 1 << 56
# Mappings beyond that are data of some library, of which little is touched.
_MAPPING_MAX_BYTES = 256 << 20
_ENTRY_BYTES = 8
# The process may have given memory back meanwhile, and no kernel has to do it: it only saves time.
_NO_MATTER = dict.fromkeys((errno.EINVAL, errno.ENOMEM, errno.EFAULT, errno.ENOSYS, errno.EPERM))


class Pages:
    """What a process touches of what it shares with another: runs of pages that it writes to, or looks at in files."""

    def __init__(self, written: list[Run], read: list[Run]) -> None:
        self.written = written
        self.read = read

    def __repr__(self) -> str:
        counts = [sum(size for _, size in runs) // _PAGE_BYTES for runs in (self.written, self.read)]
        return f"<Pages written={counts[0]} read={counts[1]}>"

    def add_populate(self, batch: Batch) -> None:
        """Calls that make all of these the process's own, and present, now."""
        at_once = _takes_many_at_once()
        for runs, advice in ((self.written, _POPULATE_WRITE), (self.read, _POPULATE_READ)):
            if at_once:
                _add_many(batch, runs, advice)
                continue
            for address, size in runs:
                batch.add("madvise", syscalls.number("madvise"), address, size, advice, instead=_NO_MATTER)


def _add_many(batch: Batch, runs: list[Run], advice: int) -> None:
    for first in range(0, len(runs), _RUNS_MAX):
        some = runs[first : first + _RUNS_MAX]
        vector = batch.address(struct.pack(f"={2 * len(some)}Q", *(number for run in some for number in run)))
        args = (_PIDFD_SELF, vector, len(some), advice, 0)
        batch.add("process_madvise", syscalls.NR_PROCESS_MADVISE, *args, instead=_NO_MATTER)


def _takes_many_at_once() -> bool:
    """Whether this kernel lets a process advise on many ranges of its own. Tried with a page that is there anyway."""
    page = ctypes.create_string_buffer(2 * _PAGE_BYTES)
    address = (ctypes.addressof(page) + _PAGE_BYTES - 1) // _PAGE_BYTES * _PAGE_BYTES
    vector = (ctypes.c_uint64 * 2)(address, _PAGE_BYTES)
    number = syscalls.NR_PROCESS_MADVISE
    try:
        return syscalls.call("process_madvise", number, _PIDFD_SELF, vector, 1, _POPULATE_WRITE, 0) == _PAGE_BYTES
    except OSError:
        return False


def touched_after_fork(act: Callable[[], object]) -> Pages:
    """What `act` touches in a forked child, in which it is called without Python's own acts after a fork.

    None where that cannot be told. Only for single-threaded processes. Raises OSError when there is no fork.
    """
    mappings = _mappings()
    entries = [address // _PAGE_BYTES * _ENTRY_BYTES for first, end, _ in mappings for address in (first, end)]
    ranges = struct.pack(f"={len(entries)}Q", *entries)
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    pid = syscalls.fork()
    if pid == 0:
        _tell_pages(act, ranges, write_end)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    return _pages(mappings, data)


def _mappings() -> list[tuple[int, int, bool]]:
    """(first address, end, whether it may be written to) of private memory and of files of code."""
    found = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, access, _, _, inode = line.split(None, 5)[:5]
            first, end = (int(text, 16) for text in addresses.split("-"))
            is_file = inode != "0"
            if end - first <= _MAPPING_MAX_BYTES and (access == "rw-p" or (is_file and access in ("r--p", "r-xp"))):
                found.append((first, end, access == "rw-p"))
    return found


def _tell_pages(act: Callable[[], object], ranges: bytes, to_fd: int) -> None:
    """In the child: hand over our page table. It makes little of its own, for that is in the table. Does not return."""
    try:
        act()
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        for at, stop in struct.iter_unpack("=QQ", ranges):
            while at < stop:
                at += os.write(to_fd, os.pread(pagemap, min(_PAGE_BYTES, stop - at), at) or b"\0" * _ENTRY_BYTES)
        os._exit(0)
    finally:
        # Whatever failed, what was told is too short, and nothing is made of it.
        os._exit(1)


def _pages(mappings: list[tuple[int, int, bool]], table: bytes) -> Pages:
    pages = Pages([], [])
    if len(table) != sum(end - first for first, end, _ in mappings) // _PAGE_BYTES * _ENTRY_BYTES:
        return pages
    at = 0
    for first, end, is_writable in mappings:
        count = (end - first) // _PAGE_BYTES
        entries = struct.unpack_from(f"={count}Q", table, at)
        at += count * _ENTRY_BYTES
        if is_writable:
            _add_runs(pages.written, first, [_is_own(entry) for entry in entries])
        else:
            _add_runs(pages.read, first, [bool(entry & _PRESENT) for entry in entries])
    return pages


def _add_runs(runs: list[Run], first: int, is_touched: list[bool]) -> None:
    for index, touched in enumerate(is_touched):
        if not touched:
            continue
        address = first + index * _PAGE_BYTES
        if runs and address == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + _PAGE_BYTES)
        else:
            runs.append((address, _PAGE_BYTES))


def _is_own(entry: int) -> bool:
    return bool(entry & _PRESENT and entry & _EXCLUSIVE and not entry & _SHARED)
