"""What a manifest takes and refuses, and that each refusal says which key, which value and what is allowed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from sandbox.destinations import host_within, meet_hosts, parse_host
from sandbox.errors import ManifestError
from sandbox.grants import check_pattern, denied_by, path_within
from sandbox.manifest import CONTROLS, MEMORY_MAX, SECONDS_MAX, Manifest
from sandbox.units import format_rate, format_size, format_time, parse_rate, parse_size, parse_time


def test_the_default_manifest_grants_nothing_and_every_limit_is_finite() -> None:
    manifest = Manifest()
    fs = manifest.filesystem
    assert (fs.read, fs.write, fs.workspace, fs.workspace_mode) == ((), (), "", "private")
    assert (manifest.network.mode, manifest.network.allow) == ("none", ())
    assert (manifest.gpu.count, manifest.gpu.devices) == (0, ())
    assert (manifest.environment.allow, manifest.environment.set) == ((), {})
    assert manifest.isolation.best_effort == ()
    limits = manifest.resources
    assert limits.disk_bytes <= limits.memory_bytes
    finite = ("cpus", "memory_bytes", "pids", "wall_time_s", "disk_bytes", "inodes", "output_bytes", "open_files")
    assert all(getattr(limits, name) for name in finite)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"bogus": 1}, "bogus", "unknown key"),
    ({"resources": {"memory": "1GiB"}}, "resources.memory", "unknown key"),
    ({"resources": {"memory_bytes": 0}}, "resources.memory_bytes", "0 is too small"),
    ({"resources": {"memory_bytes": -5}}, "resources.memory_bytes", "-5 is too small"),
    ({"resources": {"memory_bytes": MEMORY_MAX + 1}}, "resources.memory_bytes", "is too large"),
    ({"resources": {"memory_bytes": 2**70}}, "resources.memory_bytes", "is too large"),
    ({"resources": {"memory_bytes": "1000000"}}, "resources.memory_bytes", "not a whole number"),
    ({"resources": {"memory_bytes": 1e9}}, "resources.memory_bytes", "not a whole number"),
    ({"resources": {"pids": True}}, "resources.pids", "not a whole number"),
    ({"resources": {"pids": 4194305}}, "resources.pids", "allowed: 4194304 or less"),
    ({"resources": {"wall_time_s": float("nan")}}, "resources.wall_time_s", "not a finite number"),
    ({"resources": {"wall_time_s": float("inf")}}, "resources.wall_time_s", "not a finite number"),
    ({"resources": {"wall_time_s": SECONDS_MAX + 1}}, "resources.wall_time_s", "too large"),
    ({"resources": {"cpus": 0.0}}, "resources.cpus", "too small"),
    ({"resources": {"output_bytes": 2**53 + 1}}, "resources.output_bytes", "too large"),
    ({"filesystem": {"read": "/data"}}, "filesystem.read", "not a list"),
    ({"filesystem": {"read": ["data"]}}, "filesystem.read.0", "not an absolute path"),
    ({"filesystem": {"read": ["~/data"]}}, "filesystem.read.0", "not an absolute path"),
    ({"filesystem": {"read": ["/a/../b"]}}, "filesystem.read.0", "not normal"),
    ({"filesystem": {"read": ["/a/"]}}, "filesystem.read.0", "not normal"),
    ({"filesystem": {"read": ["/a\0b"]}}, "filesystem.read.0", "control character"),
    ({"filesystem": {"read": ["/a\x1b[31m"]}}, "filesystem.read.0", "control character"),
    ({"filesystem": {"read": ["/a\udcff"]}}, "filesystem.read.0", "not valid UTF-8"),
    ({"filesystem": {"read": ["/" + "a" * 5000]}}, "filesystem.read.0", "longer than"),
    ({"filesystem": {"read": ["/a/*.csv"]}}, "filesystem.read.0", "wildcard"),
    ({"filesystem": {"read": [":root"]}}, "filesystem.read.0", "not a token"),
    ({"filesystem": {"write": [":minimal"]}}, "filesystem.write.0", "read-only system view"),
    ({"filesystem": {"deny": ["/a/**b"]}}, "filesystem.deny.0", "whole component"),
    ({"filesystem": {"deny": [".env"]}}, "filesystem.deny.0", "not an absolute path"),
    ({"filesystem": {"allow_protected": ["../x"]}}, "filesystem.allow_protected.0", "below the workspace"),
    ({"filesystem": {"read": ["/"]}}, "filesystem.read", "the jail's own"),
    ({"filesystem": {"read": ["/proc/self"]}}, "filesystem.read", "the jail's own"),
    ({"filesystem": {"write": ["/tmp"]}}, "filesystem.write", "the jail's own"),
    ({"filesystem": {"write": ["/a/b"], "deny": ["/a"]}}, "filesystem.write", "inside the denied tree '/a'"),
    ({"filesystem": {"write": ["/a/.git"], "deny": ["**/.git"]}}, "filesystem.write", "denied tree '**/.git'"),
    ({"filesystem": {"workspace": "/w"}}, "filesystem.workspace", "a private workspace has no path"),
    ({"filesystem": {"workspace_mode": "cow"}}, "filesystem.workspace", "a private workspace has no path"),
    ({"filesystem": {"workspace": "/w", "workspace_mode": "rw"}}, "filesystem.workspace_mode", "':workspace'"),
    ({"network": {"mode": "open"}}, "network.mode", "allowed: 'none' or 'allowlist'"),
    ({"network": {"allow": ["a.example"]}}, "network.allow", "network.mode is 'none'"),
    ({"gpu": {"count": -1}}, "gpu.count", "too small"),
    ({"gpu": {"count": 1, "devices": ["0"]}}, "gpu.count", "say one"),
    ({"gpu": {"devices": ["/dev/nvidia0"]}}, "gpu.devices.0", "not a GPU"),
    ({"gpu": {"sm_percent": 0}}, "gpu.sm_percent", "too small"),
    ({"gpu": {"sm_percent": 101}}, "gpu.sm_percent", "too large"),
    ({"environment": {"allow": ["LC_*"]}}, "environment.allow.0", "not a variable name"),
    ({"environment": {"allow": ["A=B"]}}, "environment.allow.0", "not a variable name"),
    ({"environment": {"set": {"1A": "x"}}}, "environment.set.1A.[key]", "not a variable name"),
    ({"environment": {"set": {"A": "x\0y"}}}, "environment.set.A", "NUL"),
    ({"environment": {"set": {"A": 1}}}, "environment.set.A", "not a string"),
    ({"process": {"allow_exec": ["git"]}}, "process.allow_exec.0", "not an absolute path"),
    ({"audit": {"capture": ["stdin"]}}, "audit.capture.0", "allowed: 'args', 'output' or 'result'"),
    ({"isolation": {"best_effort": ["mem"]}}, "isolation.best_effort.0", "allowed: 'filesystem'"),
    ({"isolation": {"best_effort": ["io"], "required": ["io"]}}, "isolation.best_effort", "at once"),
    ({"name": "a b"}, "name", "not a name"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "where", "says"), BAD, ids=[f"{w}-{i}" for i, (_, w, _) in enumerate(BAD)])
def test_bad_input_is_one_error_with_key_value_and_what_is_allowed(data: dict[str, Any], where: str, says: str) -> None:
    for build in (lambda: Manifest(**data), lambda: Manifest.model_validate(data)):
        with pytest.raises(ManifestError) as caught:
            build()
        assert caught.value.where == where
        assert says in str(caught.value)
        assert str(caught.value).count(f"{where}:") == 1


def test_the_permitted_twins_of_bad_input_are_taken() -> None:
    manifest = Manifest(
        filesystem={
            "read": ["/a", ":minimal"],
            "write": ["/a/b", ":workspace"],
            "deny": ["/a/b/secret", "**/.env"],
            "allow_protected": [".git/hooks"],
            "workspace": "/w",
            "workspace_mode": "cow",
        },
        network={"mode": "allowlist", "allow": ["API.Example.org", "*.example.org:8443", "10.0.0.0/8:5432"]},
        resources={"memory_bytes": MEMORY_MAX, "cpus": 2, "wall_time_s": SECONDS_MAX, "io_bytes_per_s": None},
        gpu={"devices": ["0", "GPU-8f4a", "MIG-1b2c"], "sm_percent": 100},
        environment={"allow": ["LANG"], "set": {"LD_PRELOAD": "/x.so"}},
        isolation={"best_effort": list(CONTROLS)},
    )
    assert manifest.network.allow == ("api.example.org:443", "*.example.org:8443", "10.0.0.0/8:5432")
    assert manifest.workspace_writable
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


def test_a_manifest_cannot_be_changed() -> None:
    manifest = Manifest()
    with pytest.raises(ValueError, match="frozen"):
        manifest.resources.pids = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "x"  # type: ignore[misc]


def test_equal_manifests_hash_alike() -> None:
    one, same, other = (Manifest(environment={"set": {"A": value}}) for value in ("1", "1", "2"))
    assert len({one, same, other}) == 2


def test_defaults_are_not_shared_between_manifests() -> None:
    Manifest().environment.set["LEAK"] = "1"
    assert Manifest().environment.set == {}


def test_the_digest_is_sha256_over_rfc_8785_of_the_json_form() -> None:
    manifest = Manifest(name="x", resources={"wall_time_s": 60, "cpus": 1.5})
    again = hashlib.sha256(rfc8785.dumps(json.loads(manifest.model_dump_json()))).hexdigest()
    assert manifest.digest == f"sha256:{again}"
    assert manifest.digest == Manifest(name="x", resources={"cpus": 1.5, "wall_time_s": 60.0}).digest
    assert manifest.digest != Manifest(name="x", resources={"cpus": 1.5, "wall_time_s": 61}).digest


def test_the_digest_of_the_empty_manifest_changes_only_with_the_format() -> None:
    """A change here means that records of one manifest no longer compare across versions: say so in the changelog."""
    assert Manifest().digest == "sha256:f509013caf8273c55335dbc1dc770299f4f1ffba184b3cd91e1e2b8bd843e4e7"


# --- units


@pytest.mark.parametrize(
    ("text", "value"),
    [("1B", 1), ("512MiB", 512 << 20), ("1.5GiB", 3 << 29), ("2 TiB", 2 << 40), ("1kB", 1000), ("3MB", 3_000_000)],
)
def test_sizes_mean_what_they_say(text: str, value: int) -> None:
    assert parse_size(text) == value
    assert parse_rate(f"{text}/s") == value


@pytest.mark.parametrize(
    ("text", "value"), [("30s", 30), ("250ms", 0.25), ("2min", 120), ("1.5h", 5400), ("1d", 86400)]
)
def test_times_mean_what_they_say(text: str, value: float) -> None:
    assert parse_time(text) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("512", "no unit"),
        ("512M", 'did you mean "MiB"?'),
        ("512mib", 'did you mean "MiB"?'),
        ("512bananas", "unknown unit"),
        ("", "not a size"),
        ("MiB", "not a size"),
        ("1e3MiB", "not a size"),
        ("0.5B", "whole number"),
        ("١MiB", "not a size"),
        ("1 000B", "not a size"),
        ("9" * 30 + "B", "not a size"),
        ("5min", "unknown unit"),
    ],
)
def test_wrong_sizes_are_refused_with_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"size|unit|whole") as caught:
        parse_size(text)
    assert says in str(caught.value)


def test_a_rate_needs_its_second() -> None:
    with pytest.raises(ValueError, match="50MiB/s"):
        parse_rate("50MiB")


@given(st.integers(0, 2**53))
def test_a_formatted_size_reads_back_as_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size
    assert parse_rate(format_rate(size)) == size


@given(st.floats(0.001, SECONDS_MAX))
def test_a_formatted_time_reads_back_as_itself(seconds: float) -> None:
    assert parse_time(format_time(seconds)) == seconds


# --- paths and deny patterns


def test_a_path_lies_within_by_components_not_by_text() -> None:
    assert path_within("/data/x", "/data")
    assert path_within("/data", "/data")
    assert path_within("/anything", "/")
    assert not path_within("/database", "/data")
    assert not path_within("/", "/data")


@pytest.mark.parametrize(
    ("pattern", "hits", "misses"),
    [
        ("/a", ["/a", "/a/b/c"], ["/ab", "/b/a"]),
        ("**/.env", ["/.env", "/x/.env", "/x/y/.env", "/x/.env/z"], ["/x/.envrc", "/x/a.env"]),
        ("/a/**/*.pem", ["/a/k.pem", "/a/b/c/k.pem"], ["/k.pem", "/a/k.pemx", "/a"]),
        ("/a/**", ["/a/b", "/a/b/c"], ["/a", "/ab"]),
        ("/a/?.txt", ["/a/b.txt"], ["/a/bb.txt", "/a/.txt"]),
        ("/a/[!b]", ["/a/c"], ["/a/b"]),
        ("/a/x+(1)", ["/a/x+(1)"], ["/a/xx1"]),
        ("/a/*", ["/a/b", "/a/b/c"], ["/a"]),
    ],
)
def test_a_deny_pattern_holds_its_whole_tree_and_nothing_beside(
    pattern: str, hits: list[str], misses: list[str]
) -> None:
    check_pattern(pattern)
    assert [denied_by(path, [pattern]) for path in hits] == [pattern] * len(hits)
    assert [denied_by(path, [pattern]) for path in misses] == [None] * len(misses)


# --- hosts


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("api.github.com", "api.github.com:443"),
        ("API.GitHub.com.:443", "api.github.com:443"),
        ("a.example:*", "a.example:*"),
        ("**.example.org:22", "**.example.org:22"),
        ("bücher.example", "xn--bcher-kva.example:443"),
        ("10.1.2.3:80", "10.1.2.3:80"),
        ("10.0.0.0/8:80", "10.0.0.0/8:80"),
        ("[2001:db8::1]:443", "[2001:db8::1]:443"),
        ("[2001:db8::/32]", "[2001:db8::/32]:443"),
        ("localhost:8080", "localhost:8080"),
    ],
)
def test_host_rules_have_one_form(text: str, canonical: str) -> None:
    assert str(parse_host(text)) == canonical
    assert str(parse_host(canonical)) == canonical


@pytest.mark.parametrize(
    "text",
    ["*", "**", "*:443", "*.com", "**.org:443", "a.*.org", "a*.example.org", "*.10.0.0.1", "127.1", "0x7f000001",
     "2130706433", "1.2.3.0x4", "a..b", ".a.b", "-a.b", "a.b-:1", "a.b:0", "a.b:65536", "a.b:", "a.b:http", "::1",
     "[::1", "[::1]x", "[fe80::1%eth0]:1", "10.0.0.1/8:80", "a b.example", "a.example\n", "", ":443", "x" * 64 + ".org",
     "https://a.example", "a.example/path", "user@a.example"],
)  # fmt: skip
def test_host_rules_that_are_too_wide_or_malformed_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_host(text)


@pytest.mark.parametrize(
    ("inner", "outer", "within"),
    [
        ("a.example.org", "*.example.org", True),
        ("a.b.example.org", "*.example.org", False),
        ("a.b.example.org", "**.example.org", True),
        ("*.b.example.org", "**.example.org", True),
        ("*.example.org", "**.example.org", True),
        ("**.example.org", "*.example.org", False),
        ("**.b.example.org", "**.example.org", True),
        ("example.org", "*.example.org", False),
        ("example.org", "**.example.org", False),
        ("evil-example.org", "**.example.org", False),
        ("a.example.org:8443", "a.example.org", False),
        ("a.example.org", "a.example.org:*", True),
        ("a.example.org:*", "a.example.org", False),
        ("10.1.0.0/16", "10.0.0.0/8", True),
        ("10.0.0.0/8", "10.1.0.0/16", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "**.example.org", False),
        ("[2001:db8::1]", "10.0.0.0/8", False),
    ],
)
def test_host_rules_nest_by_meaning(inner: str, outer: str, within: bool) -> None:
    assert host_within(inner, outer) is within


def test_two_host_rules_meet_in_what_both_allow() -> None:
    assert meet_hosts("a.example.org:*", "*.example.org:443") == "a.example.org:443"
    assert meet_hosts("a.example.org:80", "*.example.org:443") is None
    assert meet_hosts("b.example.com", "*.example.org") is None
