"""Paths of HTTP requests: patterns as a manifest writes them, and every way in which a server might read a path. Pure.

What a path means is the server's to decide: it may decode it once, twice or not at all, take a backslash for a slash,
resolve `..` before or after that. A request is judged by all of these readings at once, so that no spelling reaches
what the rule does not name. Source: RFC 3986 (6.2.2), RFC 9110 (4.2).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

EVERYTHING: Final = "/**"
PATTERN_MAX_BYTES: Final = 1024
# A path that is still encoded after so many times is meant to confuse.
_DECODINGS_MAX: Final = 4
_READINGS_MAX: Final = 256
_PLAIN = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9_~$!&'()+,=:@.*-]+)*/?")
_SAFE: Final = "~$!&'()+,=:@*"
_ALLOWED = re.compile(r"(?:[A-Za-z0-9_~$!&'()+,=:@.*/-]|%[0-9A-Fa-f]{2}|[^\x00-\x7f])+")
# Encoded slashes and the like mean different things to different servers; an encoded star is no wildcard to anyone.
_UNCLEAR = re.compile(r"%(?:[01][0-9A-F]|2[35AF]|3[BF]|5C|7F)", re.IGNORECASE)

Segments = tuple[str, ...]


class Pattern(NamedTuple):
    """A path by its segments. `*` in one stands for anything but a slash; `rest`: whatever begins so, after a slash."""

    segments: Segments
    rest: bool

    def __str__(self) -> str:
        return "/" + "/".join((*(quote(segment, _SAFE) for segment in self.segments), *(("**",) if self.rest else ())))

    @property
    def is_everything(self) -> bool:
        return self.rest and not self.segments

    def matches(self, path: Segments) -> bool:
        count = len(self.segments)
        if len(path) <= count if self.rest else len(path) != count:
            return False
        return all(_matches(pattern, text) for pattern, text in zip(self.segments, path, strict=False))

    def is_within(self, other: Pattern) -> bool:
        """Whether every path of this pattern is one of the other's: `*` matches the word `*`, and a word matches it."""
        if other.rest:
            long_enough = len(self.segments) + self.rest > len(other.segments)
        else:
            long_enough = not self.rest and len(self.segments) == len(other.segments)
        return long_enough and all(_matches(b, a) for a, b in zip(self.segments, other.segments, strict=False))

    def meet(self, other: Pattern) -> Pattern | None:
        """What both name. Two partial wildcards that overlap (`a*`, `*b`) count as apart: less, never more."""
        short, long = sorted((self, other), key=lambda pattern: len(pattern.segments))
        if len(long.segments) > len(short.segments) and not short.rest:
            return None
        if len(short.segments) == len(long.segments) and short.rest != long.rest:
            return None
        segments = []
        for a, b in zip(short.segments, long.segments, strict=False):
            smaller = a if _matches(b, a) else b if _matches(a, b) else None
            if smaller is None:
                return None
            segments.append(smaller)
        return Pattern((*segments, *long.segments[len(short.segments) :]), long.rest)


def parse_pattern(text: str) -> Pattern:
    """Read a path pattern. Raises ValueError with what is allowed."""
    if len(text.encode()) > PATTERN_MAX_BYTES:
        raise ValueError(f"the path is longer than {PATTERN_MAX_BYTES} bytes: {text[:60]!r}…")
    if not text.startswith("/") or not _ALLOWED.fullmatch(text):
        raise ValueError(f"{text!r} is not a path; it begins with '/' and has no query, such as '/repos/*/issues/**'")
    segments = [_decoded(part, text) for part in text[1:].split("/")]
    rest = segments[-1] == "**"
    if rest:
        segments.pop()
    for index, segment in enumerate(segments):
        if "**" in segment:
            raise ValueError(f"{text!r}: '**' is the last component, as in '/repos/**'")
        if segment in (".", "..") or (not segment and index < len(segments) - 1) or (not segment and rest):
            raise ValueError(f"{text!r} is not normal: it has an empty, '.' or '..' component")
    return Pattern(tuple(segments), rest)


def _decoded(part: str, whole: str) -> str:
    """A component without its encoding."""
    if match := _UNCLEAR.search(part):
        raise ValueError(f"{whole!r}: {match.group()} cannot be in a pattern; '*' stands for anything")
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{whole!r} is not UTF-8") from None


@lru_cache(maxsize=4096)
def _segment(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(part) for part in pattern.split("*")), re.DOTALL)


def _matches(pattern: str, text: str) -> bool:
    """Linear for the two common kinds. `*` alone is any segment, also an empty one."""
    if "*" not in pattern:
        return pattern == text
    return pattern == "*" or _segment(pattern).fullmatch(text) is not None


def readings(path: str) -> tuple[Segments | None, ...]:
    """Every reading of a request's path, its plain one first. None: one that nobody can say.

    `path` is a request target's, printable ASCII, without its query.
    """
    if not path.startswith("/"):
        return (None,)
    if _PLAIN.fullmatch(path):
        return (tuple(path[1:].split("/")),)
    found: dict[Segments | None, None] = {}
    for segments in _all_readings(path):
        found[segments] = None
        if len(found) > _READINGS_MAX:
            found[None] = None
            break
    return tuple(found)


def _all_readings(path: str) -> Iterator[Segments | None]:
    # Split, then decode: an encoded slash is a character of a name.
    parts = [_text(part) for part in path[1:].split("/")]
    yield from _variants(tuple(part for part in parts if part is not None)) if None not in parts else (None,)
    text: str | None = path
    for _ in range(_DECODINGS_MAX):
        decoded = _text(text) if text is not None else None
        if decoded is None:
            yield None
            return
        yield from _texts(decoded)
        if decoded == text:
            return
        text = decoded
    yield None


def _text(text: str) -> str | None:
    """Decoded once; None where that is no text, or has characters at which programs stop reading."""
    try:
        decoded = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        return None
    return None if any(char < " " or char == "\x7f" for char in decoded) else decoded


def _texts(text: str) -> Iterator[Segments]:
    """What a decoded path may be split into."""
    spellings = dict.fromkeys((text, text.replace("\\", "/"), unicodedata.normalize("NFKC", text).replace("\\", "/")))
    for spelling in spellings:
        for cut in dict.fromkeys((spelling, re.split(r"[?#]", spelling, maxsplit=1)[0])):
            yield from _variants(tuple(cut[1:].split("/")))


def _variants(segments: Segments) -> Iterator[Segments]:
    """With and without parameters (`;x=1`), empty segments and dot segments."""
    for one in dict.fromkeys((segments, tuple(segment.partition(";")[0] for segment in segments))):
        for two in dict.fromkeys((one, _merged(one))):
            yield from dict.fromkeys((two, _resolved(two)))


def _merged(segments: Segments) -> Segments:
    return (*(segment for segment in segments[:-1] if segment), *segments[-1:])


def _resolved(segments: Segments) -> Segments:
    """RFC 3986, 5.2.4."""
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return tuple(kept) or ("",)
