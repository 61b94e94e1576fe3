"""Bring files out of a finished call's workspace, as bounded data.

Nothing runs inside any more, but everything in the tree was put there by the tool. Only regular files come out, opened
below the given descriptor without following any link or entering another mount, read once, within bounds that are
checked before and while reading. What matched and does not come out is listed with a reason.
Does not defend against: hard links, which are the file itself; a tool can only link what it could reach.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from sandbox._linux import files as fs
from sandbox.errors import ManifestError
from sandbox.workspace.names import is_relative, parent_of
from sandbox.workspace.protected import is_protected
from sandbox.workspace.walk import Unreadable, walk

CHUNK_BYTES = 1 << 20
_SKIPPED_MAX = 1000
_RESOLVE = fs.RESOLVE_INSIDE | fs.RESOLVE_NO_XDEV


@dataclass(frozen=True, slots=True)
class CollectLimits:
    """How much may come out of one call. `visits` bounds the names looked at, matching or not."""

    files: int = 1000
    total_bytes: int = 64 << 20
    visits: int = 200_000


@dataclass(slots=True)
class Collected:
    """Files by path (empty for `collect_into`, which lists `written`); what matched and stayed, with the reason."""

    files: dict[str, bytes] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    skipped_more: int = 0
    total_bytes: int = 0

    def skip(self, path: str, reason: str) -> None:
        if len(self.skipped) < _SKIPPED_MAX:
            self.skipped.append((path, reason))
        else:
            self.skipped_more += 1


class _TooLarge(Exception):
    pass


class _Changed(Exception):
    pass


def collect(root_fd: int, patterns: Sequence[str], *, max_files: int = 1000, max_bytes: int = 64 << 20) -> Collected:
    """Read the files below `root_fd` that match any of `patterns`.

    Patterns are relative: "*" and "?" stay within one name and do not match a leading dot, "**" spans directories
    that do not start with one. Raises ManifestError for an absolute pattern or one with "..".
    """
    result = Collected()
    for path, fd in _matching(root_fd, patterns, CollectLimits(max_files, max_bytes), result):
        try:
            data = b"".join(_chunks(fd, max_bytes - result.total_bytes))
        except (_TooLarge, _Changed, OSError) as error:
            result.skip(path, reason_word(error))
            continue
        result.files[path] = data
        result.total_bytes += len(data)
    return result


def collect_into(
    root_fd: int,
    patterns: Sequence[str],
    dest_dir_fd: int,
    *,
    limits: CollectLimits = CollectLimits(total_bytes=1 << 30),
    allow_protected: Sequence[str] = (),
) -> Collected:
    """Copy the matching files below `dest_dir_fd`, under the same relative paths.

    A file already there is replaced in one step; a link, or a directory in its place, is left alone and the file
    skipped. Copies are never executable. Protected paths (`protected.RULES`) stay behind unless allowed.
    """
    result = Collected()
    for path, fd in _matching(root_fd, patterns, limits, result):
        rule = is_protected(path, allow_protected)
        if rule:
            result.skip(path, f"protected:{rule}")
            continue
        try:
            copied = copy_out(fd, dest_dir_fd, path, limits.total_bytes - result.total_bytes)
        except (_TooLarge, _Changed, OSError) as error:
            result.skip(path, reason_word(error))
            continue
        result.written.append(path)
        result.total_bytes += copied
    return result


def _matching(
    root_fd: int, patterns: Sequence[str], limits: CollectLimits, result: Collected
) -> Iterator[tuple[str, int]]:
    """Each matching regular file as (path, open descriptor), closed when the next one is asked for."""
    count = 0
    for path, name, directory_fd in _matching_names(root_fd, patterns, limits, result):
        if count >= limits.files:
            result.skip(path, "too-many-files")
            continue
        try:
            fd = fs.open_regular(directory_fd, name, resolve=_RESOLVE)
        except OSError as error:
            result.skip(path, reason_word(error))
            continue
        count += 1
        try:
            yield path, fd
        finally:
            os.close(fd)


def _matching_names(
    root_fd: int, patterns: Sequence[str], limits: CollectLimits, result: Collected
) -> Iterator[tuple[str, str, int]]:
    compiled = [parse_pattern(pattern) for pattern in patterns]
    visits = 0
    for directory in walk(root_fd, resolve=_RESOLVE) if compiled else ():
        if isinstance(directory, Unreadable):
            result.skip(directory.path, directory.reason)
            continue
        states = [_states_of(pattern, directory.path) for pattern in compiled]
        for entry in directory.entries():
            visits += 1
            if visits > limits.visits:
                result.skip(directory.path, "too-many-entries")
                return
            reached = [_advance(p, s, entry.name, stay=entry.is_dir) for p, s in zip(compiled, states, strict=True)]
            leads_on = any(state < len(p) for p, s in zip(compiled, reached, strict=True) for state in s)
            if entry.is_dir:
                if not leads_on:
                    directory.do_not_enter(entry.name)
                elif entry.too_deep:
                    result.skip(entry.path, "too-deep")
            elif any(len(p) in s for p, s in zip(compiled, reached, strict=True)):
                yield entry.path, entry.name, directory.fd
            elif leads_on and stat.S_ISLNK(entry.status.st_mode):
                result.skip(entry.path, "link")  # where a pattern has a directory


def parse_pattern(pattern: str) -> tuple[str, ...]:
    """The parts of a relative pattern. Raises ManifestError."""
    cleaned = pattern.removeprefix("./")
    if not is_relative(cleaned):
        raise ManifestError(
            f"{pattern!r} is not a pattern below the workspace",
            where="collect",
            hint='write it relative to the workspace, such as "out/*.json" or "**/*.csv"',
        )
    parts: list[str] = []
    for part in cleaned.split("/"):
        if part != "**" or parts[-1:] != ["**"]:
            parts.append(part)
    return tuple(parts if parts[-1] != "**" else [*parts, "*"])


def _states_of(pattern: tuple[str, ...], directory: str) -> set[int]:
    """How far into the pattern the directory's path leads: the parts that may come next."""
    states = {0}
    for part in directory.split("/") if directory else ():
        states = _advance(pattern, states, part, stay=True)
    return states


def _advance(pattern: tuple[str, ...], states: set[int], name: str, *, stay: bool) -> set[int]:
    """The parts that may follow `name`; with `stay`, "**" may go on as well."""
    following: set[int] = set()
    for state in states:
        if state >= len(pattern):
            continue
        if pattern[state] != "**":
            following |= _step(pattern, state, name)
            continue
        following |= _step(pattern, state + 1, name)
        if stay and not name.startswith("."):
            following.add(state)
    return following


def _step(pattern: tuple[str, ...], state: int, name: str) -> set[int]:
    wanted = pattern[state]
    hidden = name.startswith(".") and not wanted.startswith(".")
    return {state + 1} if not hidden and fnmatchcase(name, wanted) else set()


def _chunks(fd: int, limit: int) -> Iterator[bytes]:
    """The file's bytes, once; _TooLarge before reading when its size says so, _Changed when the size did not hold."""
    size = os.fstat(fd).st_size
    if size > limit:
        raise _TooLarge
    read = 0
    while chunk := os.read(fd, min(CHUNK_BYTES, size - read + 1)):
        read += len(chunk)
        if read > size:
            raise _Changed
        yield chunk
    if read != size:
        raise _Changed


def copy_out(fd: int, dest_dir_fd: int, path: str, limit: int) -> int:
    """Write a copy beside its final name, then put it there in one step. Returns the bytes copied."""
    parent_fd = make_directories(dest_dir_fd, parent_of(path))
    name = path.rpartition("/")[2]
    temporary = f".collecting-{os.urandom(8).hex()}"
    try:
        present = fs.lstat_at(parent_fd, name)
        if present is not None and not stat.S_ISREG(present.st_mode):
            raise OSError(errno.ELOOP if stat.S_ISLNK(present.st_mode) else errno.EEXIST, "open: not a regular file")
        mode = os.fstat(fd).st_mode & 0o666 | 0o600
        out_fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=parent_fd)
        try:
            copied = 0
            for chunk in _chunks(fd, limit):
                write_all(out_fd, chunk)
                copied += len(chunk)
            os.rename(temporary, name, src_dir_fd=parent_fd, dst_dir_fd=parent_fd)
        except BaseException:
            os.unlink(temporary, dir_fd=parent_fd)
            raise
        finally:
            os.close(out_fd)
        return copied
    finally:
        os.close(parent_fd)


def make_directories(root_fd: int, path: str) -> int:
    """Make the directories of `path` below `root_fd` as needed and open the last one; no link is ever followed."""
    fd = fs.open_beneath(root_fd, "", os.O_PATH | os.O_DIRECTORY)
    try:
        for part in path.split("/") if path else ():
            try:
                os.mkdir(part, 0o755, dir_fd=fd)
            except FileExistsError:
                pass  # as a directory or not: opening it tells
            child_fd = fs.open_beneath(fd, part, os.O_PATH | os.O_DIRECTORY)
            os.close(fd)
            fd = child_fd
        return fd
    except BaseException:
        os.close(fd)
        raise


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def reason_word(error: BaseException) -> str:
    """One stable word for why a file stayed behind; the errno's name where there is no better one."""
    if isinstance(error, _TooLarge):
        return "too-large"
    if isinstance(error, _Changed):
        return "changed-while-reading"
    code = error.errno if isinstance(error, OSError) else None
    words = {errno.ELOOP: "link", errno.EINVAL: "special", errno.EXDEV: "other-mount", errno.ENOTDIR: "link"}
    return words.get(code or 0) or errno.errorcode.get(code or 0, "EIO")
