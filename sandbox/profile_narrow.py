"""Narrower or wider, judged on meaning: what a sealed profile forbids, and what a ceiling leaves.

Both work on complete, normalised layers. Paths compare as trees, hosts as patterns, numbers as numbers with None
as the widest. Private space (`:workspace` without a path of the host) reaches nothing, so it is not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from sandbox.destinations import meet_hosts
from sandbox.errors import ProfileError
from sandbox.grants import denied_by, meet_paths, path_within
from sandbox.http_rules import beyond, meet_http
from sandbox.profile_fields import FIELDS, Field, table_of
from sandbox.profile_layers import Item, Items, Layer, Origin, find_origin

READ, WRITE, DENY = "filesystem.read", "filesystem.write", "filesystem.deny"
ALLOW, HTTP = "network.allow", "network.http"
WORKSPACE, MODE = "filesystem.workspace", "filesystem.workspace_mode"
COUNT, DEVICES = "gpu.count", "gpu.devices"


@dataclass(frozen=True, slots=True)
class Widening:
    """One way in which a layer goes beyond another: the words on both sides and where each stands."""

    key: str
    inner: str
    inner_origin: Origin
    outer: str
    outer_origin: Origin

    def __str__(self) -> str:
        return f"{self.key}: {self.inner} ({self.inner_origin}) goes beyond {self.outer} ({self.outer_origin})"


def widenings(inner: Layer, outer: Layer) -> list[Widening]:
    """Every way in which `inner` allows more than `outer`; empty means that it only narrows."""
    found = [*_wider_paths(inner, outer), *_wider_settings(inner, outer), *_wider_gpus(inner, outer)]
    for spec in FIELDS:
        if spec.key in (READ, WRITE, COUNT, DEVICES) or spec.kind == "table" or spec.meaning == "workspace":
            continue
        if spec.meaning == "http":
            found += _wider_http(inner, outer)
        elif spec.is_list:
            found += _wider_list(spec, inner, outer)
        elif not _scalar_within(spec, inner.scalars[spec.key].value, outer.scalars[spec.key].value):
            found.append(_scalar_widening(spec.key, inner, outer))
    return found


def is_within(inner: Layer, outer: Layer) -> bool:
    return not widenings(inner, outer)


def _scalar_within(spec: Field, inner: object, outer: object) -> bool:
    if spec.meaning == "limit":
        return outer is None or (inner is not None and inner <= outer)  # type: ignore[operator]
    if spec.meaning == "order":
        return spec.words.index(_word(inner)) <= spec.words.index(_word(outer))
    return inner == outer


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _scalar_widening(key: str, inner: Layer, outer: Layer) -> Widening:
    a, b = inner.scalars[key], outer.scalars[key]
    return Widening(key, _text(a), a.origin, _text(b), b.origin)


def _text(item: Item) -> str:
    return item.origin.asked or ("unlimited" if item.value is None else repr(item.value))


def _wider_list(spec: Field, inner: Layer, outer: Layer) -> list[Widening]:
    allowed = outer.values(spec.key)
    if spec.meaning == "denials":
        missing = [item for item in outer.items(spec.key) if item.value not in inner.values(spec.key)]
        origin = inner.removed.get(spec.key) or find_origin(inner, spec.key)
        return [Widening(spec.key, f"leaving out {i.value!r}", origin, repr(i.value), i.origin) for i in missing]
    if spec.key not in outer.lists:
        return []
    if spec.key not in inner.lists:
        origin = find_origin(outer, spec.key)
        return [Widening(spec.key, "every program", find_origin(inner, spec.key), str(list(allowed)), origin)]
    meet = _meeting(spec)
    beyond = [i for i in inner.items(spec.key) if all(meet(i.value, other) != i.value for other in allowed)]
    return [_beyond(spec.key, item, outer) for item in beyond]


def _beyond(key: str, item: Item, outer: Layer) -> Widening:
    allowed = ", ".join(repr(value) for value in outer.values(key)) or "nothing"
    return Widening(key, repr(item.value), item.origin, allowed, find_origin(outer, key))


def _meeting(spec: Field) -> Callable[[str, str], str | None]:
    if spec.key == "network.allow":
        return meet_hosts
    if spec.kind in ("grants", "programs"):
        return meet_paths
    return lambda one, other: one if one == other else None


def _trees(layer: Layer, key: str) -> Items:
    """The trees of the host that `key` opens, the workspace among them."""
    items = [item for item in layer.items(key) if not item.value.startswith(":")]
    workspace, mode = layer.scalars[WORKSPACE], layer.scalars[MODE].value
    if workspace.value and (mode == "rw") == (key == WRITE):
        items.append(workspace)
    return tuple(items)


def _covered(path: str, trees: Iterable[Item]) -> bool:
    return any(path_within(path, tree.value) for tree in trees)


def _wider_paths(inner: Layer, outer: Layer) -> list[Widening]:
    written, read = _trees(outer, WRITE), _trees(outer, READ)
    beyond = [(WRITE, item) for item in _trees(inner, WRITE) if not _covered(item.value, written)]
    beyond += [(READ, item) for item in _trees(inner, READ) if not _covered(item.value, (*read, *written))]
    return [_beyond(key, item, outer) for key, item in beyond]


def _wider_settings(inner: Layer, outer: Layer) -> list[Widening]:
    found = []
    for key, item in inner.scalars.items():
        if table_of(key):
            fixed = outer.scalars.get(key)
            if fixed is None or fixed.value != item.value:
                was = repr(fixed.value) if fixed else "not set"
                found.append(Widening(key, repr(item.value), item.origin, was, find_origin(outer, key)))
    return found


def _wider_http(inner: Layer, outer: Layer) -> list[Widening]:
    """A host that the outer side restricts has to be restricted as much by the inner one, where it is reached."""
    found = []
    for rule, limit in beyond(inner.values(HTTP), outer.values(HTTP), inner.values(ALLOW)):
        origin = find_origin(inner, HTTP, rule) if rule else inner.removed.get(HTTP) or find_origin(inner, ALLOW)
        found.append(Widening(HTTP, repr(rule) if rule else "no rule", origin, repr(limit), find_origin(outer, HTTP)))
    return found


def _wider_gpus(inner: Layer, outer: Layer) -> list[Widening]:
    """A count is any so many; devices are these and no others. Naming some of any is narrower."""
    count, limit = inner.scalars[COUNT].value, outer.scalars[COUNT].value
    devices, allowed = inner.values(DEVICES), outer.values(DEVICES)
    if allowed:
        beyond = [_beyond(DEVICES, item, outer) for item in inner.items(DEVICES) if item.value not in allowed]
        return beyond + ([_scalar_widening(COUNT, inner, outer)] if count else [])
    if max(count, len(devices)) <= limit:
        return []
    return [_scalar_widening(COUNT, inner, outer)] if count else [_beyond(DEVICES, inner.items(DEVICES)[0], outer)]


def apply_ceiling(layer: Layer, ceiling: Layer) -> tuple[Layer, tuple[str, ...]]:
    """Intersect with what the ceiling names; what it does not name stays. Returns it with notes on what was taken.

    Raises ProfileError where less would be something else: another launcher, a workspace elsewhere, other GPUs.
    """
    _check_workspace(layer, ceiling)
    _check_gpus(layer, ceiling)
    before = layer
    layer = _cap_paths(layer, ceiling)
    for spec in FIELDS:
        if spec.key in (READ, WRITE) or spec.meaning == "workspace":
            continue
        if spec.key in ceiling.lists:
            layer = layer.with_list(spec.key, _cap_list(spec, layer, ceiling))
        elif spec.key in ceiling.scalars:
            layer = _cap_scalar(spec, layer, ceiling.scalars[spec.key])
    denied = layer.values(DENY)
    for key in (READ, WRITE):
        layer = layer.with_list(key, (item for item in layer.items(key) if not denied_by(item.value, denied)))
    return layer, _taken(before, layer)


def _cap_scalar(spec: Field, layer: Layer, cap: Item) -> Layer:
    mine = layer.scalars[spec.key]
    if _scalar_within(spec, mine.value, cap.value):
        return layer
    if spec.meaning == "fixed":
        raise mine.origin.error(f"{mine.value!r} is refused: the ceiling permits {cap.value!r} only ({cap.origin})")
    return layer.with_scalar(spec.key, cap)


def _cap_list(spec: Field, layer: Layer, ceiling: Layer) -> Items:
    mine, theirs = layer.items(spec.key), ceiling.items(spec.key)
    if spec.meaning == "denials":
        return (*mine, *(item for item in theirs if item.value not in layer.values(spec.key)))
    if spec.meaning == "http":
        return _cap_http(mine, theirs)
    if spec.key not in layer.lists:
        return theirs
    return meet_items(mine, theirs, _meeting(spec))


def _cap_http(mine: Items, theirs: Items) -> Items:
    """Both sides restrict, so what is left is what both permit; the ceiling's own rules come along."""
    known = {item.value: item for item in (*theirs, *mine)}
    met = meet_http([item.value for item in mine], [item.value for item in theirs])
    return tuple(known.get(text) or Item(text, theirs[0].origin) for text in met)


def meet_items(mine: Iterable[Item], theirs: Items, meet: Callable[[str, str], str | None]) -> Items:
    """What both sides grant, each entry with the origin of the side that was smaller."""
    kept: dict[str, Item] = {}
    for one in mine:
        for other in theirs:
            value = meet(one.value, other.value)
            if value is None:
                continue
            if value == one.value:
                kept[value] = one
            else:
                # A ceiling's tree need not exist on every machine, so it never makes a call fail as missing.
                kept.setdefault(value, replace(other, value=value, optional=True))
    return tuple(kept.values())


def _cap_paths(layer: Layer, ceiling: Layer) -> Layer:
    """Writing implies reading, on both sides: a tree that may no longer be written may still be read."""
    if READ not in ceiling.lists and WRITE not in ceiling.lists:
        return layer
    mine_write, mine_read = _hosts_trees(layer, WRITE), _hosts_trees(layer, READ)
    their_write = ceiling.items(WRITE)
    their_read = (*ceiling.items(READ), *their_write) if READ in ceiling.lists else None
    write = meet_items(mine_write, their_write if WRITE in ceiling.lists else their_read or (), meet_paths)
    demoted = (*mine_read, *(item for item in mine_write if item.value not in {i.value for i in write}))
    read = demoted if their_read is None else meet_items(demoted, their_read, meet_paths)
    kept = {item.value: item for item in read if not _covered(item.value, write)}
    tokens = tuple(item for item in layer.items(WRITE) if item.value.startswith(":"))
    return layer.with_list(WRITE, (*tokens, *write)).with_list(READ, kept.values())


def _hosts_trees(layer: Layer, key: str) -> Items:
    return tuple(item for item in layer.items(key) if not item.value.startswith(":"))


def _check_workspace(layer: Layer, ceiling: Layer) -> None:
    workspace, mode = layer.scalars[WORKSPACE], layer.scalars[MODE].value
    if not workspace.value:
        return
    if pattern := denied_by(workspace.value, ceiling.values(DENY)):
        raise workspace.origin.error(
            f"the workspace {workspace.value!r} is denied by {pattern!r} ({find_origin(ceiling, DENY, pattern)})"
        )
    written, named = ceiling.items(WRITE), ceiling.lists
    if mode == "rw" and WRITE in named and not _covered(workspace.value, written):
        raise _outside(workspace, WRITE, ceiling)
    if READ in named and not _covered(workspace.value, (*ceiling.items(READ), *written)):
        raise _outside(workspace, READ, ceiling)


def _outside(workspace: Item, key: str, ceiling: Layer) -> ProfileError:
    allowed = ", ".join(repr(value) for value in ceiling.values(key)) or "nothing"
    error = workspace.origin.error(
        f"the workspace {workspace.value!r} lies outside the ceiling's {key}: {allowed} ({find_origin(ceiling, key)})",
        hint="use a directory inside it" if key == READ else "use a directory inside it, or the mode 'cow'",
    )
    return error if isinstance(error, ProfileError) else ProfileError(error.message, hint=error.hint)


def _check_gpus(layer: Layer, ceiling: Layer) -> None:
    count, devices = layer.scalars[COUNT], layer.items(DEVICES)
    if COUNT in ceiling.scalars and len(devices) > ceiling.scalars[COUNT].value:
        cap = ceiling.scalars[COUNT]
        raise devices[0].origin.error(f"{len(devices)} devices; the ceiling permits {cap.value} ({cap.origin})")
    if DEVICES in ceiling.lists and count.value:
        allowed = list(ceiling.values(DEVICES))
        where = find_origin(ceiling, DEVICES)
        raise count.origin.error(f"any {count.value}; the ceiling permits only these devices: {allowed} ({where})")


def _taken(before: Layer, after: Layer) -> tuple[str, ...]:
    """What a ceiling changed, in words."""
    notes = []
    for key, item in after.scalars.items():
        if item.value != before.scalars[key].value:
            notes.append(f"{key}: {_text(before.scalars[key])} lowered to {_text(item)} by the ceiling ({item.origin})")
    for key in before.lists:
        gone = [item for item in before.items(key) if item.value not in after.values(key)]
        notes += [f"{key}: {item.value!r} ({item.origin}) taken away by the ceiling" for item in gone]
    return tuple(notes)
