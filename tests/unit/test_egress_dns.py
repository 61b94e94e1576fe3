"""DNS inside a jail: synthetic addresses for allowed names, nothing for others, and no way to talk through it."""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress import dns
from sandbox.egress.addresses import SYNTHETIC_V4, SYNTHETIC_V6
from sandbox.egress.names import CHOSEN_BYTES_MAX, CHOSEN_NAMES_MAX, NameTable, entropy_bits
from sandbox.egress.rules import Rules

NXDOMAIN, NOERROR, REFUSED = 3, 0, 5


def query(name: str, kind: int = dns.A, *, ident: int = 7, flags: int = 0x0100, klass: int = 1) -> bytes:
    labels = [label.encode() for label in name.split(".")] if name else []
    packed = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    return struct.pack(">HHHHHH", ident, flags, 1, 0, 0, 0) + packed + struct.pack(">HH", kind, klass)


def ask(table: NameTable, name: str, kind: int = dns.A, now: float = 0.0) -> tuple[int, list[str], str]:
    """(code, addresses or names, reason)"""
    answered = table.answer(dns.parse_query(query(name, kind)), now)
    return code_of(answered.reply), records_of(answered.reply), answered.reason


def code_of(reply: bytes) -> int:
    return int(struct.unpack_from(">H", reply, 2)[0] & 0xF)


def records_of(reply: bytes) -> list[str]:
    _, _, questions, answers, _, _ = struct.unpack_from(">HHHHHH", reply)
    at = 12
    for _ in range(questions):
        while reply[at]:
            at += reply[at] + 1
        at += 5
    found = []
    for _ in range(answers):
        kind, _, ttl, size = struct.unpack_from(">HHIH", reply, at + 2)
        data = reply[at + 12 : at + 12 + size]
        assert ttl <= 60
        found.append(str(ipaddress.ip_address(data)) if kind in (dns.A, dns.AAAA) else data.decode("latin-1"))
        at += 12 + size
    assert at == len(reply)
    return found


def table(*allow: str, deny: tuple[str, ...] = ()) -> NameTable:
    return NameTable(Rules(allow, deny))


def test_an_allowed_name_gets_addresses_that_nobody_else_has() -> None:
    names = table("a.example.org:443", "b.example.org:80")
    answers = {kind_name: ask(names, *kind_name) for kind_name in [("a.example.org", dns.A), ("b.example.org", dns.A)]}
    found = [addresses[0] for _, addresses, _ in answers.values()]
    assert len(set(found)) == 2
    for text, name in zip(found, ("a.example.org", "b.example.org"), strict=True):
        assert ipaddress.ip_address(text) in SYNTHETIC_V4
        assert names.name_of(ipaddress.ip_address(text)) == name
    code, v6, _ = ask(names, "a.example.org", dns.AAAA)
    assert code == NOERROR
    assert ipaddress.ip_address(v6[0]) in SYNTHETIC_V6
    assert names.name_of(ipaddress.ip_address(v6[0])) == "a.example.org"
    assert ask(names, "a.example.org")[1] == [found[0]], "the same name keeps its address"


def test_any_other_name_does_not_exist() -> None:
    names = table("a.example.org:443", deny=("evil.example.org",))
    for name in ("b.example.org", "example.org", "x.a.example.org", "evil.example.org", "a.example.org.evil.test", ""):
        assert ask(names, name)[:2] == (NXDOMAIN, []), name
    assert ask(names, "A.Example.ORG")[0] == NOERROR, "upper case is the same name"


def test_a_denied_name_does_not_exist_below_an_allowed_wildcard() -> None:
    names = table("**.example.org:443", deny=("bad.example.org",))
    assert ask(names, "good.example.org")[0] == NOERROR
    code, addresses, reason = ask(names, "bad.example.org")
    assert (code, addresses, reason) == (NXDOMAIN, [], "denied_by_rule")


@pytest.mark.parametrize("kind", [dns.TXT, dns.SRV, dns.HTTPS, dns.SVCB, dns.MX, dns.NS, dns.SOA, dns.CNAME, 10, 999])
def test_other_types_of_an_allowed_name_are_empty(kind: int) -> None:
    names = table("a.example.org:443")
    assert ask(names, "a.example.org", kind) == (NOERROR, [], "")
    assert ask(names, "b.example.org", kind)[0] == NXDOMAIN


def test_the_name_of_a_synthetic_address_can_be_asked_and_no_other() -> None:
    names = table("a.example.org:443")
    address = ask(names, "a.example.org")[1][0]
    reverse = ".".join(reversed(address.split("."))) + ".in-addr.arpa"
    assert "example" in ask(names, reverse, dns.PTR)[1][0]
    assert ask(names, "34.216.184.93.in-addr.arpa", dns.PTR)[:2] == (NXDOMAIN, [])
    v6 = ipaddress.ip_address(ask(names, "a.example.org", dns.AAAA)[1][0])
    assert "example" in ask(names, v6.reverse_pointer, dns.PTR)[1][0]


def test_localhost_is_the_jails_own() -> None:
    names = table("a.example.org:443")
    assert ask(names, "localhost")[1] == ["127.0.0.1"]
    assert ask(names, "x.localhost", dns.AAAA)[1] == ["::1"]


def test_data_below_a_wildcard_is_refused() -> None:
    names = table("**.example.org:443")
    encoded = base64.b32encode(hashlib.sha256(b"secret").digest()).decode().lower().rstrip("=")
    assert ask(names, f"{encoded[:36]}.example.org")[0::2] == (REFUSED, "dns_tunnel")
    assert ask(names, "a" * 41 + ".example.org")[0::2] == (REFUSED, "dns_tunnel")
    for honest in ("www", "api-v2", "eu-west-1", "my-first-bucket-2026", "raw.assets.cdn", "x" * 40):
        assert ask(names, f"{honest}.example.org")[0] == NOERROR, honest


def test_a_named_host_may_be_called_whatever_it_is_called() -> None:
    encoded = base64.b32encode(hashlib.sha256(b"name").digest()).decode().lower().rstrip("=")[:50]
    names = table(f"{encoded}.example.org:443")
    assert ask(names, f"{encoded}.example.org")[0] == NOERROR


def test_what_can_be_said_in_names_is_bounded() -> None:
    names = table("**.example.org:443")
    passed = [n for n in range(1000) if ask(names, f"x{n}.example.org", now=float(n))[0] == NOERROR]
    assert len(passed) == CHOSEN_NAMES_MAX
    long = table("**.example.org:443")
    said = 0
    for n in range(1000):
        label = f"{n:03d}" + "-word" * 7
        if ask(long, f"{label}.example.org", now=float(n))[0] == NOERROR:
            said += len(label)
    assert 0 < said <= CHOSEN_BYTES_MAX


def test_queries_are_rated() -> None:
    names = table("**.example.org:443", "a.example.net:443")
    assert ask(names, "a.example.net", now=0.0)[0] == NOERROR
    codes = [ask(names, f"evil{n}.test", now=0.0)[0] for n in range(1000)]
    assert codes.count(NXDOMAIN) in range(300, 500)
    assert codes[-1] == REFUSED
    assert ask(names, "b.example.org", now=0.0)[2] == "dns_rate"
    assert ask(names, "a.example.net", now=0.0)[0] == NOERROR, "a name that was given out says nothing new"
    assert ask(names, "b.example.org", now=2.0)[0] == NOERROR, "and allowed again after a while"


def test_no_number_of_queries_keeps_the_gateway_busy() -> None:
    names = table("a.example.org:443")
    codes = [ask(names, "a.example.org", now=0.0)[0] for _ in range(6000)]
    assert REFUSED in codes
    assert codes.count(NOERROR) >= 4900


@given(st.binary(max_size=1500))
def test_no_bytes_make_the_parser_fail_or_answer_long(data: bytes) -> None:
    try:
        parsed = dns.parse_query(data)
        reply, most = table("a.example.org:443").answer(parsed, 0.0).reply, len(data) + 28
    except dns.BadQuery as error:
        reply, most = error.reply, 12
    assert len(reply) <= most


@given(st.data())
def test_no_damage_to_a_query_makes_the_parser_fail(data: st.DataObject) -> None:
    message = bytearray(query("a.example.org", data.draw(st.sampled_from([1, 28, 12, 16]))))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    try:
        parsed = dns.parse_query(bytes(message[:cut]))
    except dns.BadQuery:
        return
    answered = table("a.example.org:443").answer(parsed, 0.0)
    assert answered.reply[:2] == bytes(message[:2])


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (query("a.example.org", flags=0x8000), None),
        (b"\0" * 11, None),
        (query("a.example.org", klass=3), REFUSED),
        (query("a.example.org", flags=0x2800), 4),
        (query("a.example.org") + b"x" * 2000, 1),
        (struct.pack(">HHHHHH", 1, 0, 2, 0, 0, 0) + query("a.b")[12:] * 2, 1),
        (struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", 1),
        (struct.pack(">HHHHHH", 1, 0, 1, 0, 0, 0) + (b"\x3f" + b"x" * 63) * 5 + b"\0\0\1\0\1", 1),
    ],
)
def test_what_is_no_plain_query_is_not_looked_at(message: bytes, code: int | None) -> None:
    with pytest.raises(dns.BadQuery) as caught:
        dns.parse_query(message)
    if code is None:
        assert caught.value.reply == b""
    else:
        assert code_of(caught.value.reply) == code


@pytest.mark.parametrize("label", [b"a.example", b"a\x1b[2J", b"a\nb", b"a\\b", b"\xff", b" "])
def test_a_label_that_no_host_has_is_no_name_and_shows_as_what_it_is(label: bytes) -> None:
    message = struct.pack(">HHHHHH", 1, 0x100, 1, 0, 0, 0) + bytes((len(label),)) + label + b"\3org\0\0\1\0\1"
    parsed = dns.parse_query(message)
    assert parsed.name.isprintable()
    answered = table("a.example.org:443", "**.example.org:443").answer(parsed, 0.0)
    assert code_of(answered.reply) == NXDOMAIN


def test_words_are_told_from_encoded_data() -> None:
    words = ["production-database", "static-assets-eu-central-1", "documentation-preview-412"]
    assert all(entropy_bits(word) <= 4.1 for word in words)
    assert entropy_bits(base64.b64encode(hashlib.sha512(b"x").digest()).decode()[:40]) > 4.1
