"""Take an entry out of a workspace: move it into a quarantine directory, copy it there, or remove it.

The quarantine is a directory of ours (mode 0700, in the state directory). Entries get numbers for names, lose
execute and privilege bits, and are described line by line in `index.jsonl`, so nothing about them has to be trusted
or decoded to list them. Moving is a rename; across file systems small files are copied, everything else is removed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import dataclass

from sandbox._linux import files
from sandbox.workspace.collect import CHUNK_BYTES, write_all
from sandbox.workspace.names import to_json
from sandbox.workspace.walk import open_up, remove

_COPY_MAX_BYTES = 64 << 20
INDEX = "index.jsonl"


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One entry taken out: why, what became of it (moved, copied, removed, failed:ERRNO) and under which number."""

    path: str
    rule: str
    action: str
    stored: str = ""
    restored: bool = False

    def to_json(self) -> dict[str, str | bool]:
        return {
            "path": to_json(self.path),
            "rule": self.rule,
            "action": self.action,
            "stored": self.stored,
            "restored": self.restored,
        }


class Quarantine:
    """Where entries go. Numbers continue after those already in the directory."""

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        self._next = 1
        status = os.fstat(dir_fd)
        self.identity = (status.st_dev, status.st_ino)

    def take(self, dir_fd: int, name: str, path: str, rule: str) -> Quarantined:
        """Take `name` out of `dir_fd`. Never raises for what the entry is; `action` says how it went."""
        status = files.lstat_at(dir_fd, name)
        if status is None:
            return Quarantined(path, rule, "gone")
        try:
            if stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                action, stored = self._store(dir_fd, name, status)
            else:
                os.unlink(name, dir_fd=dir_fd)  # a fifo or device kept aside would only wait for somebody to open it
                action, stored = "removed", ""
        except OSError as error:
            action, stored = f"failed:{errno.errorcode.get(error.errno or 0, 'EIO')}", ""
        return Quarantined(path, rule, action, stored)

    def note(self, taken: Quarantined, was: os.stat_result | None) -> None:
        """Write the line that says what was taken."""
        line = taken.to_json() | ({"mode": was.st_mode, "size": was.st_size} if was is not None else {})
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(INDEX, flags, 0o600, dir_fd=self._dir_fd)
        try:
            write_all(fd, json.dumps(line).encode() + b"\n")
        finally:
            os.close(fd)

    def _store(self, dir_fd: int, name: str, status: os.stat_result) -> tuple[str, str]:
        if stat.S_ISDIR(status.st_mode):
            _open_up_at(dir_fd, name)
        # A file with other links is copied: its mode is theirs as well, and one of them may be the host's own.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink == 1:
            try:
                stored = self._move(dir_fd, name)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            else:
                self._defuse(stored)
                return "moved", stored
        if stat.S_ISREG(status.st_mode) and status.st_size <= _COPY_MAX_BYTES:
            stored = self._copy(dir_fd, name)
            os.unlink(name, dir_fd=dir_fd)
            return "copied", stored
        remove(dir_fd, name)
        return "removed", ""

    def _move(self, dir_fd: int, name: str) -> str:
        while True:
            stored = f"{self._next:06d}"
            self._next += 1
            try:
                files.rename_noreplace(dir_fd, name, self._dir_fd, stored)
            except FileExistsError:
                continue
            return stored

    def _defuse(self, stored: str) -> None:
        path_fd = files.open_beneath(self._dir_fd, stored, os.O_PATH)
        try:
            status = os.fstat(path_fd)
            if not stat.S_ISLNK(status.st_mode):
                files.drop_privilege_bits(path_fd)
                os.chmod(files.proc_path(path_fd), 0o700 if stat.S_ISDIR(status.st_mode) else 0o600)
        finally:
            os.close(path_fd)

    def _copy(self, dir_fd: int, name: str) -> str:
        stored = f"{self._next:06d}"
        while files.lstat_at(self._dir_fd, stored) is not None:
            self._next += 1
            stored = f"{self._next:06d}"
        self._next += 1
        in_fd = files.open_regular(dir_fd, name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            out_fd = os.open(stored, flags, 0o600, dir_fd=self._dir_fd)
            try:
                copied = 0
                while copied < _COPY_MAX_BYTES and (chunk := os.read(in_fd, CHUNK_BYTES)):
                    write_all(out_fd, chunk)
                    copied += len(chunk)
            finally:
                os.close(out_fd)
        finally:
            os.close(in_fd)
        return stored


def _open_up_at(dir_fd: int, name: str) -> None:
    """A directory that its owner may not write cannot be moved to another parent."""
    path_fd = files.open_beneath(dir_fd, name, os.O_PATH | os.O_DIRECTORY)
    try:
        open_up(path_fd)
    finally:
        os.close(path_fd)
