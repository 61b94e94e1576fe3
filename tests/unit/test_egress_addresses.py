"""Which addresses are closed: special ranges, metadata services, our own, and IPv4 in every IPv6 disguise."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress.addresses import closed, inner_addresses, parse_address

METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "fd00:ec2::254", "fd20:ce::254")


@pytest.mark.parametrize(
    ("text", "kind", "opening"),
    [
        ("0.0.0.0", "unspecified", "never"),
        ("0.1.2.3", "unspecified", "never"),
        ("10.255.255.255", "private", "cidr"),
        ("100.64.0.1", "private", "cidr"),
        ("100.127.255.255", "private", "cidr"),
        ("127.0.0.1", "loopback", "cidr"),
        ("127.255.255.254", "loopback", "cidr"),
        ("169.254.1.1", "link-local", "cidr"),
        ("172.16.0.1", "private", "cidr"),
        ("172.31.255.255", "private", "cidr"),
        ("192.0.0.8", "reserved", "cidr"),
        ("192.168.0.1", "private", "cidr"),
        ("198.18.0.1", "synthetic", "never"),
        ("198.19.255.255", "synthetic", "never"),
        ("203.0.113.7", "documentation", "cidr"),
        ("224.0.0.1", "multicast", "never"),
        ("239.255.255.255", "multicast", "never"),
        ("240.0.0.1", "reserved", "cidr"),
        ("255.255.255.255", "broadcast", "never"),
        ("::", "unspecified", "never"),
        ("::1", "loopback", "cidr"),
        ("fc00::1", "private", "cidr"),
        ("fdff:ffff::1", "private", "cidr"),
        ("fe80::1", "link-local", "cidr"),
        ("fec0::1", "private", "cidr"),
        ("ff02::1", "multicast", "never"),
        ("100::1", "reserved", "never"),
        ("2001:2::10", "synthetic", "never"),
        ("2001:db8::1", "documentation", "cidr"),
        ("2001:10::1", "reserved", "cidr"),
        ("2002:5db8:d822::1", "translated", "cidr"),
        ("64:ff9b:1::1", "translated", "cidr"),
        ("4000::1", "reserved", "cidr"),
    ],
)
def test_special_ranges_are_closed(text: str, kind: str, opening: str) -> None:
    first = closed(parse_address(text))[0]
    assert (first.kind, first.opening) == (kind, opening)


@pytest.mark.parametrize(
    "text",
    ["1.1.1.1", "93.184.216.34", "9.255.255.255", "11.0.0.0", "172.15.255.255", "172.32.0.0", "192.169.0.0",
     "100.63.255.255", "100.128.0.0", "169.253.255.255", "198.17.255.255", "198.20.0.0", "223.255.255.255",
     "2606:2800:220:1::1", "2a00:1450:4001::200e", "64:ff9b::5db8:d822"],
)  # fmt: skip
def test_public_addresses_are_open(text: str) -> None:
    assert closed(parse_address(text)) == ()


@pytest.mark.parametrize("text", METADATA)
def test_metadata_services_are_opened_singly_only(text: str) -> None:
    assert [(reason.kind, reason.opening) for reason in closed(parse_address(text))] == [("metadata", "single")]


DISGUISES = {
    "NAT64": lambda v4: 0x64FF9B << 96 | int(v4),
    "6to4": lambda v4: 0x2002 << 112 | int(v4) << 80 | 1,
    "Teredo client": lambda v4: 0x20010000 << 96 | 0x01010101 << 64 | (int(v4) ^ 0xFFFFFFFF),
    "Teredo server": lambda v4: 0x20010000 << 96 | int(v4) << 64 | (0x01010101 ^ 0xFFFFFFFF),
    "v4-compatible": lambda v4: int(v4),
    "v4-translated": lambda v4: 0xFFFF << 48 | int(v4),
}


@pytest.mark.parametrize("disguise", sorted(DISGUISES))
@given(
    v4=st.one_of(
        st.sampled_from(["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "224.0.0.1"]),
        st.integers(1 << 24, (1 << 32) - 1).map(lambda n: str(ipaddress.IPv4Address(n))),
    )
)
def test_an_ipv4_address_is_judged_inside_every_ipv6_form(disguise: str, v4: str) -> None:
    inside = ipaddress.IPv4Address(v4)
    outside = ipaddress.IPv6Address(DISGUISES[disguise](inside))
    assert inside in inner_addresses(outside)
    for reason in closed(inside):
        assert reason in closed(outside)
    if disguise != "NAT64":
        assert any(reason.kind == "translated" for reason in closed(outside))


@given(st.integers(0, (1 << 32) - 1))
def test_a_mapped_address_is_the_ipv4_address(number: int) -> None:
    plain = ipaddress.IPv4Address(number)
    assert parse_address(f"::ffff:{plain}") == plain
    assert parse_address(str(ipaddress.IPv6Address(0xFFFF << 32 | number))) == plain


@given(st.ip_addresses())
def test_what_python_calls_not_global_is_closed_here(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if not address.is_global or address.is_multicast:
        assert closed(address)


@pytest.mark.parametrize(
    "text", ["127.1", "0x7f.0.0.1", "0177.0.0.1", "2130706433", "fe80::1%eth0", "::ffff:1.2.3.4%1", ""]
)
def test_odd_spellings_are_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)


def test_our_own_addresses_are_closed_also_when_they_are_public() -> None:
    own = frozenset([parse_address("93.184.216.34")])
    assert [reason.kind for reason in closed(parse_address("93.184.216.34"), own)] == ["own"]
    assert [reason.kind for reason in closed(parse_address("64:ff9b::93.184.216.34"), own)] == ["own"]
