"""What a host directory holds before a call may write to it: the measure for the sweep afterwards.

`scan` notes type, mode, size, times and inode of every entry, finds the protected paths that exist already (the
launcher binds those read-only inside) and keeps a copy of the small ones, so that the sweep can put them back.
It follows no link; it does enter other mounts below the directory, because the jail's bind carries those along.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace.names import join, printable
from sandbox.workspace.protected import (
    GIT_BARE,
    EntryType,
    acts_in_git_dir,
    is_allowed,
    is_git_dir,
    is_protected,
    is_protected_dir,
)
from sandbox.workspace.walk import Directory, Entry, Unreadable, walk

MAX_ENTRIES = 500_000
_NAME_BYTES_MAX = 128 << 20
_KEPT_FILE_BYTES = 1 << 20
_KEPT_TOTAL_BYTES = 16 << 20

# One entry, packed: half a million of them as tuples of integers would take 200 MB of the supervisor.
_PACKED = struct.Struct("<IQqqQ")


@dataclass(frozen=True, slots=True)
class EntryState:
    """What one entry was: `mode` includes the type. ctime cannot be set by a program, so a change shows."""

    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    ino: int

    @classmethod
    def of(cls, status: os.stat_result) -> EntryState:
        return cls(status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def pack(status: os.stat_result) -> bytes:
    """An entry's state in comparable form. A directory's is its mode and inode: the rest follows from its contents."""
    if stat.S_ISDIR(status.st_mode):
        return _PACKED.pack(status.st_mode, 0, 0, 0, status.st_ino)
    size = status.st_size
    return _PACKED.pack(status.st_mode, size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, slots=True)
class Kept:
    """A protected file's contents, or a protected link's target, as they were."""

    mode: int
    data: bytes


@dataclass(slots=True)
class Scan:
    """Every entry by directory and name; `entry` unpacks one.

    `protected` are existing files and whole directories, topmost only, that the call may not change;
    `protected_links` the links among them, which cannot be bound over. Directories that could not be read stand in
    `unreadable` with their state. `apart`: directories, by device and inode, that the call cannot reach.
    """

    directories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    protected: list[str] = field(default_factory=list)
    protected_links: list[str] = field(default_factory=list)
    kept: dict[str, Kept] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    apart: frozenset[tuple[int, int]] = frozenset()
    root: bytes = b""
    count: int = 0

    def entry(self, path: str) -> EntryState | None:
        directory, _, name = path.rpartition("/")
        packed = self.directories.get(directory, {}).get(name)
        return EntryState(*_PACKED.unpack(packed)) if packed is not None else None

    def paths(self) -> Iterator[str]:
        return (join(directory, name) for directory, names in self.directories.items() for name in names)

    def __len__(self) -> int:
        return self.count


def scan(
    root_fd: int,
    *,
    max_entries: int = MAX_ENTRIES,
    allow: Sequence[str] = (),
    apart: frozenset[tuple[int, int]] = frozenset(),
) -> Scan:
    """Note everything below `root_fd`; what `allow` grants is not listed as protected.

    `apart`: directories, by device and inode, that are covered inside. Neither this nor the sweep looks into them.

    Raises WorkspaceError when there is more than can be watched.
    """
    scanner = _Scanner(max_entries, tuple(allow))
    scanner.result.apart = apart
    scanner.result.root = pack(os.fstat(root_fd))
    for directory in walk(root_fd):
        if isinstance(directory, Unreadable):
            scanner.result.unreadable[directory.path] = directory.reason
        else:
            scanner.note_directory(directory)
    return scanner.result


class _Scanner:
    def __init__(self, max_entries: int, allow: tuple[str, ...]) -> None:
        self.result = Scan()
        self._max_entries = max_entries
        self._allow = allow
        self._name_bytes = 0
        self._kept_bytes = 0
        self._covered: set[str] = set()  # directories inside a protected one

    def note_directory(self, directory: Directory) -> None:
        names = self.result.directories[directory.path] = {}
        self._name_bytes += len(directory.path)
        for entry in directory.entries():
            names[entry.name] = pack(entry.status)
            self._count(entry.name)
            if directory.stay_out(entry, self.result.apart):
                continue
            if entry.is_dir:
                self._note_subdirectory(directory, entry)
            else:
                rule = is_protected(entry.path, self._allow, type_=entry_type(entry.status))
                if rule:
                    self._note_protected(directory, entry.name, entry.status)
        self._note_git_dir(directory, names)

    def _count(self, name: str) -> None:
        self.result.count += 1
        self._name_bytes += len(name)
        if self.result.count > self._max_entries or self._name_bytes > _NAME_BYTES_MAX:
            raise WorkspaceError(
                f"the workspace holds more than {self._max_entries:,} entries, too many to watch in rw mode",
                hint="use mode cow, which needs no watching, or give a smaller directory as the workspace",
            )

    def _note_subdirectory(self, directory: Directory, entry: Entry) -> None:
        if entry.too_deep:
            raise WorkspaceError(
                f"the workspace is too deep to watch in rw mode: {printable(entry.path[:120])}…",
                hint="use mode cow, which needs no watching, or give a smaller directory as the workspace",
            )
        covered = directory.path in self._covered
        if covered or is_protected_dir(entry.path, self._allow):
            self._covered.add(entry.path)
            if not covered:
                self.result.protected.append(entry.path)

    def _note_protected(self, directory: Directory, name: str, status: os.stat_result) -> None:
        path = join(directory.path, name)
        if stat.S_ISLNK(status.st_mode):
            self.result.protected_links.append(path)
        elif directory.path not in self._covered:
            self.result.protected.append(path)
        kept = read_kept(directory.fd, name, status, _KEPT_TOTAL_BYTES - self._kept_bytes)
        if kept is not None:
            self.result.kept[path] = kept
            self._kept_bytes += len(kept.data)

    def _note_git_dir(self, directory: Directory, names: dict[str, bytes]) -> None:
        """Protect what acts in a bare repository, which no rule over single paths can see."""
        if not is_git_dir(directory.path, names.__contains__):
            return
        for name in names:
            path = join(directory.path, name)
            status = files.lstat_at(directory.fd, name)
            if status is None or not acts_in_git_dir(name) or is_allowed(GIT_BARE, path, self._allow):
                continue
            if stat.S_ISDIR(status.st_mode):
                self.result.protected.append(path)
                self._covered.add(path)
            else:
                self._note_protected(directory, name, status)


def entry_type(status: os.stat_result) -> EntryType:
    """The entry's type in the words of the rules."""
    kinds: dict[int, EntryType] = {stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink"}
    return kinds.get(stat.S_IFMT(status.st_mode), "special")


def read_kept(dir_fd: int, name: str, status: os.stat_result, room_bytes: int) -> Kept | None:
    """A copy small enough to keep, or None: too large, not ours to read, or gone."""
    try:
        if stat.S_ISLNK(status.st_mode):
            return Kept(status.st_mode, os.fsencode(os.readlink(name, dir_fd=dir_fd)))
        if not stat.S_ISREG(status.st_mode) or status.st_size > min(_KEPT_FILE_BYTES, room_bytes):
            return None
        fd = files.open_regular(dir_fd, name)
        try:
            data = os.read(fd, status.st_size + 1)
        finally:
            os.close(fd)
    except OSError:
        return None  # the sweep then sets a changed one aside without putting the old one back, and says so
    return Kept(status.st_mode, data) if len(data) == status.st_size else None
