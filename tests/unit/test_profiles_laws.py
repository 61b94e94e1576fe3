"""The laws of merging, narrowing and the ceiling, over generated profiles.

Rights are judged by a second, naive reading of a manifest: which of a fixed set of probes (read this path, connect
to that host, pass this variable …) it permits. The laws then speak of sets, not of our own containment code.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import ManifestError
from sandbox.manifest import Manifest
from sandbox.profile_layers import Layer, complete, from_manifest, merge, normalise, to_manifest
from sandbox.profile_narrow import apply_ceiling, widenings
from sandbox.profile_parse import NOT_IN_CEILING, Source, parse_layer
from sandbox.profile_schema import to_file_form

BASE = Path("/law")  # nothing is there: these laws never look at files
PATHS = ["/law/a", "/law/a/b", "/law/a/b/c", "/law/ab", "/law/e", "/law/e/b"]
PATTERNS = ["/law/a/b", "/law/e", "**/b", "/law/*/e", "**/c"]
HOSTS = ["x.k.org:443", "xk.org:443", "y.k.org:443", "x.y.k.org:443", "x.k.org:22", "k.org:443", "10.1.2.3:443"]
RULES = [
    "x.k.org:443",
    "k.org:443",
    "x.k.org:*",
    "*.k.org:443",
    "**.k.org:443",
    "**.y.k.org:*",
    "10.1.0.0/16:443",
    "10.0.0.0/8:*",
]
HTTP = [
    "GET x.k.org",
    "GET,POST x.k.org /a/** inspect",
    "* *.k.org /a/b",
    "POST *.k.org inspect",
    "GET **.k.org /a/**",
    "deny POST x.k.org",
    "deny * *.k.org /a/**",
    "GET 10.0.0.0/8",
    "* x.k.org inspect",
]
REQUESTS = [
    (tls, method, path) for tls in (False, True) for method in ("GET", "POST") for path in ("/a/b", "/a/c", "/d")
]
NAMES = ["A", "B", "C"]
CONTROLS = ["memory", "cpus", "io"]


def some(values: list[str], most: int = 3) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True)


def sizes(*, unlimited: bool = False) -> st.SearchStrategy[str]:
    numbers = st.sampled_from(["1MiB", "1024KiB", "2MiB", "5MB", "1GiB"])
    return numbers | st.just("unlimited") if unlimited else numbers


ABSENT = object()
TOPICS = ["filesystem", "network", "rest"]
Topic = pytest.mark.parametrize("topic", TOPICS)


def section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A table in which each key is usually there."""
    drawn = st.fixed_dictionaries({key: st.one_of(value, value, st.just(ABSENT)) for key, value in keys.items()})
    return drawn.map(lambda table: {key: value for key, value in table.items() if value is not ABSENT})


def shape(topic: str, *, ceiling: bool = False) -> st.SearchStrategy[dict[str, Any]]:
    """A profile about one topic, so that two of them have something to disagree on."""
    filesystem = {"read": some(PATHS), "write": some([*PATHS, ":workspace"]), "deny": some(PATTERNS, 1)}
    environment: dict[str, st.SearchStrategy[Any]] = {"allow": some(NAMES)}
    if not ceiling:
        filesystem["workspace"] = st.sampled_from([*PATHS, "", ""])
        filesystem["workspace_mode"] = st.sampled_from(["ro", "cow", "rw"])
        environment["set"] = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["1", "2"]), max_size=2)
    if topic == "filesystem":
        return section(filesystem=section(**filesystem))
    if topic == "network":
        mode = section(mode=st.sampled_from(["none", "allowlist"]))
        hosts = section(allow=some(RULES), http=some(HTTP), upload_max=sizes(unlimited=True))
        return section(network=mode | hosts | hosts)
    return section(
        resources=section(memory=sizes(), pids=st.integers(1, 9), io=st.sampled_from(["1MiB/s", "unlimited"])),
        gpu=section(count=st.integers(0, 3)),
        environment=section(**environment),
        process=section(warm=st.booleans(), allow_exec=some(["/law/a", "/law/a/b", "/law/e"])),
        audit=section(capture=some(["args", "output"]), durability=st.sampled_from(["fsync", "flush"])),
        isolation=section(best_effort=some(CONTROLS)) | section(required=some(CONTROLS)),
    )


def parse(table: dict[str, Any], *, ceiling: bool = False) -> Layer:
    return parse_layer(table, Source("law", BASE, ceiling=ceiling))


def whole(layer: Layer) -> Layer:
    return normalise(complete(layer))[0]


def sound(layer: Layer) -> bool:
    """Whether it is a manifest at all: a write grant in a denied tree is an error, which grants nothing."""
    try:
        to_manifest(layer)
    except ManifestError:
        return False
    return True


def capped(layer: Layer, ceiling: Layer) -> Layer | None:
    """The layer under the ceiling; None where it is refused."""
    try:
        return normalise(apply_ceiling(layer, ceiling)[0])[0]
    except ManifestError:
        return None


def rights(layer: Layer) -> set[tuple[Any, ...]]:
    """What a manifest permits, by trying each probe against each entry the slow and obvious way."""
    manifest = to_manifest(layer)
    fs, limits, isolation = manifest.filesystem, manifest.resources, manifest.isolation
    written = [*fs.write, *([fs.workspace] if fs.workspace_mode == "rw" else [])]
    read = [*fs.read, *written, *([fs.workspace] if fs.workspace else [])]
    found: set[tuple[Any, ...]] = set()
    for probe in [*PATHS, "/law/a/b/c/x", "/law"]:
        if any(denies(pattern, probe) for pattern in fs.deny):
            continue
        found |= {("read", probe) for tree in read if under(probe, tree)}
        found |= {("write", probe) for tree in written if under(probe, tree)}
    hosts = {host for host in HOSTS for rule in manifest.network.allow if connects(rule, host)}
    found |= {("host", host) for host in hosts}
    names = {host.rsplit(":", 1)[0] for host in hosts}
    found |= {("http", name, *r) for name in names for r in REQUESTS if sends(manifest.network.http, name, *r)}
    programs = manifest.process.allow_exec
    found |= {("exec", p) for p in PATHS if programs is None or any(under(p, tree) for tree in programs)}
    found |= {("env", name) for name in manifest.environment.allow}
    found |= {("set", *pair) for pair in manifest.environment.set.items()}
    found |= {("memory", n) for n in (1 << 20, 2 << 20, 5_000_000, 512 << 20, 1 << 30) if n <= limits.memory_bytes}
    found |= {("pids", n) for n in (*range(1, 10), 64) if n <= limits.pids}
    found |= {("io", n) for n in (1 << 20, 1 << 40) if limits.io_bytes_per_s is None or n <= limits.io_bytes_per_s}
    up = manifest.network.upload_max_bytes
    found |= {("upload", n) for n in (1 << 20, 1 << 24, 1 << 30, 1 << 40) if up is None or n <= up}
    found |= {("gpu", n) for n in range(1, 4) if n <= manifest.gpu.count}
    found |= {("capture", what) for what in manifest.audit.capture}
    found |= {("weaker", control) for control in isolation.best_effort}
    found |= {("not required", control) for control in CONTROLS if control not in isolation.required}
    found |= {("warm",)} if manifest.process.warm else set()
    found |= {("flush",)} if manifest.audit.durability == "flush" else set()
    return found


def under(path: str, tree: str) -> bool:
    return tree.startswith("/") and (path + "/").startswith(tree + "/")


def denies(pattern: str, path: str) -> bool:
    parts, wanted = path[1:].split("/"), pattern.removeprefix("**/").removeprefix("/").split("/")
    starts = range(len(parts)) if pattern.startswith("**/") else [0]
    return any(
        len(parts) - start >= len(wanted) and all(w in ("*", p) for w, p in zip(wanted, parts[start:], strict=False))
        for start in starts
    )


def connects(rule: str, host: str) -> bool:
    name, port = rule.rsplit(":", 1)
    to_name, to_port = host.rsplit(":", 1)
    if port not in ("*", to_port):
        return False
    if "/" in name:
        octets = int(name.split("/")[1]) // 8
        return name.split(".")[:octets] == to_name.split(".")[:octets]
    extra = to_name.removesuffix(name.lstrip("*"))
    if name.startswith("**."):
        return to_name.endswith(name[2:]) and extra != ""
    return (to_name.endswith(name[1:]) and extra != "" and "." not in extra) if "*" in name else name == to_name


def sends(rules: tuple[str, ...], host: str, tls: bool, method: str, path: str) -> bool:
    """May this request be sent? By the rules of the longest host pattern that fits, one star before two."""
    found: dict[tuple[int, str], list[list[str]]] = {}
    for text in rules:
        words = text.split(" ")
        name = words[2] if words[0] == "deny" else words[1]
        if connects(f"{name}:*", f"{host}:1"):
            found.setdefault((-name.count("."), name), []).append(words)
    if not found:
        return True
    best = min(found, key=lambda key: (key[1].startswith("*"), key[1].startswith("**"), key[0]))
    deny = [words[1:] for words in found[best] if words[0] == "deny"]
    allow = [words for words in found[best] if words[0] != "deny"] or [["*", best[1], "/**"]]

    def names(words: list[str]) -> bool:
        pattern = words[2]
        fits = path.startswith(pattern[:-2]) if pattern.endswith("/**") else path == pattern
        return fits and (words[0] == "*" or method in words[0].split(","))

    return any(names(w) and (not tls or w[-1] == "inspect") for w in allow) and not any(names(w) for w in deny)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_merging_the_same_profile_twice_changes_nothing(topic: str, data: st.DataObject) -> None:
    table = data.draw(shape(topic))
    layer = parse(table)
    assert merge(layer, layer).lists == layer.lists
    assert merge(layer, layer).scalars == layer.scalars


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_merging_is_associative(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    b = data.draw(shape(topic))
    c = data.draw(shape(topic))
    one, two, three = parse(a), parse(b), parse(c)
    left, right = merge(merge(one, two), three), merge(one, merge(two, three))
    assert (left.lists, left.scalars) == (right.lists, right.scalars)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_no_widening_means_no_new_right(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    b = data.draw(shape(topic))
    inner, outer = whole(merge(parse(b), parse(a))), whole(parse(b))
    if sound(inner) and sound(outer) and not widenings(inner, outer):
        assert rights(inner) <= rights(outer)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_a_widening_is_only_reported_where_something_is_wider(topic: str, data: st.DataObject) -> None:
    """Not every widening shows in the probes, but what is left unchanged must never be reported."""
    a = data.draw(shape(topic))
    b = data.draw(shape(topic))
    layer = whole(parse(a))
    assert widenings(layer, layer) == []
    other = whole(parse(b))
    if not widenings(layer, other) and not widenings(other, layer) and sound(layer) and sound(other):
        assert rights(layer) == rights(other)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_a_ceiling_never_grants_and_leaves_no_more_than_it_names(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    c = data.draw(shape(topic, ceiling=True))
    layer, ceiling = whole(parse(a)), parse(c, ceiling=True)
    if not sound(layer) or (under_it := capped(layer, ceiling)) is None:
        return
    assert sound(under_it)
    assert widenings(under_it, layer) == []
    assert rights(under_it) <= rights(layer)
    left = rights(under_it)
    named = rights(whole(replace(ceiling, lists={k: v for k, v in ceiling.lists.items() if k != "filesystem.deny"})))
    if "filesystem.write" in ceiling.lists:
        assert {r for r in left if r[0] == "write"} <= named
    if "filesystem.read" in ceiling.lists:
        assert {r for r in left if r[0] == "read"} <= named
    for key, kind in (("network.allow", "host"), ("environment.allow", "env"), ("isolation.best_effort", "weaker")):
        if key in ceiling.lists:
            assert {r for r in left if r[0] == kind} <= named
    if "network.http" in ceiling.lists:
        rules = to_manifest(whole(ceiling.with_list("network.allow", ()))).network.http
        assert all(sends(rules, *right[1:]) for right in left if right[0] == "http")


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_a_ceiling_takes_no_more_than_it_must(topic: str, data: st.DataObject) -> None:
    """What both the layer and the ceiling permit is still permitted, paths and hosts among it."""
    a = data.draw(shape(topic))
    c = data.draw(shape(topic, ceiling=True))
    layer, ceiling = whole(parse(a)), parse(c, ceiling=True)
    if not sound(layer) or (under_it := capped(layer, ceiling)) is None:
        return
    whole_ceiling = whole(ceiling)
    if not sound(whole_ceiling):
        return
    if "network.allow" not in ceiling.lists and "network.mode" not in ceiling.scalars:
        # The ceiling leaves the hosts alone: then it permits whatever the layer reaches, as far as its rules go.
        whole_ceiling = whole_ceiling.with_list("network.allow", layer.items("network.allow"))
        whole_ceiling = whole_ceiling.with_scalar("network.mode", layer.scalars["network.mode"])
    both = rights(layer) & rights(whole_ceiling)
    kinds = {"read", "host", "http", "env", "memory", "pids", "io"} | (
        {"write"} if "filesystem.write" in ceiling.lists else set()
    )
    assert {right for right in both if right[0] in kinds} <= rights(under_it)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_a_ceiling_is_idempotent(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    c = data.draw(shape(topic, ceiling=True))
    layer, ceiling = whole(parse(a)), parse(c, ceiling=True)
    once = capped(layer, ceiling) if sound(layer) else None
    if once is not None:
        twice = capped(once, ceiling)
        assert twice is not None
        assert to_manifest(twice) == to_manifest(once)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_ceilings_commute(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    c = data.draw(shape(topic, ceiling=True))
    d = data.draw(shape(topic, ceiling=True))
    layer, one, other = whole(parse(a)), parse(c, ceiling=True), parse(d, ceiling=True)
    if not sound(layer):
        return
    first, second = capped(layer, one), capped(layer, other)
    left = capped(first, other) if first else None
    right = capped(second, one) if second else None
    assert (left is None) == (right is None)
    if left is not None and right is not None:
        assert widenings(left, right) == []
        assert widenings(right, left) == []
        assert rights(left) == rights(right)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_a_ceiling_commutes_with_narrowing(topic: str, data: st.DataObject) -> None:
    """Narrower before the ceiling is narrower after it."""
    a = data.draw(shape(topic))
    b = data.draw(shape(topic))
    c = data.draw(shape(topic, ceiling=True))
    layer, ceiling = whole(parse(a)), parse(c, ceiling=True)
    narrow = {name: {k: v for k, v in body.items() if f"{name}.{k}" not in NOT_IN_CEILING} for name, body in b.items()}
    narrower = capped(layer, parse(narrow, ceiling=True)) if sound(layer) else None
    if narrower is None:
        return
    high, low = capped(layer, ceiling), capped(narrower, ceiling)
    assert high is None or low is not None
    if high is not None and low is not None:
        assert rights(low) <= rights(high)


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_adding_a_deny_never_grants(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    deny = data.draw(some(PATTERNS))
    layer = parse(a)
    denied = whole(merge(layer, parse({"filesystem": {"deny": deny}})))
    if sound(denied):
        assert widenings(denied, whole(layer)) == []
        assert rights(denied) <= rights(whole(layer))


@Topic
@given(data=st.data())
@settings(max_examples=40)
def test_resolving_what_is_resolved_changes_nothing(topic: str, data: st.DataObject) -> None:
    a = data.draw(shape(topic))
    layer = whole(parse(a))
    if not sound(layer):
        return
    manifest = to_manifest(layer)
    again = whole(from_manifest(manifest, "manifest"))
    assert to_manifest(again) == manifest
    assert to_manifest(again).digest == manifest.digest
    written = whole(parse(to_file_form(manifest)))
    assert to_manifest(written) == manifest
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest
