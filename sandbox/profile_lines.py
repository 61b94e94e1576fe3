"""Line numbers for keys, which neither `tomllib` nor `json` give.

A scan for messages only: it never decides what a value is, and answers 0 where it is not sure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_KEY = r"(?:[A-Za-z0-9_-]+|\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*')"
_HEADER = re.compile(rf"\s*\[\[?\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*\]")
_ASSIGN = re.compile(rf"\s*({_KEY}(?:\s*\.\s*{_KEY})*)\s*=")
_PART = re.compile(_KEY)
# Strings and comments first, so that brackets within them do not count.
_TOKEN = re.compile(
    r'"""(?:[^\\]|\\.)*?"""|\'\'\'.*?\'\'\'|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|#[^\n]*|[\[\]{}]', re.DOTALL
)
_TOKEN_START = re.compile(r"[\"'#\[\]{}]")
_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]')


class KeyLines:
    """Lines found once by a scan that yields (key path, line) in the order of the text."""

    def __init__(self, text: str, found: Iterator[tuple[tuple[str, ...], int]]) -> None:
        self._text = text.splitlines()
        self._order = list(found)
        self._lines: dict[tuple[str, ...], int] = {}
        for path, line in self._order:
            self._lines.setdefault(path, line)

    def line(self, path: tuple[str, ...], entry: str = "", index: int = 0) -> int:
        """The nearest known line: a key inside an inline table has its table's line.

        `index`: which of several tables of that name, `[[network.http]]`.
        """
        if index and not entry:
            tables = [line for known, line in self._order if known == path]
            return tables[index] if index < len(tables) else self._lines.get(path, 0)
        while path and path not in self._lines:
            path = path[:-1]
        first = self._lines.get(path, 0)
        if not entry or not first:
            return first
        after = min((line for _, line in self._order if line > first), default=len(self._text) + 1)
        for number in range(first, after):
            text = self._text[number - 1]
            if f'"{entry}"' in text or f"'{entry}'" in text:
                return number
        return first


def toml_lines(text: str) -> KeyLines:
    return KeyLines(text, _scan_toml(text))


def json_lines(text: str) -> KeyLines:
    return KeyLines(text, _scan_json(text))


def _scan_toml(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    table: tuple[str, ...] = ()
    position, number = 0, 0
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    while number < len(lines):
        line = lines[number]
        if match := _HEADER.match(line):
            table = _parts(match.group(1))
            yield table, number + 1
            number += 1
        elif match := _ASSIGN.match(line):
            yield (*table, *_parts(match.group(1))), number + 1
            position = _value_end(text, starts[number] + match.end())
            while number < len(lines) and starts[number] <= position:
                number += 1
        else:
            number += 1


def _value_end(text: str, start: int) -> int:
    """The offset of the last character of the value that begins at `start`: a line end outside every bracket."""
    depth, position = 0, start
    while True:
        newline = text.find("\n", position)
        newline = len(text) if newline < 0 else newline
        # Outside brackets the search stops at the line's end: the scan of a file stays linear.
        begin = _TOKEN_START.search(text, position, len(text) if depth else newline)
        if begin is None:
            return newline - 1
        match = _TOKEN.match(text, begin.start())
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match.group(), 0) if match else 0
        position = match.end() if match else begin.end()


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _PART.findall(dotted))


def _scan_json(text: str) -> Iterator[tuple[tuple[str, ...], int]]:
    path: list[str] = []
    objects: list[bool] = []
    tokens = list(_JSON_TOKEN.finditer(text))
    line, seen = 1, 0
    for i, match in enumerate(tokens):
        line += text.count("\n", seen, match.start())
        seen = match.start()
        mark = match.group()
        if mark in "{[":
            objects.append(mark == "{")
            path.append("")
        elif mark in "}]" and objects:
            objects.pop()
            path.pop()
        elif objects and objects[-1] and i + 1 < len(tokens) and tokens[i + 1].group() == ":":
            path[-1] = mark[1:-1]
            yield tuple(part for part in path if part), line
