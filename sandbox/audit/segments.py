"""Reading a chain's files: which segments there are, and their lines, without trusting what lies in the directory.

Opens with O_NOFOLLOW and takes regular files only, so a link, a FIFO or a device in a chain's directory is an error
and not a hang. Lines are bounded: one longer than an entry may be comes out cut, and fails to parse.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sandbox.audit.entry import ENTRY_MAX_BYTES, SEGMENT_NAME
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, BinaryIO


def list_segments(chain_path: Path) -> list[Path]:
    """The chain's segment files in order. Raises AuditError when the directory cannot be read."""
    try:
        names = os.listdir(chain_path)
    except OSError as err:
        raise AuditError(f"cannot read the chain {chain_path}: {err.strerror}") from err
    return [chain_path / name for name in sorted(names) if SEGMENT_NAME.fullmatch(name)]


def open_segment(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises AuditError for anything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as err:
        raise AuditError(f"cannot read {path}: {err.strerror}") from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AuditError(f"{path} is not a regular file")
    return os.fdopen(fd, "rb")


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a segment with their newline; only the last may lack it, or one that is over every bound."""
    with open_segment(path) as file:
        while line := file.readline(ENTRY_MAX_BYTES + 1):
            yield line


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def parse(line: bytes) -> dict[str, Any]:
    """The object on one line. Raises ValueError for anything that is not one JSON object."""
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err
    if not isinstance(data, dict):
        raise ValueError("not a JSON object")
    return data
