"""Read an overlay's upper directory into a changeset, once the call is over.

How an upper says what happened, as seen on Linux 6.18 both ways of mounting: a deleted name is a character device
0:0 (a program inside cannot make one: EPERM); a directory that replaces a lower one carries the xattr opaque="y"; a
file is there in full, because metacopy is off; a renamed directory comes as copies, because redirect_dir is off
(rename gives EXDEV). The xattrs are `trusted.overlay.*`, or `user.overlay.*` when mounted with `userxattr`. Only one
of the two may be believed: on a plain mount a program can set `user.overlay.opaque` itself.
Source: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace.changeset import CONTENT, Before, Change, Changeset, check_record_id
from sandbox.workspace.collect import CHUNK_BYTES, write_all
from sandbox.workspace.git_dirs import mark_git_dirs
from sandbox.workspace.links import leads_outside
from sandbox.workspace.names import join
from sandbox.workspace.protected import (
    LINK_OUTSIDE,
    is_protected,
)
from sandbox.workspace.scan import entry_type
from sandbox.workspace.walk import Directory, Entry, Unreadable, remove_path, walk

_RESOLVE = files.RESOLVE_INSIDE | files.RESOLVE_NO_XDEV
_SKIPPED_MAX = 1000
_STALE_S = 60.0

# How much of the lower shows through a directory of the upper: all of it, none of it although it has one there,
# or it has none.
_Under = Literal["shows", "replaced", "absent"]


@dataclass(frozen=True, slots=True)
class Overlay:
    """An overlay whose call is over. `started_ns` is time.time_ns() from before the mount: what the host changed
    after it is marked stale. `userxattr` says how it was mounted."""

    upper_fd: int
    lower_fd: int
    lower_path: str
    userxattr: bool
    started_ns: int | None = None


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much a changeset may hold; more is skipped (bytes) or refused (entries)."""

    total_bytes: int = 4 << 30
    entries: int = 200_000


def capture(overlay: Overlay, store_dir: Path, *, record_id: str, limits: StoreLimits) -> Changeset:
    """Copy what the call wrote into `store_dir`/`record_id` and describe it against the lower directory.

    The directory appears whole or not at all. Raises WorkspaceError (more entries than `limits` allows).
    """
    final = store_dir / check_record_id(record_id)
    partial = store_dir / f"{record_id}.partial"
    store_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_stale(store_dir)
    partial.mkdir(mode=0o700)
    lock_fd = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX)
        (partial / CONTENT).mkdir(mode=0o700)
        reader = _Reader(overlay, partial / CONTENT, limits)
        reader.read()
        changes = mark_git_dirs(reader.changes, overlay.lower_fd)
        changeset = Changeset(
            record_id=record_id,
            lower_path=overlay.lower_path,
            lower_ino=os.fstat(overlay.lower_fd).st_ino,
            changes=tuple(sorted(changes, key=lambda change: change.path)),
            skipped=tuple(reader.skipped),
            created_ns=time.time_ns(),
            directory=final,
        )
        if not changes and not reader.skipped:
            remove_path(str(partial))
            return replace(changeset, directory=None)
        changeset.save(partial)
        partial.rename(final)
    except BaseException:
        remove_path(str(partial))
        raise
    finally:
        os.close(lock_fd)
    return changeset


def _remove_stale(store_dir: Path) -> None:
    """Remove what captures left that were killed: nobody holds its lock, and it is not just being made."""
    for path in store_dir.glob("*.partial"):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue  # finished or removed meanwhile
        try:
            if time.time() - os.fstat(fd).st_mtime > _STALE_S:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_path(str(path))
        except OSError:
            continue  # somebody is still writing it, or removes it as well
        finally:
            os.close(fd)


class _Reader:
    def __init__(self, overlay: Overlay, content_dir: Path, limits: StoreLimits) -> None:
        self.changes: list[Change] = []
        self.skipped: list[tuple[str, str]] = []
        self._overlay = overlay
        self._content_dir = content_dir
        self._limits = limits
        self._prefix = "user.overlay." if overlay.userxattr else "trusted.overlay."
        self._under: dict[str, _Under] = {"": "shows"}
        self._stored = 0
        self._bytes = 0

    def read(self) -> None:
        for directory in walk(self._overlay.upper_fd, resolve=_RESOLVE, unlock=lambda _: True):
            if isinstance(directory, Unreadable):
                self._skip(directory.path, directory.reason)
                continue
            under = self._under.pop(directory.path)
            lower_fd = self._open_lower(directory.path) if under != "absent" else None
            try:
                self._read_directory(directory, under, lower_fd)
            finally:
                if lower_fd is not None:
                    os.close(lower_fd)

    def _read_directory(self, directory: Directory, under: _Under, lower_fd: int | None) -> None:
        seen: set[str] = set()
        for entry in directory.entries():
            seen.add(entry.name)
            lower = files.lstat_at(lower_fd, entry.name) if lower_fd is not None else None
            if stat.S_ISCHR(entry.status.st_mode) and entry.status.st_rdev == 0:
                if lower is not None and lower_fd is not None:
                    self._deleted(lower_fd, entry.name, entry.path, lower)
                continue
            if entry.is_dir:
                self._read_subdirectory(directory, entry, under, lower)
            elif stat.S_ISREG(entry.status.st_mode):
                self._read_file(directory, entry, lower_fd, lower)
            elif stat.S_ISLNK(entry.status.st_mode):
                self._read_link(directory, entry, lower_fd, lower)
            else:
                self._skip(entry.path, "special-file")
            if lower is not None and lower_fd is not None and stat.S_ISDIR(lower.st_mode) and not entry.is_dir:
                self._deleted_below(lower_fd, entry.name, entry.path)
        if under == "replaced" and lower_fd is not None:
            with os.scandir(lower_fd) as items:
                missing = [item.name for item in items if item.name not in seen]
            for name in missing:
                status = files.lstat_at(lower_fd, name)
                if status is not None:
                    self._deleted(lower_fd, name, join(directory.path, name), status)

    def _read_subdirectory(
        self, directory: Directory, entry: Entry, under: _Under, lower: os.stat_result | None
    ) -> None:
        if entry.too_deep:
            self._skip(entry.path, "too-deep")
            return
        if lower is not None and stat.S_ISDIR(lower.st_mode):
            replaced = under == "replaced" or self._is_opaque(directory.fd, entry.name)
            self._under[entry.path] = "replaced" if replaced else "shows"
            if _mode(lower) != _mode(entry.status):
                self._add(Change(entry.path, "mode", "dir", _mode(entry.status), before=self._before(lower)), lower)
            return
        self._under[entry.path] = "absent"
        kind: Literal["added", "modified"] = "added" if lower is None else "modified"
        before = self._before(lower) if lower is not None else None
        self._add(Change(entry.path, kind, "dir", _mode(entry.status), before=before), lower)

    def _is_opaque(self, dir_fd: int, name: str) -> bool:
        fd = files.open_beneath(dir_fd, name, os.O_PATH | os.O_DIRECTORY)
        try:
            return files.get_xattr(fd, self._prefix + "opaque") == b"y"
        finally:
            os.close(fd)

    def _read_file(
        self, directory: Directory, entry: Entry, lower_fd: int | None, lower: os.stat_result | None
    ) -> None:
        try:
            stored = self._store(directory.fd, entry)
        except OSError as error:
            self._skip(entry.path, errno.errorcode.get(error.errno or 0, "EIO"))
            return
        if stored is None:
            return
        content, size, sha256 = stored
        change = Change(entry.path, "added", "file", _mode(entry.status), size, sha256, content)
        if lower is not None:
            lower_sha256 = ""
            if lower_fd is not None and stat.S_ISREG(lower.st_mode) and lower.st_size == size:
                lower_sha256 = _hash_file(lower_fd, entry.name)
            same = lower_sha256 == sha256
            change = replace(change, kind="modified", before=self._before(lower, lower_sha256))
            if same:
                (self._content_dir / content).unlink()
                change = replace(change, kind="mode", content="")
            if same and _mode(lower) == _mode(entry.status):
                return  # copied up and never changed, or changed back
        self._add(change, lower)

    def _read_link(
        self, directory: Directory, entry: Entry, lower_fd: int | None, lower: os.stat_result | None
    ) -> None:
        target = os.readlink(entry.name, dir_fd=directory.fd)
        change = Change(entry.path, "added", "symlink", target=target)
        if lower is not None and lower_fd is not None:
            if stat.S_ISLNK(lower.st_mode) and os.readlink(entry.name, dir_fd=lower_fd) == target:
                return
            change = replace(change, kind="modified", before=self._before(lower))
        self._add(change, lower)

    def _deleted(self, lower_fd: int, name: str, path: str, status: os.stat_result) -> None:
        self._add(Change(path, "deleted", entry_type(status), before=self._before(status)), status)
        if stat.S_ISDIR(status.st_mode):
            self._deleted_below(lower_fd, name, path)

    def _deleted_below(self, lower_fd: int, name: str, path: str) -> None:
        """Everything in a deleted directory by name: what the host adds there later is then not deleted with it."""
        try:
            fd = files.open_directory(lower_fd, name, resolve=_RESOLVE)
        except OSError as error:
            self._skip(path, errno.errorcode.get(error.errno or 0, "EIO"))
            return
        try:
            for directory in walk(fd, resolve=_RESOLVE):
                if isinstance(directory, Unreadable):
                    self._skip(join(path, directory.path), directory.reason)
                    continue
                for entry in directory.entries():
                    before = self._before(entry.status)
                    type_ = entry_type(entry.status)
                    self._add(Change(f"{path}/{entry.path}", "deleted", type_, before=before), entry.status)
        finally:
            os.close(fd)

    def _store(self, dir_fd: int, entry: Entry) -> tuple[str, int, str] | None:
        """Copy one file into the store: its name there, size and digest. None when it was skipped."""
        if entry.status.st_size > self._limits.total_bytes - self._bytes:
            self._skip(entry.path, "too-large")
            return None
        fd = _open_readable(dir_fd, entry.name)
        try:
            if files.get_xattr(fd, self._prefix + "metacopy") is not None:
                self._skip(entry.path, "metacopy")  # the data is in the lower; such a mount is not ours
                return None
            self._stored += 1
            content = f"{self._stored:06d}"
            size, sha256 = _copy(fd, self._content_dir / content, entry.status.st_size)
        finally:
            os.close(fd)
        self._bytes += size
        return content, size, sha256

    def _open_lower(self, path: str) -> int | None:
        try:
            return files.open_directory(self._overlay.lower_fd, path, resolve=_RESOLVE)
        except OSError:
            return None  # the host took it away, or put a link there: nothing of it can be compared

    def _before(self, status: os.stat_result, sha256: str = "") -> Before:
        return Before(
            entry_type(status),
            _mode(status),
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            status.st_ino,
            sha256,
        )

    def _add(self, change: Change, lower: os.stat_result | None) -> None:
        if len(self.changes) >= self._limits.entries:
            raise WorkspaceError(
                f"the call changed more than {self._limits.entries:,} paths, too many to keep as a changeset",
                hint="give the tool a private workspace and collect what is needed",
            )
        started = self._overlay.started_ns
        # A directory's ctime changes with its entries, which have states of their own.
        is_file = lower is not None and not stat.S_ISDIR(lower.st_mode)
        stale = started is not None and lower is not None and is_file and lower.st_ctime_ns > started
        rule = is_protected(change.path, type_=change.type) or ""
        if change.type == "symlink" and not rule and change.kind != "deleted":
            rule = LINK_OUTSIDE if leads_outside(change.path, change.target) else ""
        self.changes.append(replace(change, protected=rule, stale=stale))

    def _skip(self, path: str, reason: str) -> None:
        if len(self.skipped) < _SKIPPED_MAX:
            self.skipped.append((path, reason))
        elif len(self.skipped) == _SKIPPED_MAX:
            self.skipped.append(("", "more-skipped"))


def _mode(status: os.stat_result) -> int:
    return stat.S_IMODE(status.st_mode) & 0o777


def _open_readable(dir_fd: int, name: str) -> int:
    """Open a regular file of the upper, taking away what keeps its owner from reading it."""
    try:
        return files.open_regular(dir_fd, name)
    except PermissionError:
        path_fd = files.open_beneath(dir_fd, name, os.O_PATH)
        try:
            status = os.fstat(path_fd)
            if not stat.S_ISREG(status.st_mode):
                raise
            os.chmod(files.proc_path(path_fd), stat.S_IMODE(status.st_mode) | stat.S_IRUSR)
            return files.reopen(path_fd, os.O_RDONLY)
        finally:
            os.close(path_fd)


def _copy(fd: int, path: Path, size: int) -> tuple[int, str]:
    out_fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        digest = hashlib.sha256()
        copied = 0
        for chunk in _read_chunks(fd, size):
            write_all(out_fd, chunk)
            digest.update(chunk)
            copied += len(chunk)
    finally:
        os.close(out_fd)
    return copied, digest.hexdigest()


def _hash_file(dir_fd: int, name: str) -> str:
    try:
        fd = files.open_regular(dir_fd, name)
    except OSError:
        return ""
    try:
        digest = hashlib.sha256()
        for chunk in _read_chunks(fd, os.fstat(fd).st_size):
            digest.update(chunk)
        return digest.hexdigest()
    finally:
        os.close(fd)


def _read_chunks(fd: int, size: int) -> Iterator[bytes]:
    left = size
    while left > 0 and (chunk := os.read(fd, min(CHUNK_BYTES, left))):
        left -= len(chunk)
        yield chunk
