"""HTTP rules: their words, their one form, and what they permit, whichever way a server may read a path."""

from __future__ import annotations

import posixpath
import re
import string
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox.http_paths import Pattern, parse_pattern, readings
from sandbox.http_rules import HttpRules, beyond, canonical_http, meet_http, parse_http, text_of
from sandbox.profiles import resolve

HOST = "x.example.org"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("GET X.Example.ORG.", "GET x.example.org /**"),
        ("POST,GET,POST x.org /a", "GET,POST x.org /a"),
        ("* *.example.org /a/ inspect", "* *.example.org /a/ inspect"),
        ("deny DELETE **.example.org", "deny DELETE **.example.org /**"),
        ("GET 10.0.0.0/8 /a/b", "GET 10.0.0.0/8 /a/b"),
        ("GET [2001:db8::1] /", "GET [2001:db8::1] /"),
        ("GET bücher.example /ü/%c3%bc", "GET xn--bcher-kva.example /%C3%BC/%C3%BC"),
        ("GET x.org /a%20b/%7Ec/*.json", "GET x.org /a%20b/~c/*.json"),
    ],
)
def test_a_rule_has_one_form(text: str, canonical: str) -> None:
    assert canonical_http(text) == canonical
    assert canonical_http(canonical) == canonical


@pytest.mark.parametrize(
    "text",
    [
        "", "GET", "x.org", "GET  x.org", " GET x.org", "get x.org", "GET x.org a", "GET x.org /a b", "GET x.org /?q",
        "GET x.org:443 /", "GET [::1]:80 /", "GET * /", "GET ** /", "GET a.*.org /", "GET x.org /../a",
        "GET x.org //a", "GET x.org /**/a", "GET x.org /a**", "GET x.org /%2e%2e/a", "GET x.org /a%2fb",
        "GET x.org /a/./b", "GET x.org /a%5cb",
        "GET x.org /%00", "GET x.org /%25", "GET x.org /a;b", "GET x.org /\x01", "CONNECT x.org", "TRACE,GET x.org",
        "deny GET x.org / inspect", "GET x.org / inspect more", "GET,,POST x.org", "GET 127.1 /",
        "GET x.org /" + "a" * 2000, "GET x.org /%ff",
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        canonical_http(text)


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"host": "x.org"}, "* x.org /**"),
        ({"host": "x.org", "method": "GET"}, "GET x.org /**"),
        ({"host": "x.org", "method": ["GET", "HEAD"], "path": "/a"}, "GET,HEAD x.org /a"),
        ({"host": "x.org", "access": "deny", "path": "/a"}, "deny * x.org /a"),
        ({"host": "x.org", "inspect": True}, "* x.org /** inspect"),
    ],
)
def test_a_table_is_a_rule(table: dict[str, Any], text: str) -> None:
    assert canonical_http(text_of(table)) == text


@pytest.mark.parametrize(
    "table",
    [
        {}, {"host": ""}, {"host": 1}, {"host": "x.org", "methods": "GET"}, {"host": "x.org", "method": []},
        {"host": "x.org", "method": [1]}, {"host": "x.org", "path": 1}, {"host": "x.org", "path": "/a inspect"},
        {"host": "x.org", "access": "read"}, {"host": "x.org", "inspect": 1},
    ],
)  # fmt: skip
def test_a_table_that_is_no_rule_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        text_of(table)


def allows(rules: list[str], method: str, path: str, host: str = HOST, *, tls: bool = False) -> bool:
    group = HttpRules(rules).group(host)
    return True if group is None else group.judge(method, path, tls=tls).allowed


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("/**", ["/", "/a", "/a/b", "//", "/a%2fb", "/%00", "/..", "*"], []),
        ("/a", ["/a", "/%61", "/a?q".partition("?")[0]], ["/", "/a/", "/A", "/ab", "/a/b", "*"]),
        ("/a/**", ["/a/", "/a/b", "/a/b/c", "/a/b%20c", "/a/b%2fc", "/a/./b", "/a/b/../c", "/a//b"],
         ["/a", "/ab", "/", "/a/..", "/a/../b", "/a%2fb/../../c", "/a/%2e%2e%2fb"]),
        ("/a/*/c", ["/a/b/c", "/a//c".replace("//", "/x/")], ["/a/c", "/a/b/b/c", "/a/b%2fb/c"]),
        ("/f/*.json", ["/f/x.json", "/f/.json", "/f/x.y.json"], ["/f/x.xml", "/f/x/y.json", "/f/x%2fy.json"]),
        ("/a%20b", ["/a%20b"], ["/a+b", "/a%2520b"]),
        ("/100x", ["/100x"], ["/100%"]),
    ],
)  # fmt: skip
def test_what_a_pattern_names(pattern: str, inside: list[str], outside: list[str]) -> None:
    rules = [f"GET {HOST} {pattern}"]
    assert [path for path in inside if not allows(rules, "GET", path)] == []
    assert [path for path in outside if allows(rules, "GET", path)] == []


def test_the_most_particular_host_decides() -> None:
    rules = ["GET **.example.org", "POST *.example.org", "PUT x.example.org", "GET 10.0.0.0/8", "POST 10.1.0.0/16"]
    for host, method in (
        ("x.example.org", "PUT"),
        ("y.example.org", "POST"),
        ("z.y.example.org", "GET"),
        ("10.2.0.1", "GET"),
        ("10.1.0.1", "POST"),
    ):
        assert [m for m in ("GET", "POST", "PUT") if allows(rules, m, "/", host)] == [method], host
    assert allows(rules, "DELETE", "/", "example.org")
    assert allows(rules, "DELETE", "/", "11.0.0.1")


def test_denials_win_and_leave_the_rest() -> None:
    assert allows([f"deny POST {HOST}"], "GET", "/")
    assert not allows([f"deny POST {HOST}"], "POST", "/")
    both = [f"* {HOST} /a/**", f"deny * {HOST} /a/secret/**"]
    assert allows(both, "GET", "/a/x")
    for path in ("/a/secret/x", "/A/../a/SECRET/x", "/a/x/../secret/y", "/a/%73ecret/x", "/a/x%2f..%2fsecret/x"):
        assert not allows(both, "GET", path), path


def test_tls_takes_a_rule_that_inspects() -> None:
    rules = [f"GET {HOST} /a inspect", f"GET {HOST} /b"]
    assert [allows(rules, "GET", path, tls=True) for path in ("/a", "/b")] == [True, False]
    assert [allows(rules, "GET", path) for path in ("/a", "/b")] == [True, True]
    assert not allows([f"deny POST {HOST}"], "GET", "/", tls=True), "a denial alone looks into nothing"


# --- laws

PIECES = ["a", "b", "ok", "..", ".", "%2e", "%2E%2e", "%2f", "%5c", "\\", "%252e", "%252f", ";x", "//", "%00", "%c0%ae",
          "%3f", "%23", "%20", "%25", "A", "%61", "~", "%EF%BC%8E"]  # fmt: skip
paths = st.lists(st.sampled_from([*PIECES, "/", "/", "/"]), max_size=12).map(lambda parts: "/" + "".join(parts))


def servers(path: str) -> list[str]:
    """What quite different servers make of a path: in all of them a permitted one has to stay inside."""
    once, twice = unquote(path), unquote(unquote(path))
    made = [once, twice, unquote(twice)]
    made += [text.replace("\\", "/") for text in made]
    made += [re.sub(r";[^/]*", "", text) for text in made]
    made += [re.sub(r"/{2,}", "/", text) for text in made]
    made += [text.split("\0")[0] for text in made]
    return [posixpath.normpath("/" + text.lstrip("/")) for text in made]


@given(paths)
@settings(max_examples=600)
@example("/ok/%252e%252e/a")
@example("/ok/..%5ca")
@example("/ok/%2e%2e;x/a")
def test_no_server_is_led_outside_by_a_permitted_path(path: str) -> None:
    if allows([f"GET {HOST} /ok/**"], "GET", path):
        assert all(f"{made}/".startswith("/ok/") for made in servers(path)), (path, servers(path))


@given(paths)
@settings(max_examples=600)
def test_no_server_is_led_to_what_is_denied(path: str) -> None:
    if allows([f"deny * {HOST} /a/**"], "GET", path):
        assert not any(f"{made}".lower().startswith("/a/") for made in servers(path)), (path, servers(path))


@given(st.text(alphabet=string.ascii_letters + string.digits + "-._~", min_size=1, max_size=20))
def test_a_plain_path_has_one_reading(name: str) -> None:
    if name not in (".", ".."):
        assert readings(f"/a/{name}/b") == (("a", name, "b"),)


segments = st.sampled_from(["a", "b", "*", "a*", "*b", "ab"])
patterns = st.builds(Pattern, st.lists(segments, max_size=3).map(tuple), st.booleans())
plain = st.lists(st.sampled_from(["a", "b", "ab", "aab", "c", ""]), min_size=1, max_size=4).map(tuple)


@given(patterns, patterns, plain)
@settings(max_examples=500)
def test_containment_and_meeting_of_patterns_are_about_paths(
    one: Pattern, other: Pattern, path: tuple[str, ...]
) -> None:
    if one.is_within(other) and one.matches(path):
        assert other.matches(path)
    met = one.meet(other)
    if met is not None:
        assert met.is_within(one)
        assert met.is_within(other)
        assert met.matches(path) == (one.matches(path) and other.matches(path))
    elif not any("*" in s and len(s) > 1 for s in (*one.segments, *other.segments)):
        assert not (one.matches(path) and other.matches(path))
    assert one.is_within(one)
    assert one.meet(one) == one


@given(patterns)
def test_a_pattern_is_read_as_it_is_written(one: Pattern) -> None:
    if one.segments or one.rest:
        assert parse_pattern(str(one)) == one


RULES = st.lists(
    st.sampled_from(
        [
            f"GET {HOST}", f"GET,POST {HOST} /a/** inspect", "* *.example.org /a/b", "POST *.example.org inspect",
            "GET **.example.org /a/**", f"deny POST {HOST}", "deny * *.example.org /a/**", f"* {HOST} inspect",
        ]
    ),
    max_size=4,
)  # fmt: skip
HOSTS = (HOST, "y.example.org", "z.y.example.org", "other.org")
REQUESTS = [(h, m, p, t) for h in HOSTS for m in ("GET", "POST") for p in ("/a/b", "/a/c", "/d") for t in (False, True)]
EVERYWHERE = ["**.example.org:*", "other.org:*"]


def sent(rules: list[str]) -> set[tuple[str, str, str, bool]]:
    return {(h, m, p, t) for h, m, p, t in REQUESTS if allows(rules, m, p, h, tls=t)}


@given(RULES, RULES)
@settings(max_examples=400)
def test_the_meeting_of_rules_permits_what_both_permit(one: list[str], other: list[str]) -> None:
    met = meet_http(one, other)
    assert sent(met) == sent(one) & sent(other)
    assert meet_http(met, other) == met or sent(meet_http(met, other)) == sent(met)
    assert beyond(met, one, EVERYWHERE) == []
    assert beyond(met, other, EVERYWHERE) == []


@given(RULES, RULES)
@settings(max_examples=400)
def test_what_does_not_go_beyond_permits_no_more(inner: list[str], outer: list[str]) -> None:
    assert beyond(inner, inner, EVERYWHERE) == []
    if not beyond(inner, outer, EVERYWHERE):
        assert sent(inner) <= sent(outer)
    # Where a host cannot be reached, nothing about it goes beyond.
    assert beyond(inner, outer, ["unrelated.net:443"]) == []


def test_rules_are_parsed_once() -> None:
    assert parse_http(f"GET {HOST}") is parse_http(f"GET {HOST}")


@pytest.mark.parametrize(
    ("allow", "rule", "says"),
    [
        (["x.org:443"], "GET x.org inspect", ""),
        (["x.org:80"], "GET x.org", ""),
        (["*.x.org:80-90"], "GET a.x.org", ""),
        (["x.org:443"], "GET x.org", "takes a rule with inspect = true"),
        (["x.org:8443/tls"], "deny GET x.org", "takes a rule with inspect = true"),
        (["x.org:443"], "GET y.org inspect", "network.allow does not name"),
    ],
)
def test_a_rule_that_does_nothing_is_noted(allow: list[str], rule: str, says: str) -> None:
    notes = resolve({"network": {"allow": allow, "http": [rule]}}).notes
    assert [says in note for note in notes] == ([True] if says else [])
