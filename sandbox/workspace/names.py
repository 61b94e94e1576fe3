"""Names that hostile programs chose: how to print them, and how to keep them in JSON.

A name is any bytes without NUL and slash. Inside they are str with surrogateescape; whoever shows one to a person or
writes it to a log uses `printable`, and whoever stores one uses `to_json` and `from_json`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator


def printable(path: str, *, keep: str = "") -> str:
    """`path` without anything that a terminal or a log would act on; backslashes are doubled, so it stays unambiguous.

    Control and format characters (ANSI sequences, newlines, bidirectional overrides) and undecodable bytes become
    escapes. `str.isprintable` is false for exactly those, and for spaces other than the plain one. What `keep` holds
    stays as it is.
    """
    return "".join(char if char in keep else _shown(char) for char in path)


def _shown(char: str) -> str:
    if char == "\\":
        return "\\\\"
    if char.isprintable():
        return char
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def to_json(path: str) -> str:
    """The name as UTF-8 with surrogateescape, whatever this process's locale: json escapes lone surrogates."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def from_json(text: str) -> str:
    """The inverse of `to_json`, in a process of any locale."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def is_relative(path: str) -> bool:
    """Whether `path` is a plain relative path: no empty part, no "." or "..", no leading slash, no NUL."""
    return bool(path) and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def parent_of(path: str) -> str:
    return path.rpartition("/")[0]


def join(directory: str, name: str) -> str:
    return f"{directory}/{name}" if directory else name


def ancestors(path: str) -> Iterator[str]:
    """The directories above `path`, nearest first, without the root."""
    while path := parent_of(path):
        yield path
