"""One append-only chain of entries in segment files, written by the one process that holds its lock.

Kernel interfaces: open(2) with O_APPEND, write(2), ftruncate(2), fdatasync(2), flock(2). The lock follows the open file
description: it is gone when its holder is, however that died, provided no child inherited the descriptor
(it is close-on-exec, so only a child that never executes would keep it).

A failed write is taken back to the last good length, so that what was acknowledged stays readable and the chain
goes on when the disk has room again. Not defended against: another process of the same user that writes
the files; `verify` finds what it did, except a cut at the end.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from sandbox.audit.canonical import encode
from sandbox.audit.entry import ENTRY_MAX_BYTES, FIRST_SEQ, genesis, seal, segment_name
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Literal

    from sandbox.audit.entry import EntryKind

    Durability = Literal["flush", "fsync"]

SEGMENT_MAX_BYTES = 16 * 1024 * 1024
OWED_MAX = 1000
LOCK = "lock"
CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Appended:
    """Where an entry stands: its sequence number and its hash (hex). `line`: its bytes, as they were stored."""

    seq: int
    hash: str
    line: bytes


@dataclass(slots=True)
class Position:
    """The end of a chain: what the next entry links to, and where in which segment it goes."""

    seq: int
    hash: str
    segment_nr: int = 1
    size_bytes: int = 0
    open_records: set[str] = field(default_factory=set)


class Chain:
    """The writing end. Thread-safe; `append` returns when write(2) did, `sync` when fdatasync(2) did.

    The files are made at the first append, so that a supervisor without calls leaves nothing behind.
    `state` is the state directory, which holds `chains/<chain_id>/` and the index `live/<chain_id>`.
    """

    def __init__(self, state: Path, chain_id: str, *, segment_max_bytes: int = SEGMENT_MAX_BYTES) -> None:
        self.state = state
        self.chain_id = chain_id
        self.path = state / "chains" / chain_id
        self._segment_max_bytes = segment_max_bytes
        self._position = Position(FIRST_SEQ - 1, genesis(chain_id))
        self._dir_fd = self._lock_fd = self._segment_fd = -1
        self._dirty = False
        self._closed = False
        self._synced_seq = FIRST_SEQ - 1
        self._owed: dict[str, Mapping[str, Any]] = {}
        self._write_lock = Lock()
        self._sync_lock = Lock()

    @classmethod
    def resume(cls, state: Path, chain_id: str, position: Position, lock_fd: int) -> Chain:
        """Go on with a chain whose owner died. Takes over `lock_fd`, on which the caller holds the lock."""
        chain = cls(state, chain_id)
        chain._position = position
        chain._synced_seq = position.seq
        chain._lock_fd = lock_fd
        chain._dir_fd = os.open(chain.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return chain

    def __repr__(self) -> str:
        return f"<Chain {self.chain_id} seq={self._position.seq} open={len(self._position.open_records)}>"

    @property
    def seq(self) -> int:
        """The last entry's sequence number; 0 before the first."""
        return self._position.seq

    @property
    def head(self) -> str:
        """The last entry's hash, or the genesis value."""
        return self._position.hash

    @property
    def open_records(self) -> frozenset[str]:
        """Records with an opened entry and no closed one."""
        return frozenset(self._position.open_records)

    def append_opened(self, record: Mapping[str, Any], *, durability: Durability = "flush") -> Appended:
        return self.append("opened", record, durability=durability)

    def append_closed(self, record: Mapping[str, Any], *, durability: Durability = "flush") -> Appended:
        return self.append("closed", record, durability=durability)

    def append(self, kind: EntryKind, record: Mapping[str, Any], *, durability: Durability = "flush") -> Appended:
        """Add one entry; returns when it is written (flush) or on the disk (fsync). Raises AuditError."""
        return self.append_many([(kind, record)], durability=durability)[0]

    def append_many(
        self, entries: Iterable[tuple[EntryKind, Mapping[str, Any]]], *, durability: Durability = "flush"
    ) -> list[Appended]:
        """Add entries with one write and at most one fsync: all of them, or none and AuditError.

        A closed entry that the disk refused is owed: it is written with the next append, or at `close`, so that a
        call whose end was seen is not called lost later. Appending it again replaces what is owed.
        """
        with self._write_lock:
            if self._closed:
                raise AuditError(f"chain {self.chain_id} is closed")
            appended = self._append([(kind, record) for kind, record in entries])
        if durability == "fsync":
            self.sync()
        return appended

    def _append(self, entries: list[tuple[EntryKind, Mapping[str, Any]]]) -> list[Appended]:
        closing = {str(record.get("record_id", "")): record for kind, record in entries if kind == "closed"}
        retried = (record for name, record in self._owed.items() if name not in closing)
        owed: list[tuple[EntryKind, Mapping[str, Any]]] = [("closed", record) for record in retried]
        lines, appended, changed = self._seal([*owed, *entries])
        at = self._position
        try:
            self._write(b"".join(lines))
        except OSError as err:
            ended = {name: record for name, record in closing.items() if name in at.open_records}
            if len(self._owed) + len(ended) <= OWED_MAX:
                self._owed.update(ended)
            raise self._failed(err) from err
        self._owed.clear()
        if appended:
            at.seq, at.hash = appended[-1].seq, appended[-1].hash
        for name, is_open in changed.items():
            (at.open_records.add if is_open else at.open_records.discard)(name)
        return appended[len(owed) :]

    def _seal(
        self, entries: list[tuple[EntryKind, Mapping[str, Any]]]
    ) -> tuple[list[bytes], list[Appended], dict[str, bool]]:
        """The lines of entries that would follow, and which records they open or close. Changes nothing."""
        seq, head, already_open = self._position.seq, self._position.hash, self._position.open_records
        lines, appended = [], []
        changed: dict[str, bool] = {}
        for kind, record in entries:
            if kind != "notice":
                name = str(record.get("record_id", ""))
                _check_pairing(kind, name, is_open=changed.get(name, name in already_open))
                changed[name] = kind == "opened"
            line, head = seal(record, kind, self.chain_id, seq + 1, head)
            if len(line) > ENTRY_MAX_BYTES:
                raise AuditError(f"an entry of {len(line)} bytes is over the limit of {ENTRY_MAX_BYTES}")
            seq += 1
            lines.append(line)
            appended.append(Appended(seq, head, line))
        return lines, appended, changed

    def sync(self) -> None:
        """Return when everything appended before this call is on the disk; concurrent callers share one fdatasync.

        Raises AuditError; after it nothing is known about entries since the last good sync (see fsync(2), ERRORS).
        """
        wanted = self._position.seq
        with self._sync_lock:
            if self._synced_seq >= wanted:
                return
            with self._write_lock:
                reached, fd = self._position.seq, os.dup(self._segment_fd)
            try:
                os.fdatasync(fd)
                if self._synced_seq < FIRST_SEQ:
                    self._sync_directories()
            except OSError as err:
                raise AuditError(f"the audit chain could not be synced to disk: {err}", hint=_hint(err)) from err
            finally:
                os.close(fd)
            self._synced_seq = reached

    def close(self) -> None:
        """Release the lock. A chain without open records is marked clean, so that no later start reads it."""
        with self._write_lock:
            if self._closed:
                return
            self._closed = True
            try:
                if self._owed:
                    self._append([])
                if self._segment_fd >= 0 and not self._position.open_records:
                    self._take_back()
                    self._mark_clean()
            except (OSError, AuditError):
                pass  # The disk is full or gone: the chain stays in `live/`, and the next start finishes it.
            finally:
                for fd in (self._segment_fd, self._dir_fd, self._lock_fd):
                    if fd >= 0:
                        os.close(fd)
                self._segment_fd = self._dir_fd = self._lock_fd = -1

    def mark_clean(self) -> None:
        """Mark a resumed chain that needs no further entry. Raises OSError."""
        with self._write_lock:
            self._mark_clean()

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        if not data:
            return
        self._open_segment()
        self._take_back()
        if self._position.size_bytes and self._position.size_bytes + len(data) > self._segment_max_bytes:
            self._rotate()
        self._dirty = True
        rest = memoryview(data)
        while rest:
            # A disk that fills up first gives a short write; only the next one says ENOSPC.
            rest = rest[os.write(self._segment_fd, rest) :]
        self._dirty = False
        self._position.size_bytes += len(data)

    def _take_back(self) -> None:
        """Cut what a failed write left behind. Raises OSError; tried again before the next write."""
        if self._dirty:
            os.ftruncate(self._segment_fd, self._position.size_bytes)
            self._dirty = False

    def _failed(self, err: OSError) -> AuditError:
        try:
            self._take_back()
        except OSError:
            pass  # Still dirty: no entry is written until a later attempt has cut the remains off.
        return AuditError(f"the audit chain in {self.path} could not be written: {err}", hint=_hint(err))

    def _open_segment(self) -> None:
        if self._segment_fd >= 0:
            return
        if self._lock_fd < 0:
            self._create()
        self._segment_fd = self._open_file(segment_name(self._position.segment_nr))

    def _open_file(self, name: str, *flags: int) -> int:
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        for flag in flags:
            mode |= flag
        return os.open(name, mode, 0o600, dir_fd=self._dir_fd)

    def _create(self) -> None:
        """Make the directory, take the lock, then list the chain as live: recovery never meets it unlocked."""
        make_private_dirs(self.state)
        self.path.mkdir(mode=0o700, exist_ok=True)
        if self._dir_fd < 0:
            self._dir_fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        lock_fd = self._open_file(LOCK)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            live = self.state / "live" / self.chain_id
            os.close(os.open(live, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        except OSError:
            os.close(lock_fd)
            raise
        self._lock_fd = lock_fd

    def _rotate(self) -> None:
        end = self._position
        os.fdatasync(self._segment_fd)
        fresh = self._open_file(segment_name(end.segment_nr + 1), os.O_TRUNC)
        os.fsync(self._dir_fd)
        os.close(self._segment_fd)
        self._segment_fd = fresh
        end.segment_nr, end.size_bytes = end.segment_nr + 1, 0

    def _sync_directories(self) -> None:
        """A new file is only found again after a power cut when the directories that name it are on the disk."""
        os.fsync(self._dir_fd)
        for folder in (self.path.parent, self.state / "live", self.state):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _mark_clean(self) -> None:
        """Write the head beside the entries, then drop the chain from the index, in that order."""
        if self._segment_fd >= 0:
            os.fdatasync(self._segment_fd)
        marker = encode({"chain": self.chain_id, "seq": self._position.seq, "hash": self._position.hash}) + b"\n"
        fd = self._open_file(CLEAN + ".new", os.O_TRUNC)
        try:
            os.write(fd, marker)
            os.fdatasync(fd)
        finally:
            os.close(fd)
        os.rename(CLEAN + ".new", CLEAN, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        (self.state / "live" / self.chain_id).unlink(missing_ok=True)


def make_private_dirs(state: Path) -> None:
    """Make `state/chains` and `state/live`, readable for their owner only.

    Raises AuditError when one exists and others may write there: they could replace whole chains.
    """
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("chains", "live"):
        folder = state / name
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if facts.st_mode & 0o170022 != 0o040000 or (facts.st_uid != os.geteuid() and os.geteuid() != 0):
            raise AuditError(
                f"{folder} must be a directory that only its owner can write",
                hint=f"chown it to yourself and chmod 700 {folder}, or name another place with SANDBOX_STATE",
            )


def _check_pairing(kind: EntryKind, record_id: str, *, is_open: bool) -> None:
    """Keep the promise of one closed entry per opened one."""
    if not record_id:
        raise AuditError(f"an entry of kind {kind} needs a record_id")
    if kind == "opened" and is_open:
        raise AuditError(f"record {record_id} is already open")
    if kind == "closed" and not is_open:
        raise AuditError(f"record {record_id} is not open: it was never opened, or is closed already")


def _hint(err: OSError) -> str:
    return f"make room on the disk or name another place with SANDBOX_STATE (errno {err.errno})" if err.errno else ""
