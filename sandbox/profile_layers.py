"""Layers: what one profile says, where each word of it came from, and how a child is laid over its parents.

A layer is sparse: only what was written is in it. Merging appends lists and lets the child's scalars win; the
defaults go underneath last, so that "not written" and "written as the default" stay apart until then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pydantic import ValidationError

from sandbox.destinations import parse_host, pattern_within
from sandbox.errors import ManifestError, ProfileError
from sandbox.grants import denied_by
from sandbox.http_rules import HttpRules
from sandbox.manifest import SECTIONS, Contradiction, Manifest, explain
from sandbox.profile_fields import BY_KEY, BY_MANIFEST_KEY, FIELDS, Field, entry_key, table_of
from sandbox.units import format_rate, format_size, format_time

# Order says something only here: the first device is the call's device 0.
_ORDERED: Final = frozenset({"gpu.devices"})
_IMPLIED: Final = {
    "filesystem.read": frozenset({":minimal", ":tmp", ":workspace"}),
    "filesystem.write": frozenset({":tmp"}),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: `file` is a path, "overrides", "manifest" or "default"; `asked` its text there."""

    file: str
    key: str = ""
    line: int = 0
    asked: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place} {self.key}".strip()

    @property
    def is_file(self) -> bool:
        return self.file.startswith("/")

    def error(self, message: str, *, hint: str = "") -> ManifestError:
        """The error to raise for what was written here."""
        kind = ProfileError if self.is_file else ManifestError
        return kind(message, where=str(self), hint=hint)


@dataclass(frozen=True, slots=True)
class Item:
    """One value or list entry. `optional`: a granted path that may be missing."""

    value: Any
    origin: Origin
    optional: bool = False


Items = tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says. `removes[key]` None takes every inherited entry away.

    `removed` is for messages: who took entries of a list away.
    """

    name: str = ""
    description: str = ""
    scalars: Mapping[str, Item] = field(default_factory=dict)
    lists: Mapping[str, Items] = field(default_factory=dict)
    removes: Mapping[str, tuple[Origin, Items | None]] = field(default_factory=dict)
    sealed: Origin | None = None
    removed: Mapping[str, Origin] = field(default_factory=dict)

    def items(self, key: str) -> Items:
        return self.lists.get(key, ())

    def values(self, key: str) -> tuple[Any, ...]:
        return tuple(item.value for item in self.items(key))

    def with_list(self, key: str, items: Iterable[Item]) -> Layer:
        return self._but(lists={**self.lists, key: tuple(items)})

    def with_scalar(self, key: str, item: Item) -> Layer:
        return self._but(scalars={**self.scalars, key: item})

    def _but(self, scalars: Mapping[str, Item] | None = None, lists: Mapping[str, Items] | None = None) -> Layer:
        return replace(
            self,
            scalars=self.scalars if scalars is None else scalars,
            lists=self.lists if lists is None else lists,
        )


def merge(parent: Layer, child: Layer) -> Layer:
    """Lay `child` over `parent`. Name and description are the child's alone, `sealed` is not inherited here."""
    scalars, lists = dict(parent.scalars), dict(parent.lists)
    for key, (_, entries) in child.removes.items():
        if BY_KEY[key].kind == "table":
            _remove_from_table(scalars, key, entries)
        else:
            _remove_entries(lists, key, entries)
    scalars.update(child.scalars)
    for key, items in child.lists.items():
        lists[key] = dedup((*lists.get(key, ()), *items))
    removed = {**parent.removed, **child.removed, **{key: origin for key, (origin, _) in child.removes.items()}}
    return Layer(child.name, child.description, scalars, lists, {}, child.sealed, removed)


def dedup(items: Iterable[Item]) -> Items:
    """The first of equal entries stays; it is optional only where every one of them was."""
    kept: dict[Any, Item] = {}
    for item in items:
        first = kept.setdefault(item.value, item)
        if first.optional and not item.optional:
            kept[item.value] = item
    return tuple(kept.values())


def _remove_entries(lists: dict[str, Items], key: str, entries: Items | None) -> None:
    if entries is None:
        lists.pop(key, None)
        return
    inherited = lists.get(key, ())
    for entry in entries:
        if all(item.value != entry.value for item in inherited):
            listed = ", ".join(repr(item.value) for item in inherited) or "nothing"
            raise entry.origin.error(f"{entry.origin.asked!r} is not inherited; {key} inherits {listed}")
    gone = {entry.value for entry in entries}
    lists[key] = tuple(item for item in inherited if item.value not in gone)


def _remove_from_table(scalars: dict[str, Item], table: str, entries: Items | None) -> None:
    inherited = [key for key in scalars if (found := table_of(key)) and found[0] == table]
    for entry in entries or ():
        if entry_key(table, entry.value) not in scalars:
            raise entry.origin.error(f"{entry.value!r} is not inherited by {table.removesuffix('.entries')}")
    for key in inherited if entries is None else [entry_key(table, entry.value) for entry in entries]:
        del scalars[key]


def from_manifest(manifest: Manifest, file: str) -> Layer:
    """A full layer that says exactly what `manifest` says."""
    scalars: dict[str, Item] = {}
    lists: dict[str, Items] = {}
    for spec in FIELDS:
        value = getattr(getattr(manifest, spec.section), spec.field)
        origin = Origin(file, spec.key if file != "default" else "")
        if spec.kind == "table":
            scalars.update({entry_key(spec.key, name): Item(entry, origin) for name, entry in value.items()})
        elif spec.is_list:
            if value is not None:
                lists[spec.key] = tuple(Item(entry, origin) for entry in value)
        else:
            scalars[spec.key] = Item(value, origin)
    return Layer(manifest.name, manifest.description, scalars, lists)


def complete(layer: Layer) -> Layer:
    """Put the defaults underneath."""
    return merge(from_manifest(Manifest(), "default"), layer)


def normalise(layer: Layer) -> tuple[Layer, tuple[str, ...]]:
    """One form for one meaning: what is implied or cannot take effect is settled. Returns it with notes.

    The layer is complete. Deny wins over reading here; a denied *write* is left for `to_manifest` to refuse.
    """
    for key, implied in _IMPLIED.items():
        layer = layer.with_list(key, (item for item in layer.items(key) if item.value not in implied))
    layer = _settle_workspace(layer)
    if layer.scalars["network.mode"].value == "none":
        layer = layer.with_list("network.allow", ())
    required = set(layer.values("isolation.required"))
    best_effort = (item for item in layer.items("isolation.best_effort") if item.value not in required)
    layer = layer.with_list("isolation.best_effort", best_effort)
    notes = []
    for item in layer.items("filesystem.read"):
        if pattern := denied_by(item.value, layer.values("filesystem.deny")):
            notes.append(f"filesystem.read: {item.value!r} ({item.origin}) is denied by {pattern!r}")
    notes += _idle_rules(layer)
    allowed = (i for i in layer.items("filesystem.read") if not denied_by(i.value, layer.values("filesystem.deny")))
    return layer.with_list("filesystem.read", allowed), tuple(notes)


def _idle_rules(layer: Layer) -> Iterable[str]:
    """HTTP rules that change nothing, or leave nothing: what their author hardly meant."""
    rules = HttpRules(layer.values("network.http"))
    reached = [parse_host(text) for text in layer.values("network.allow")]
    for host, group in rules.groups.items():
        first = str((*group.allow, *group.deny)[0])
        where = f"network.http: {first!r} ({find_origin(layer, 'network.http', first)})"
        named = [rule for rule in reached if pattern_within(host, rule) or pattern_within(rule, host)]
        if not named:
            yield f"{where} is for a host that network.allow does not name"
        elif not group.inspects and all(rule.is_tls for rule in named):
            yield f"{where} permits nothing: connections to it are TLS, which takes a rule with inspect = true"


def _settle_workspace(layer: Layer) -> Layer:
    """A path without a mode is writable exactly when ':workspace' is; a mode without a path waits for one."""
    workspace, mode = layer.scalars["filesystem.workspace"], layer.scalars["filesystem.workspace_mode"]
    granted = ":workspace" in layer.values("filesystem.write")
    if not workspace.value:
        return layer.with_scalar("filesystem.workspace_mode", Item("private", mode.origin))
    if mode.value == "private":
        mode = Item("rw" if granted else "ro", workspace.origin)
        layer = layer.with_scalar("filesystem.workspace_mode", mode)
    if mode.value in ("rw", "cow") and not granted:
        token = Item(":workspace", mode.origin)
        layer = layer.with_list("filesystem.write", (*layer.items("filesystem.write"), token))
    return layer


def to_manifest(layer: Layer) -> Manifest:
    """Build the manifest of a complete layer. Raises ManifestError naming where the bad value was written."""
    sections: dict[str, Any] = {name: {} for name in SECTIONS}
    for key, item in layer.scalars.items():
        if table := table_of(key):
            spec = BY_KEY[table[0]]
            sections[spec.section].setdefault(spec.field, {})[table[1]] = item.value
        else:
            sections[BY_KEY[key].section][BY_KEY[key].field] = item.value
    for key, items in layer.lists.items():
        values = [item.value for item in items]
        sections[BY_KEY[key].section][BY_KEY[key].field] = tuple(values if key in _ORDERED else sorted(values))
    try:
        return Manifest(name=layer.name, description=layer.description, **sections)
    except ManifestError as err:
        raise _located(err, layer) from None


def _located(err: ManifestError, layer: Layer) -> ManifestError:
    """The same error with the places where the values were written."""
    cause = err.__cause__
    details = cause.errors(include_url=False)[0] if isinstance(cause, ValidationError) else None
    context = details.get("ctx", {}) if details else {}
    clash = context.get("error")
    if isinstance(clash, Contradiction):
        origin = find_origin(layer, clash.key, clash.entry)
        other = find_origin(layer, *clash.other) if clash.other[0] else None
        also = f" ({other})" if other and other.file not in ("default", origin.file if not other.line else "") else ""
        return origin.error(f"{clash}{also}", hint=clash.hint)
    if details is None:
        return err
    key = ".".join(str(part) for part in details["loc"][:2])
    spec = BY_MANIFEST_KEY.get(key)
    origin = find_origin(layer, spec.key if spec else key)
    return origin.error(explain_field(spec, dict(details)) if spec else explain(details))


def find_origin(layer: Layer, key: str, entry: str = "") -> Origin:
    """Where a key, or one entry of it, was written; the key itself when that is not known."""
    if key in layer.scalars:
        origin = layer.scalars[key].origin
    else:
        found = [item.origin for item in layer.items(key) if not entry or item.value == entry]
        origin = found[-1] if found else layer.removed.get(key, Origin("default"))
    return origin if origin.key else Origin(origin.file, key)


def explain_field(spec: Field, details: dict[str, Any], asked: str = "") -> str:
    """One pydantic error about `spec`, with bounds in the unit that the file uses."""
    show = {"size": format_size, "rate": format_rate, "time": format_time}.get(spec.kind)
    context = details.get("ctx", {})
    value = repr(asked) if asked else repr(details["input"])
    if show and details["type"] == "greater_than_equal":
        return f"{value} is too small; allowed: {show(context['ge'])} or more"
    if show and details["type"] == "less_than_equal":
        return f"{value} is too large; allowed: {show(context['le'])} or less"
    return explain(details)  # type: ignore[arg-type]
