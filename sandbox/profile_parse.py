"""From the words of one source to a `Layer`: keys checked, units parsed, paths made absolute and real.

This is the only place where `~`, `$VAR`, relative paths and symbolic links are followed, once; from here on a grant
is the real path, and its origin keeps what was asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from sandbox.grants import check_text, has_glob
from sandbox.manifest import SECTIONS, Manifest
from sandbox.profile_fields import (
    ALIASES,
    BY_KEY,
    BY_MANIFEST_KEY,
    FIELDS,
    SECRETS,
    SETTING,
    TOP_KEYS,
    Field,
    entry_key,
)
from sandbox.profile_layers import Item, Items, Layer, Origin, dedup, explain_field
from sandbox.profile_lines import KeyLines
from sandbox.profile_tables import entry_value, rule_text
from sandbox.units import UNLIMITED, parse_rate, parse_size, parse_time

# Where a program given by its name is looked up: the jail's own PATH, never the caller's.
JAIL_PATH: Final = "/usr/local/bin:/usr/bin:/bin"
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*)|)")
_UNITS: Final = {"size": (parse_size, "512MiB"), "rate": (parse_rate, "50MiB/s"), "time": (parse_time, "30s")}
_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "real": ((int, float), "a number"),
    "count": ((int,), "a whole number"),
    "flag": ((bool,), "true or false"),
    "word": ((str,), "a string"),
    "path": ((str,), "a path"),
}
# These say how a tool works, not what it may do: an intersection has no meaning for them.
NOT_IN_CEILING: Final = frozenset({SETTING, SECRETS, "filesystem.workspace", "filesystem.workspace_mode"})


@dataclass(frozen=True, slots=True)
class Source:
    """Whose words these are: `base` is what relative paths are relative to."""

    file: str
    base: Path
    prefix: tuple[str, ...] = ()
    lines: KeyLines | None = None
    ceiling: bool = False

    def origin(self, *path: str, asked: str = "", index: int = 0) -> Origin:
        full = (*self.prefix, *path)
        line = self.lines.line(full, asked, index) if self.lines else 0
        return Origin(self.file, ".".join(full), line, asked)


def parse_layer(table: Mapping[str, Any], source: Source) -> Layer:
    """Read one source's words. Raises ProfileError or ManifestError naming the first that is wrong."""
    scalars: dict[str, Item] = {}
    lists: dict[str, Items] = {}
    for section, body in table.items():
        if section in TOP_KEYS:
            if source.ceiling and section in ("extends", "remove", "sealed"):
                raise source.origin(section).error("has no place in a ceiling, which only takes away")
            continue
        for spec, raw in _section(section, body, source):
            if spec.kind == "table":
                scalars.update(_table(spec, raw, source))
            elif spec.is_list:
                lists[spec.key] = _list(spec, raw, source)
            else:
                scalars[spec.key] = _scalar(spec, raw, source)
    _imply(scalars, lists)
    _check_layer(scalars, lists)
    return Layer(
        _text(table, "name", source),
        _text(table, "description", source),
        scalars,
        lists,
        _removes(table.get("remove", {}), source),
        source.origin("sealed") if _flag(table, "sealed", source) else None,
    )


def flatten_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested sections from flat names (`memory`), dotted ones (`resources.memory`) and sections. None: not given."""
    nested: dict[str, Any] = {}
    origin = Origin("overrides")
    for key, value in overrides.items():
        if value is None:
            continue
        if isinstance(value, Mapping) and (key in SECTIONS or key == "remove"):
            body = _flat_remove(value) if key == "remove" else dict(value)
            nested[key] = {**nested.get(key, {}), **body}
            continue
        spec = ALIASES.get(key) or BY_KEY.get(key)
        if key in ("name", "description"):
            nested[key] = value
            continue
        if spec is None:
            near = get_close_matches(key, [*ALIASES, *BY_KEY], 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(ALIASES)}"
            raise origin.error(f"unknown override {key!r}", hint=hint)
        section = nested.setdefault(spec.section, {})
        if spec.name in section:
            raise origin.error(f"{spec.key!r} is given twice")
        section[spec.name] = value
    return nested


def _flat_remove(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flatten_overrides(body).items() if key in SECTIONS}


def _section(section: str, body: Any, source: Source) -> list[tuple[Field, Any]]:
    origin = source.origin(section)
    if section not in SECTIONS:
        raise origin.error("unknown key", hint=_suggest(section, [*SECTIONS, *TOP_KEYS], list(ALIASES)))
    if section == "secrets":
        # The keys of this section are the user's own.
        if source.ceiling:
            raise origin.error("has no place in a ceiling, which only takes away")
        return [(BY_KEY[SECRETS], body)]
    if not isinstance(body, Mapping):
        raise origin.error(f"{_show(body)} is not a table")
    names = [spec.name for spec in FIELDS if spec.section == section]
    pairs = []
    for name, raw in body.items():
        spec = BY_KEY.get(f"{section}.{name}")
        if spec is None:
            other = BY_MANIFEST_KEY.get(f"{section}.{name}")
            near = [f"{other.name!r} with a unit"] if other else []
            raise source.origin(section, str(name)).error(
                "unknown key", hint=f"write {near[0]}" if near else _suggest(str(name), names, list(ALIASES))
            )
        if source.ceiling and spec.key in NOT_IN_CEILING:
            raise source.origin(section, name).error("has no place in a ceiling, which only takes away")
        pairs.append((spec, raw))
    return pairs


def _suggest(name: str, allowed: list[str], elsewhere: list[str]) -> str:
    near = get_close_matches(name, allowed, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    if name in elsewhere and ALIASES[name].key:
        return f"did you mean {ALIASES[name].key!r}?"
    return f"allowed: {', '.join(allowed)}"


def _scalar(spec: Field, raw: Any, source: Source) -> Item:
    asked = raw if isinstance(raw, str) else ""
    origin = source.origin(spec.section, spec.name, asked=asked)
    if spec.kind == "path" and isinstance(raw, os.PathLike):
        raw = os.fspath(raw)
    try:
        value = _plain(spec, raw)
        if spec.kind == "path" and value:
            value = real_path(value, source.base)
    except ValueError as err:
        raise origin.error(str(err)) from err
    return Item(_checked(spec, value, origin, asked), origin)


def _plain(spec: Field, raw: Any) -> Any:
    """The value with its unit parsed. Raises ValueError."""
    if spec.unlimited and raw == UNLIMITED:
        return None
    if spec.kind in _UNITS:
        parse, example = _UNITS[spec.kind]
        if isinstance(raw, str):
            return parse(raw)
        number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
        raise ValueError(f'{_show(raw)} {"has no unit" if number else "is not a string"}; write it like "{example}"')
    types, wanted = _TYPES[spec.kind]
    if not isinstance(raw, types) or (isinstance(raw, bool) and bool not in types):
        raise ValueError(f"{_show(raw)} is not {wanted}")
    return float(raw) if isinstance(raw, (int, float)) and spec.kind == "real" else raw


def _list(spec: Field, raw: Any, source: Source) -> Items:
    if not isinstance(raw, (list, tuple, set, frozenset)):
        hint = f"write [{_show(raw)}]" if isinstance(raw, str) else ""
        raise source.origin(spec.section, spec.name).error(f"{_show(raw)} is not a list", hint=hint)
    entries = sorted(raw, key=str) if isinstance(raw, (set, frozenset)) else raw
    return dedup(item for index, entry in enumerate(entries) for item in _entry(spec, entry, source, index=index))


def _entry(spec: Field, raw: Any, source: Source, *, path: tuple[str, ...] = (), index: int = 0) -> Items:
    if isinstance(raw, os.PathLike) and spec.kind != "words":
        raw = os.fspath(raw)
    asked = raw if isinstance(raw, str) else ""
    origin = source.origin(*(path or (spec.section, spec.name)), asked=asked, index=index)
    try:
        raw = rule_text(raw) if spec.kind == "http" else raw
        if not isinstance(raw, str):
            raise ValueError(f"the entry {_show(raw)} is not a string")
        values, optional = _expand(spec, raw, source.base)
    except ValueError as err:
        raise origin.error(str(err)) from err
    return tuple(Item(entry, origin, optional) for value in values for entry in _checked(spec, (value,), origin, asked))


def _expand(spec: Field, raw: str, base: Path) -> tuple[list[str], bool]:
    """The entry's real values, and whether it may be missing (a leading "?")."""
    check_text(raw)
    optional = raw.startswith("?") and spec.kind in ("grants", "programs")
    text = raw[1:] if optional else raw
    if spec.kind == "grants":
        return [text if text.startswith(":") else real_path(text, base)], optional
    if spec.kind == "programs":
        return [_program(text, base, optional=optional)], optional
    if spec.kind == "patterns":
        return _patterns(text, base), False
    return [text], False


_LOOKED_UP: ContextVar[list[str] | None] = ContextVar("toolcall_sandbox_looked_up", default=None)


@contextmanager
def looked_up() -> Iterator[list[str]]:
    """What profiles that are resolved within say of the host's paths, `~` and `$VAR` in words or by program names: as
    long as it says nothing, what comes out depends on the files that were read and on nothing else of the host."""
    texts: list[str] = []
    token = _LOOKED_UP.set(texts)
    try:
        yield texts
    finally:
        _LOOKED_UP.reset(token)


def note_lookup(text: str) -> None:
    """To be called before the host's paths are looked at for `text`."""
    texts = _LOOKED_UP.get()
    if texts is not None:
        texts.append(text)


def _program(text: str, base: Path, *, optional: bool) -> str:
    note_lookup(text)
    if "/" in text or text.startswith(("~", "$")):
        return real_path(text, base)
    found = [f"{directory}/{text}" for directory in JAIL_PATH.split(":") if os.path.exists(f"{directory}/{text}")]
    if not found and not optional:
        raise ValueError(f"there is no program {text!r} in {JAIL_PATH}")
    return os.path.realpath(found[0]) if found else f"/usr/bin/{text}"


def _patterns(text: str, base: Path) -> list[str]:
    """A denied tree under its real path and under the one that was asked: either may be met inside a grant."""
    if text.startswith("**/"):
        return [text]
    parts = text.split("/")
    plain = next((i for i, part in enumerate(parts) if has_glob(part)), len(parts))
    if any(part in (".", "..") for part in parts[plain:]):
        raise ValueError(f"{text!r} has '.' or '..' after a wildcard")
    head, tail = "/".join(parts[:plain]) or ("/" if plain else "."), parts[plain:]
    asked = os.path.normpath(os.path.join(base, _expand_words(head)))
    real = os.path.realpath(os.path.join(base, _expand_words(head)))
    return list(
        dict.fromkeys("/" + "/".join([*path.strip("/").split("/"), *tail]).strip("/") for path in (real, asked))
    )


def real_path(text: str, base: Path) -> str:
    """Absolute, without links: `~` and `$VAR` expanded, relative to `base`. Raises ValueError."""
    check_text(text)
    if not text:
        raise ValueError("the path is empty")
    return check_text(os.path.realpath(os.path.join(base, _expand_words(text))))


def _expand_words(text: str) -> str:
    note_lookup(text)

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not name or not os.environ.get(name):
            raise ValueError(f"{text!r} names the variable {match.group()!r}, which is not set")
        return os.environ[name]

    expanded = _VARIABLE.sub(value, text)
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)
        if expanded.startswith("~"):
            raise ValueError(f"{text!r} names a home directory that is not there")
    return expanded


def _table(spec: Field, raw: Any, source: Source) -> dict[str, Item]:
    """A table whose keys are the user's: variables of `environment.set`, or secrets."""
    path = tuple(entry_key(spec.key, "").rstrip(".").split("."))
    if not isinstance(raw, Mapping):
        raise source.origin(*path).error(f"{_show(raw)} is not a table")
    items = {}
    for name, value in raw.items():
        origin = source.origin(*path, str(name))
        try:
            entry = entry_value(spec.key, value, lambda text: real_path(text, source.base))
        except ValueError as err:
            raise origin.error(str(err), hint=f'write "{value}"' if isinstance(value, (int, float)) else "") from None
        _checked(spec, {name: entry}, origin, "")
        items[entry_key(spec.key, name)] = Item(entry, origin)
    return items


def _checked(spec: Field, value: Any, origin: Origin, asked: str) -> Any:
    """The value as the manifest's own field takes it: ranges, words, one form for hosts."""
    try:
        model = SECTIONS[spec.section].model_validate({spec.field: value})
    except ValidationError as err:
        raise origin.error(explain_field(spec, dict(err.errors(include_url=False)[0]), asked)) from err
    return getattr(model, spec.field)


def _imply(scalars: dict[str, Item], lists: dict[str, Items]) -> None:
    """Naming hosts means wanting the allowlist, unless the same source says otherwise."""
    hosts = lists.get("network.allow", ())
    if hosts and "network.mode" not in scalars:
        scalars["network.mode"] = Item("allowlist", hosts[0].origin)


def _check_layer(scalars: dict[str, Item], lists: dict[str, Items]) -> None:
    """Refuse what contradicts itself within one source, where inheritance is no excuse."""
    hosts = lists.get("network.allow", ())
    if hosts and scalars["network.mode"].value == "none":
        raise hosts[0].origin.error("names hosts while network.mode is 'none'")
    required = {item.value for item in lists.get("isolation.required", ())}
    for item in lists.get("isolation.best_effort", ()):
        if item.value in required:
            raise item.origin.error(f"{item.value!r} cannot be required and best_effort at once")
    workspace, mode = scalars.get("filesystem.workspace"), scalars.get("filesystem.workspace_mode")
    if workspace and workspace.value and mode and mode.value == "private":
        raise mode.origin.error(f"'private' has no path, but workspace is {workspace.value!r}")


def _removes(raw: Any, source: Source) -> dict[str, tuple[Origin, Items | None]]:
    """`remove`: the sections again, with the entries to take away, or `true` for all of a list's entries."""
    if not isinstance(raw, Mapping):
        raise source.origin("remove").error(f"{_show(raw)} is not a table of sections")
    removes: dict[str, tuple[Origin, Items | None]] = {}
    for section, body in raw.items():
        for spec, entries in _section(section, body, source):
            origin = source.origin("remove", section, spec.name)
            if spec.meaning == "denials" and spec.name == "deny":
                raise origin.error("a denial cannot be removed: deny always wins", hint="extend another profile")
            if spec.kind != "table" and not spec.is_list:
                raise origin.error("is not a list; a child's own value replaces it")
            if entries is True:
                removes[spec.key] = (origin, None)
            elif not isinstance(entries, (list, tuple)):
                raise origin.error(f"{_show(entries)} is neither a list nor true")
            else:
                path = ("remove", section, spec.name)
                found = [_removed(spec, entry, source, path) for entry in entries]
                removes[spec.key] = (origin, tuple(item for items in found for item in items))
    return removes


def _removed(spec: Field, entry: Any, source: Source, path: tuple[str, ...]) -> Items:
    if spec.kind != "table":
        return _entry(spec, entry, source, path=path)
    origin = source.origin(*path, asked=str(entry))
    if not isinstance(entry, str):
        raise origin.error(f"{_show(entry)} is not the name of a variable")
    return (Item(entry, origin),)


def _text(table: Mapping[str, Any], key: str, source: Source) -> str:
    value = table.get(key, "")
    origin = source.origin(key)
    if not isinstance(value, str):
        raise origin.error(f"{_show(value)} is not a string")
    try:
        Manifest.model_validate({key: value})
    except ValueError as err:
        raise origin.error(str(err).removeprefix(f"{key}: ")) from err
    return value


def _flag(table: Mapping[str, Any], key: str, source: Source) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise source.origin(key).error(f"{_show(value)} is not true or false")
    return value


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
