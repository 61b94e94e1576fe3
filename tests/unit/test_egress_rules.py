"""Which attempts a manifest's rules permit: names by whole labels, ports, deny first, and one form for each rule."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.destinations import canonical_denied_host, host_within, meet_hosts, normal_name, parse_host
from sandbox.egress.rules import CLOSED, DENIED, LITERAL, NOT_NAMED, PORT_NOT_NAMED, Rules
from sandbox.suffixes import is_public_suffix

# Few labels, so that names and rules often meet.
LABELS = st.sampled_from(["a", "a", "b", "evil-a", "xn--bcher-kva"])
NAMES = st.lists(LABELS, max_size=3).map(lambda labels: ".".join([*labels, "example", "org"]))
PORTS = st.sampled_from([1, 22, 80, 443, 444, 8000, 8050, 8100, 65535])
PORT_WORDS = st.sampled_from(["", ":443", ":80", ":*", ":8000-8100", ":1-65535", ":443-444"])
PROTOCOLS = st.sampled_from(["", "/tls", "/tcp"])
STARS = st.sampled_from(["", "*.", "**."])
RULES = st.builds(lambda s, n, p, q: f"{s}{n}{p}{q}", STARS, NAMES, PORT_WORDS, PROTOCOLS)
DENIALS = st.builds(lambda s, n, p: f"{s}{n}{p}", STARS, NAMES, PORT_WORDS)


def permits(rule: str, name: str, port: int, *, deny: bool = False) -> bool:
    """The slow and obvious way."""
    text = rule.rpartition("/")[0] or rule if rule.endswith(("/tls", "/tcp")) else rule
    host, colon, ports = text.partition(":")
    if not colon:
        ports = "*" if deny else "443"
    low, high = ("1", "65535") if ports == "*" else (ports.split("-") * 2)[:2]
    if not int(low) <= port <= int(high):
        return False
    labels, pattern = name.split("."), host.split(".")
    if pattern[0] not in ("*", "**"):
        return labels == pattern
    rest = pattern[1:]
    extra = len(labels) - len(rest)
    return labels[extra:] == rest and (extra == 1 if pattern[0] == "*" else extra >= 1)


@given(st.lists(RULES, max_size=4), st.lists(DENIALS, max_size=2), NAMES, PORTS)
def test_a_name_passes_when_a_rule_names_it_and_no_denial_does(
    allow: list[str], deny: list[str], name: str, port: int
) -> None:
    wanted = any(permits(rule, name, port) for rule in allow)
    denied = any(permits(rule, name, port, deny=True) for rule in deny)
    verdict = Rules(allow, deny).judge_name(name, port)
    assert verdict.allowed == (wanted and not denied)
    assert bool(verdict.reason) != verdict.allowed
    if denied:
        assert verdict.reason == DENIED


@given(RULES)
def test_a_rule_has_one_form_and_reads_back_as_itself(text: str) -> None:
    rule = parse_host(text)
    assert parse_host(str(rule)) == rule
    assert host_within(text, text)


@given(RULES, RULES, NAMES, PORTS)
def test_what_two_rules_meet_in_is_what_both_permit(one: str, other: str, name: str, port: int) -> None:
    met = meet_hosts(one, other)
    both = permits(one, name, port) and permits(other, name, port)
    assert (met is not None and Rules([met]).judge_name(name, port).allowed) == both
    if met is not None:
        assert host_within(met, one)
        assert host_within(met, other)


@given(RULES, RULES, NAMES, PORTS)
def test_a_meeting_is_never_wider_in_its_protocol(one: str, other: str, name: str, port: int) -> None:
    met = meet_hosts(one, other)
    if met is None or not permits(met, name, port):
        return
    protocols = {Rules([rule]).judge_name(name, port).protocol for rule in (one, other)}
    assert Rules([met]).judge_name(name, port).protocol == ("tls" if "tls" in protocols else "tcp")


@given(st.lists(RULES, min_size=1, max_size=4), st.lists(DENIALS, max_size=2), DENIALS, NAMES, PORTS)
def test_adding_a_denial_never_permits_more(allow: list[str], deny: list[str], more: str, name: str, port: int) -> None:
    before, after = Rules(allow, deny), Rules(allow, [*deny, more])
    assert before.judge_name(name, port).allowed >= after.judge_name(name, port).allowed
    assert (before.is_known(name) is not None) >= (after.is_known(name) is not None)


@given(st.lists(RULES, max_size=4), st.lists(DENIALS, max_size=2), NAMES)
def test_dns_knows_every_name_that_can_be_connected_to(allow: list[str], deny: list[str], name: str) -> None:
    rules = Rules(allow, deny)
    if any(rules.judge_name(name, port).allowed for port in (1, 22, 80, 443, 444, 8000, 8050, 8100, 65535)):
        assert rules.is_known(name) is not None
    if rules.is_known(name) is not None:
        assert any(permits(rule, name, port) for rule in allow for port in (1, 80, 443, 444, 8000, 65535))


def test_the_most_particular_rule_decides_the_protocol() -> None:
    rules = Rules(["**.example.org:443/tcp", "*.a.example.org:443", "x.a.example.org:443/tcp"])
    assert rules.judge_name("y.a.example.org", 443).protocol == "tls"
    assert rules.judge_name("x.a.example.org", 443).protocol == "tcp"
    assert rules.judge_name("x.y.a.example.org", 443).protocol == "tcp"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a.example.org:443/tls", "a.example.org:443"),
        ("a.example.org/tls", "a.example.org:443"),
        ("a.example.org:443/tcp", "a.example.org:443/tcp"),
        ("a.example.org:22/tcp", "a.example.org:22"),
        ("a.example.org:993/tls", "a.example.org:993/tls"),
        ("a.example.org:*/tls", "a.example.org:*/tls"),
        ("a.example.org:1-65535", "a.example.org:*"),
        ("a.example.org:8000-8100/tcp", "a.example.org:8000-8100"),
        ("a.example.org:80-80", "a.example.org:80"),
        ("10.0.0.0/8:5432/tcp", "10.0.0.0/8:5432"),
        ("[2001:db8::/32]:443/tcp", "[2001:db8::/32]:443/tcp"),
        ("[::ffff:10.1.2.3]:80", "10.1.2.3:80"),
        ("[::ffff:10.0.0.0/104]:80", "10.0.0.0/8:80"),
        ("[2001:DB8:0:0::1]:443", "[2001:db8::1]:443"),
        ("Bücher.Example.", "xn--bcher-kva.example:443"),
    ],
)
def test_protocols_and_ranges_have_one_form(text: str, canonical: str) -> None:
    assert str(parse_host(text)) == canonical
    assert str(parse_host(canonical)) == canonical


@pytest.mark.parametrize(
    ("inner", "outer", "within"),
    [
        ("a.example.org:8000-8010", "a.example.org:8000-8100", True),
        ("a.example.org:7999-8010", "a.example.org:8000-8100", False),
        ("a.example.org:443/tls", "a.example.org:443/tcp", True),
        ("a.example.org:443/tcp", "a.example.org:443", False),
        ("a.example.org:22", "a.example.org:22/tls", False),
        ("a.example.org:22/tls", "a.example.org:22", True),
        ("a.example.org:443", "a.example.org:*", True),
        ("a.example.org:443/tcp", "a.example.org:*", False),
    ],
)
def test_ranges_and_protocols_nest_by_meaning(inner: str, outer: str, within: bool) -> None:
    assert host_within(inner, outer) is within


@pytest.mark.parametrize(
    "text",
    ["a.example:8100-8000", "a.example:0-80", "a.example:80-65536", "a.example:80-", "a.example:-80", "a.example:8 0",
     "a.example/http3", "a.example:443/", "***.example.org", "*.*.example.org", "*example.org", "%61.example.org",
     "user@example.org", "example.org@evil.example", "example.org#.evil.example", "example.org\\.evil.example",
     "0177.0.0.1", "127.0.0.0x1", "1.1", "999999999", "١٢٧.0.0.1", "１２７.0.0.1", "faß.example", "a\u200db.example",
     "a.example:٤٤٣", "ex\u0000ample.org", "*.co.uk", "**.github.io:443", "*.s3.eu-west-1.amazonaws.com", "*.localhost",
     "[::1%lo]:80", "[::ffff:1.2.3.4%1]:80", "10.0.0.1/8:80", "010.0.0.1:80", "1.2.3.4.:80"],
)  # fmt: skip
def test_words_that_say_more_than_a_host_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_host(text)


def test_a_denial_may_be_as_wide_as_it_likes_but_names_no_protocol() -> None:
    assert canonical_denied_host("**.com") == "**.com:*"
    assert canonical_denied_host("*.co.uk:443") == "*.co.uk:443"
    with pytest.raises(ValueError, match="every protocol"):
        canonical_denied_host("a.example:443/tls")


@given(st.text(max_size=40))
def test_a_normal_name_is_plain_text_and_stays_itself(text: str) -> None:
    try:
        name = normal_name(text)
    except ValueError:
        return
    assert normal_name(name) == name
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
    with pytest.raises(ValueError, match="address"):
        ipaddress.ip_address(name)


@pytest.mark.parametrize("name", ["com", "co.uk", "com.au", "github.io", "amazonaws.com", "eu.org", "gov.in"])
def test_names_under_which_anyone_registers_are_known(name: str) -> None:
    assert is_public_suffix(name)
    with pytest.raises(ValueError, match=r"anyone can get a name below|too wide"):
        parse_host(f"**.{name}:443")
    assert parse_host(f"www.{name}:443").kind == "name"


@pytest.mark.parametrize("name", ["example.org", "github.com", "google.de", "example.co.uk", "corp.example", "ibm.com"])
def test_an_organisation_may_be_allowed_as_a_whole(name: str) -> None:
    assert not is_public_suffix(name)
    assert parse_host(f"**.{name}:443").kind == "many"


# --- addresses


def address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text)


def test_a_literal_address_needs_a_rule_that_is_an_address() -> None:
    rules = Rules(["www.example.org:80", "93.184.216.0/24:80"], ["93.184.216.99"])
    assert rules.judge_address(address("93.184.216.34"), 80).allowed
    assert rules.judge_address(address("93.184.216.34"), 81).reason == PORT_NOT_NAMED
    assert rules.judge_address(address("93.184.216.99"), 80).reason == DENIED
    assert rules.judge_address(address("93.184.217.34"), 80).reason == LITERAL


def test_a_private_address_behind_an_allowed_name_stays_closed_until_a_network_opens_it() -> None:
    named = Rules(["db.example.org:5432"])
    verdict = named.judge_name("db.example.org", 5432)
    closed = named.judge_resolved(address("10.1.2.3"), 5432, frozenset(), verdict)
    assert (closed.allowed, closed.reason) == (False, CLOSED)
    opened = Rules(["db.example.org:5432", "10.0.0.0/8:5432"])
    assert opened.judge_resolved(address("10.1.2.3"), 5432, frozenset(), verdict).allowed
    other_port = Rules(["db.example.org:5432", "10.0.0.0/8:443"])
    assert not other_port.judge_resolved(address("10.1.2.3"), 5432, frozenset(), verdict).allowed


def test_a_metadata_service_is_opened_by_its_own_address_alone() -> None:
    wide, single = Rules(["169.254.0.0/16:80"]), Rules(["169.254.169.254:80"])
    assert wide.judge_address(address("169.254.1.1"), 80).allowed
    assert wide.judge_address(address("169.254.169.254"), 80).reason == CLOSED
    assert single.judge_address(address("169.254.169.254"), 80).allowed


def test_our_own_synthetic_range_is_never_dialled() -> None:
    rules = Rules(["198.18.0.0/15:80", "198.18.0.16:80", "[2001:2::/48]:80"])
    assert rules.judge_address(address("198.18.0.16"), 80).reason == CLOSED
    assert rules.judge_address(address("2001:2::10"), 80).reason == CLOSED


def test_an_own_address_of_the_host_is_closed_like_a_private_one() -> None:
    own = frozenset([address("93.184.216.34")])
    named = Rules(["www.example.org:80"])
    verdict = named.judge_name("www.example.org", 80)
    assert named.judge_resolved(address("93.184.216.34"), 80, own, verdict).reason == CLOSED
    assert named.judge_resolved(address("93.184.216.35"), 80, own, verdict).allowed
    opened = Rules(["www.example.org:80", "93.184.216.34:80"])
    assert opened.judge_resolved(address("93.184.216.34"), 80, own, verdict).allowed


def test_a_denied_network_wins_over_an_allowed_name() -> None:
    rules = Rules(["www.example.org:80"], ["93.184.216.0/24"])
    verdict = rules.judge_name("www.example.org", 80)
    assert rules.judge_resolved(address("93.184.216.34"), 80, frozenset(), verdict).reason == DENIED


def test_nothing_is_permitted_where_nothing_is_named() -> None:
    rules = Rules([])
    assert rules.judge_name("example.org", 443).reason == NOT_NAMED
    assert rules.judge_address(address("93.184.216.34"), 443).reason == LITERAL
    assert rules.is_known("example.org") is None
