"""Find, load and merge profiles; remember where each value came from.

`resolve` turns a profile and the caller's overrides into one manifest: parents left to right, then the profile,
then the overrides; a sealed profile anywhere in that line may only have been narrowed; an operator's ceiling is
intersected last. Nothing is guessed: an unknown key, a missing parent or a broken file is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sandbox import profile_places
from sandbox.errors import ManifestError, ProfileError
from sandbox.manifest import Manifest
from sandbox.profile_fields import BY_MANIFEST_KEY, FIELDS, SECRETS, SETTING, table_of
from sandbox.profile_files import Place, all_places, find, place_of_file, read
from sandbox.profile_layers import (
    Item,
    Layer,
    Origin,
    complete,
    find_origin,
    from_manifest,
    merge,
    normalise,
    to_manifest,
)
from sandbox.profile_narrow import apply_ceiling, widenings
from sandbox.profile_parse import Source, flatten_overrides, note_lookup, parse_layer
from sandbox.profile_places import is_path
from sandbox.profile_schema import format_value

__all__ = ["Origin", "ProfileInfo", "Resolved", "available", "load_names", "resolve"]

SYSTEM_CEILING: Final = Path(profile_places.SYSTEM_CEILING)
DEPTH_MAX: Final = 10


@dataclass(frozen=True, slots=True)
class Bound:
    """A sealed profile: nothing that builds on it may go beyond `layer`, which is complete and normal."""

    origin: Origin
    layer: Layer


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A profile with its parents merged in, the sealed ones among them, and the files that were read."""

    layer: Layer
    bounds: tuple[Bound, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Resolved:
    """One manifest and how it came about.

    `origins` maps a key (`resources.memory`), an entry (`filesystem.read[/data]`) or a variable
    (`environment.set.TZ`) to where it was written. `notes` says what deny, a ceiling or a missing optional path took
    away. `sources` are the files that were read, with their digests. `links` maps the asked path of a granted
    symbolic link to the real one. Pass this, not `.manifest`, to `resolve` again for further overrides: it still
    knows which profiles were sealed.
    """

    manifest: Manifest
    origins: Mapping[str, Origin]
    digest: str
    profile: str
    notes: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)
    _loaded: _Loaded = field(default=_Loaded(Layer()), repr=False, compare=False)

    def describe(self, key: str) -> str:
        """`resources.memory = 512MiB (FILE:12 resources.memory)`, for messages. Takes the manifest's names too."""
        spec = BY_MANIFEST_KEY.get(key)
        key = spec.key if spec else key
        found = next((s for s in FIELDS if s.key == key), None)
        if found is None:
            return f"{key} ({self.origins.get(key, 'default')})"
        value = getattr(getattr(self.manifest, found.section), found.field)
        return f"{key} = {format_value(found, value)} ({self.origins.get(key, 'default')})"

    def widenings(self, other: Resolved) -> list[str]:
        """The keys in which this permits more than `other`; empty: it only narrows."""
        mine, theirs = from_manifest(self.manifest, "manifest"), from_manifest(other.manifest, "manifest")
        return list(dict.fromkeys(widening.key for widening in widenings(mine, theirs)))

    def __repr__(self) -> str:
        return f"<Resolved {self.profile or 'manifest'} {self.digest[:19]}>"


@dataclass(frozen=True, slots=True)
class ProfileInfo:
    """One profile that has a name. `kind` is shipped, user or project; `error` says why it cannot be used."""

    name: str
    kind: str
    path: str
    description: str = ""
    sealed: bool = False
    error: str = ""


def resolve(
    source: str | Path | Manifest | Resolved | Mapping[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    ceiling: Path | None = None,
    cwd: Path | None = None,
) -> Resolved:
    """Resolve a profile to the manifest of a call.

    Args:
        source: a profile's name, a file's path, a manifest, an earlier result, or a mapping in the file form.
        overrides: words of the caller, flat (`memory="1GiB"`), dotted or nested; lists append, None is not given.
        ceiling: the operator's file; without it `$SANDBOX_CEILING`. `/etc/sandbox/ceiling.toml`, where it is
            there, is applied in any case: whoever calls us cannot argue it away.
        cwd: what relative paths of overrides and mappings are relative to, and where project profiles are.
    Raises:
        ProfileError, ManifestError: naming the file, line and key, the value and what is allowed.
    """
    base = _directory(cwd)
    loaded = _load_source(source, base)
    if overrides:
        layer = parse_layer(flatten_overrides(overrides), Source("overrides", base))
        merged = merge(loaded.layer, layer)
        merged = replace(
            merged,
            name=layer.name or loaded.layer.name,
            description=layer.description or loaded.layer.description,
        )
        loaded = replace(loaded, layer=merged)
    layer, notes = normalise(complete(loaded.layer))
    _check_sealed(layer, loaded.bounds)
    to_manifest(layer)
    sources = loaded.sources
    for path in _ceilings(ceiling):
        layer, taken, digest = _under_ceiling(layer, path)
        notes += taken
        sources += ((str(path), digest),)
    layer, missing = _check_paths(layer)
    _check_protected(layer)
    manifest = to_manifest(layer)
    return Resolved(
        manifest=manifest,
        origins=dict(_origins(layer)),
        digest=manifest.digest,
        profile=manifest.name,
        notes=notes + missing,
        sources=tuple(dict(sources).items()),
        links=_links(layer),
        _loaded=loaded,
    )


def available(cwd: Path | None = None) -> list[ProfileInfo]:
    """Every profile that has a name. A broken one is listed with its error, never left out."""
    project = _directory(cwd)
    infos = []
    for place in all_places(project):
        try:
            loaded = _Loader(project).load(place)
            layer = loaded.layer
            info = ProfileInfo(place.name, place.kind, str(place), layer.description, bool(loaded.bounds))
        except ManifestError as err:
            info = ProfileInfo(place.name, place.kind, str(place), error=str(err))
        infos.append(info)
    return infos


def load_names(cwd: Path | None = None) -> list[str]:
    """The names `resolve` takes, sorted."""
    project = _directory(cwd)
    return sorted({place.name for place in all_places(project)})


def _directory(cwd: Path | None) -> Path:
    try:
        return Path(os.path.abspath(os.getcwd() if cwd is None else cwd))
    except FileNotFoundError as err:
        raise ProfileError("the current directory is not there any more", hint="change to one, or give cwd") from err


def _load_source(source: str | Path | Manifest | Resolved | Mapping[str, Any], base: Path) -> _Loaded:
    if isinstance(source, Resolved):
        return source._loaded
    if isinstance(source, Manifest):
        return _Loaded(from_manifest(source, "manifest"))
    loader = _Loader(base)
    if isinstance(source, Mapping):
        return loader.load_table(source, Source("mapping", base), ())
    if isinstance(source, str) and not is_path(source):
        return loader.load(find(source, base))
    return loader.load(place_of_file(base / os.path.expanduser(source)))


class _Loader:
    """Loads profiles with their parents, each file once."""

    def __init__(self, project: Path) -> None:
        self._project = project
        self._done: dict[tuple[str, tuple[str, ...]], _Loaded] = {}

    def load(self, place: Place, chain: tuple[Place, ...] = ()) -> _Loaded:
        identity = (os.path.realpath(place.path), place.table)
        if identity in self._done:
            return self._done[identity]
        document = read(place)
        source = Source(str(place.path), place.path.parent, place.table, document.lines)
        loaded = self.load_table(document.table, source, (*chain, place))
        name = loaded.layer.name or place.name
        loaded = replace(
            loaded,
            layer=replace(loaded.layer, name=name),
            sources=tuple(dict((*loaded.sources, (str(place.path), document.sha256))).items()),
        )
        self._done[identity] = loaded
        return loaded

    def load_table(self, table: Mapping[str, Any], source: Source, chain: tuple[Place, ...]) -> _Loaded:
        own = parse_layer(table, source)
        merged, bounds, sources = Layer(), (), ()  # type: tuple[Layer, tuple[Bound, ...], tuple[tuple[str, str], ...]]
        for parent in _parents(table, source):
            loaded = self._load_parent(parent, source, chain)
            merged = merge(merged, loaded.layer)
            bounds += loaded.bounds
            sources += loaded.sources
        layer = merge(merged, own)
        if own.sealed:
            whole, _ = normalise(complete(layer))
            _check_sealed(whole, bounds)
            bounds += (Bound(own.sealed, whole),)
        return _Loaded(layer, _unique(bounds), sources)

    def _load_parent(self, parent: str, source: Source, chain: tuple[Place, ...]) -> _Loaded:
        origin = source.origin("extends", asked=parent)
        if is_path(parent):
            note_lookup(parent)
            place = place_of_file(source.base / os.path.expanduser(parent))
        else:
            try:
                place = find(parent, source.base if source.prefix else self._project)
            except ProfileError as err:
                raise origin.error(err.message, hint=err.hint) from err
        names = [str(p) for p in chain]
        if str(place) in names:
            raise origin.error(f"extends itself: {' -> '.join([*names[names.index(str(place)) :], str(place)])}")
        if len(chain) >= DEPTH_MAX:
            raise origin.error(f"more than {DEPTH_MAX} profiles extend one another")
        if not place.path.exists():
            raise origin.error(f"the parent {parent!r} is missing: there is no file {place.path}")
        return self.load(place, chain)


def _unique(bounds: tuple[Bound, ...]) -> tuple[Bound, ...]:
    return tuple({str(bound.origin): bound for bound in bounds}.values())


def _parents(table: Mapping[str, Any], source: Source) -> list[str]:
    raw = table.get("extends", [])
    parents = [raw] if isinstance(raw, str) else raw
    if not isinstance(parents, (list, tuple)) or not all(isinstance(p, str) and p for p in parents):
        raise source.origin("extends").error(f"{raw!r} is neither a profile's name nor a list of them")
    return list(parents)


def _check_sealed(layer: Layer, bounds: tuple[Bound, ...]) -> None:
    for bound in bounds:
        if wider := widenings(layer, bound.layer):
            first = wider[0]
            more = f" (and {len(wider) - 1} more)" if len(wider) > 1 else ""
            raise ProfileError(
                f"{first.inner} goes beyond {first.outer} ({first.outer_origin}){more}; that profile is sealed "
                f"({bound.origin}) and may only be narrowed",
                where=str(first.inner_origin),
                hint="ask for no more than the sealed profile has, or use one that is not sealed",
            )


def _ceilings(given: Path | None) -> Iterator[Path]:
    if _system_ceiling_is_there():
        yield SYSTEM_CEILING
    variable = os.environ.get(profile_places.CEILING_VARIABLE)
    path = given if given is not None else Path(variable) if variable else None
    if path is not None:
        yield Path(os.path.abspath(os.path.expanduser(path)))


def _system_ceiling_is_there() -> bool:
    """Only "there is none" counts as none: a ceiling that we may not look at must not be skipped."""
    try:
        os.lstat(SYSTEM_CEILING)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as err:
        raise ProfileError(f"cannot be looked at: {err.strerror}", where=str(SYSTEM_CEILING)) from err
    return True


def _under_ceiling(layer: Layer, path: Path) -> tuple[Layer, tuple[str, ...], str]:
    document = read(Place(path))
    source = Source(str(path), path.parent, (), document.lines, ceiling=True)
    ceiling = parse_layer(document.table, source)
    layer, taken = apply_ceiling(layer, ceiling)
    layer, _ = normalise(layer)
    return layer, taken, document.sha256


def _check_paths(layer: Layer) -> tuple[Layer, tuple[str, ...]]:
    """Refuse grants that are not there; drop optional ones, with a note."""
    notes: list[str] = []
    for key in ("filesystem.read", "filesystem.write", "process.allow_exec", "network.extra_roots"):
        if key not in layer.lists:
            continue
        kept: list[Item] = []
        for item in layer.items(key):
            if item.value.startswith(":") or _is_there(item):
                kept.append(item)
            elif item.optional:
                notes.append(f"{key}: {item.value!r} ({item.origin}) is not there and optional")
            else:
                asked = f" (asked as {item.origin.asked!r})" if item.origin.asked not in ("", item.value) else ""
                hint = f'create it, or mark it optional: "?{item.origin.asked or item.value}"'
                raise item.origin.error(f"the path {item.value!r}{asked} is not there, or cannot be reached", hint=hint)
        layer = layer.with_list(key, kept)
    workspace = layer.scalars["filesystem.workspace"]
    if workspace.value and not os.path.isdir(workspace.value):
        raise workspace.origin.error(f"the workspace {workspace.value!r} is not a directory that is there")
    return layer, tuple(notes)


def _check_protected(layer: Layer) -> None:
    """Refuse an `allow_protected` entry that grants nothing."""
    for item in layer.items("filesystem.allow_protected"):
        from sandbox.workspace.protected import check_allow

        try:
            check_allow([item.value])
        except ValueError as err:
            raise item.origin.error(str(err)) from err


def _is_there(item: Item) -> bool:
    try:
        return os.path.exists(item.value)
    except OSError:
        return False


def _origins(layer: Layer) -> Iterator[tuple[str, Origin]]:
    for key, item in layer.scalars.items():
        yield key, item.origin if item.origin.key else Origin(item.origin.file, key)
    for spec in FIELDS:
        if spec.is_list:
            yield spec.key, find_origin(layer, spec.key)
            for item in layer.items(spec.key):
                yield f"{spec.key}[{item.value}]", item.origin
    for table in (SETTING, SECRETS):
        written = [item.origin for key, item in layer.scalars.items() if (found := table_of(key)) and found[0] == table]
        yield table, written[-1] if written else Origin("default", table)


def _links(layer: Layer) -> dict[str, str]:
    """Asked path -> real path, for grants that were asked through a symbolic link by an absolute path."""
    links = {}
    for key in ("filesystem.read", "filesystem.write"):
        for item in layer.items(key):
            asked = item.origin.asked.removeprefix("?")
            if asked.startswith("/") and "$" not in asked:
                path = os.path.normpath(asked)
                if path != item.value and os.path.realpath(path) == item.value:
                    links[path] = item.value
    return links
