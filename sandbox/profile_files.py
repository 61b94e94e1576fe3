"""Find profile files and read them: TOML, JSON, and `[tool.sandbox]` in pyproject.toml.

A name is looked for in the project, the user's directory and among the shipped profiles. A name found twice is
refused: otherwise a file that an agent wrote into its workspace could take the place of a shipped profile.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from sandbox import profile_places
from sandbox.errors import ProfileError
from sandbox.profile_lines import KeyLines, json_lines, toml_lines

# The profile that is `[tool.sandbox]` itself, beside `[tool.sandbox.profiles.NAME]`.
PROJECT: Final = "project"
_LINE = re.compile(r"at line (\d+)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a profile is: a file, and the table in it (empty: the whole file)."""

    path: Path
    table: tuple[str, ...] = ()
    name: str = ""
    kind: str = "file"

    def __str__(self) -> str:
        return f"{self.path} [{'.'.join(self.table)}]" if self.table else str(self.path)


@dataclass(frozen=True, slots=True)
class Document:
    """A file as read: `table` is the profile's own part of it."""

    place: Place
    table: Mapping[str, Any]
    lines: KeyLines
    sha256: str


def shipped_dir() -> Path:
    """Where the profiles are that travel with the package."""
    return Path(profile_places.shipped_dir())


def all_places(project: Path) -> Iterator[Place]:
    """Every profile that has a name, as seen from a project's directory."""
    (own, kind), *others = profile_places.directories(str(project))
    yield from _in_directory(Path(own), kind)
    yield from _in_pyproject(project / "pyproject.toml")
    for directory, kind in others:
        yield from _in_directory(Path(directory), kind)


def find(name: str, project: Path) -> Place:
    """The one profile of that name. Raises ProfileError where there is none, or more than one."""
    places = list(all_places(project))
    found = [place for place in places if place.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        where = " and ".join(str(place) for place in found)
        raise ProfileError(f"profile {name!r} is there twice: {where}", hint="rename one, or give the file's path")
    names = sorted({place.name for place in places})
    near = get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}; a file is given with its path"
    raise ProfileError(f"there is no profile {name!r}", hint=hint)


def place_of_file(path: Path) -> Place:
    """A file given by its path; pyproject.toml means its `[tool.sandbox]`."""
    path = Path(os.path.abspath(path))
    if path.name == "pyproject.toml":
        return Place(path, ("tool", "sandbox"), PROJECT)
    return Place(path, (), path.stem)


def read(place: Place) -> Document:
    """Read and parse one profile. Raises ProfileError: missing, unreadable, too large, or a syntax error's line."""
    data = read_bytes(place.path)
    try:
        text = data.decode()
    except UnicodeDecodeError as err:
        line = data[: err.start].count(b"\n") + 1
        raise ProfileError("is not UTF-8", where=f"{place.path}:{line}") from err
    if place.path.suffix == ".json":
        table: Any = _parse_json(text, place.path)
        lines = json_lines(text)
    else:
        table = _parse_toml(text, place.path)
        lines = toml_lines(text)
    for part in place.table:
        table = table.get(part) if isinstance(table, Mapping) else None
    if not isinstance(table, Mapping):
        raise ProfileError(f"there is no table [{'.'.join(place.table)}]" if place.table else "is not a table",
                           where=str(place.path))  # fmt: skip
    if place.table == ("tool", "sandbox"):
        table = {key: value for key, value in table.items() if key != "profiles"}
    return Document(place, table, lines, f"sha256:{hashlib.sha256(data).hexdigest()}")


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file of bounded size; a FIFO would otherwise hang us, a device never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise ProfileError(f"cannot be read: {err.strerror}", where=str(path)) from err
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ProfileError("is not a regular file", where=str(path))
    with os.fdopen(fd, "rb") as file:
        data = file.read(profile_places.FILE_BYTES_MAX + 1)
    if len(data) > profile_places.FILE_BYTES_MAX:
        raise ProfileError(f"is larger than {profile_places.FILE_BYTES_MAX} bytes", where=str(path))
    return data


def _in_directory(directory: Path, kind: str) -> Iterator[Place]:
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as err:
        raise ProfileError(f"cannot be listed: {err.strerror}", where=str(directory)) from err
    for name in names:
        stem, _, suffix = name.rpartition(".")
        if stem and suffix in ("toml", "json"):
            yield Place(directory / name, (), stem, kind)


def _in_pyproject(path: Path) -> Iterator[Place]:
    # Most projects say nothing about us: then their file is not parsed, and cannot stand in the way when broken.
    if not path.is_file() or b"sandbox" not in (data := read_bytes(path)):
        return
    tool = _parse_toml(data.decode(errors="replace"), path).get("tool")
    table = tool.get("sandbox") if isinstance(tool, Mapping) else None
    if not isinstance(table, Mapping):
        return
    if any(key != "profiles" for key in table):
        yield Place(path, ("tool", "sandbox"), PROJECT, "project")
    profiles = table.get("profiles")
    for name in profiles if isinstance(profiles, Mapping) else ():
        yield Place(path, ("tool", "sandbox", "profiles", name), name, "project")


def _parse_toml(text: str, path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        match = _LINE.search(str(err))
        line = match.group(1) if match else len(text.splitlines())  # "at end of document"
        raise ProfileError(f"is not TOML: {err}", where=f"{path}:{line}") from err
    except RecursionError as err:
        raise ProfileError("is nested too deeply", where=str(path)) from err


def _parse_json(text: str, path: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ProfileError(f"the key {twice!r} is there twice", where=str(path))
        return table

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as err:
        raise ProfileError(f"is not JSON: {err.msg}", where=f"{path}:{err.lineno}") from err
    except RecursionError as err:
        raise ProfileError("is nested too deeply", where=str(path)) from err
