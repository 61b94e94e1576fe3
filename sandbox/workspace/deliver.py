"""Put collected files into a directory of the caller's choice, as carefully as they were taken out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox._linux import wire
from sandbox.workspace.collect import copy_out, reason_word
from sandbox.workspace.names import is_relative
from sandbox.workspace.protected import is_protected


def write_collected(
    into: Path, files: Mapping[str, bytes], allow_protected: Sequence[str] = ()
) -> tuple[list[str], list[tuple[str, str]]]:
    """Write `files` (relative path to content) below `into`; returns what was written and (path, reason) of the rest.

    A link on the way, or in a file's place, is left alone; what others would run or trust stays out unless allowed.
    """
    written: list[str] = []
    skipped: list[tuple[str, str]] = []
    into_fd = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for path, data in files.items():
            if not is_relative(path):
                skipped.append((path, "not-relative"))
                continue
            rule = is_protected(path, allow_protected)
            if rule:
                skipped.append((path, f"protected:{rule}"))
                continue
            fd = wire.memfd("collected", data)
            try:
                copy_out(fd, into_fd, path, len(data))
            except OSError as error:
                skipped.append((path, reason_word(error)))
            else:
                written.append(path)
            finally:
                os.close(fd)
    finally:
        os.close(into_fd)
    return written, skipped
