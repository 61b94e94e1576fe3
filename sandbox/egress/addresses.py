"""Which addresses are closed to a call although a rule names the host: pure classification, also of what is inside.

A name that a manifest allows may resolve to anything its owner likes, so every resolved address is judged before it
is dialled. IPv6 forms that carry an IPv4 address are opened first. Sources: RFC 6890 and the registries behind it,
RFC 6052 (NAT64), 3056 (6to4), 4380 (Teredo), 5180 (benchmarking); the clouds' own pages for metadata.
"""

from __future__ import annotations

import functools
import ipaddress
from typing import Final, Literal, NamedTuple

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# How a closed range is opened: by a CIDR rule that covers it, by a rule for that one address, or not at all.
Opening = Literal["cidr", "single", "never"]


class Closed(NamedTuple):
    """Why an address is closed. `address` is the one that the reason speaks of: what stands inside, where it does."""

    kind: str
    opening: Opening
    address: Address


# Ours: synthetic answers for allowed names. Benchmark ranges are no host's, so nothing real is hidden by them.
SYNTHETIC_V4: Final = ipaddress.IPv4Network("198.18.0.0/15")
SYNTHETIC_V6: Final = ipaddress.IPv6Network("2001:2::/48")

_METADATA: Final = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "169.254.169.254",  # AWS, Azure, Google, Oracle, DigitalOcean, OpenStack ...
        "169.254.169.253",  # AWS resolver
        "169.254.169.123",  # AWS time
        "169.254.170.2",  # AWS container credentials
        "169.254.170.23",  # AWS pod identity
        "169.254.0.23",  # Tencent
        "100.100.100.200",  # Alibaba
        "100.100.100.100",  # Alibaba, Tailscale resolver
        "168.63.129.16",  # Azure wire server
        "192.0.0.192",  # Oracle classic
        "fd00:ec2::254",  # AWS
        "fd00:ec2::253",
        "fd00:ec2::23",
        "fd20:ce::254",  # Google
        "fd00:42::42",  # Scaleway
    )
)
_V4: Final[tuple[tuple[str, str, Opening], ...]] = (
    ("0.0.0.0/8", "unspecified", "never"),
    ("10.0.0.0/8", "private", "cidr"),
    ("100.64.0.0/10", "private", "cidr"),
    ("127.0.0.0/8", "loopback", "cidr"),
    ("169.254.0.0/16", "link-local", "cidr"),
    ("172.16.0.0/12", "private", "cidr"),
    ("192.0.0.0/24", "reserved", "cidr"),
    ("192.0.2.0/24", "documentation", "cidr"),
    ("192.88.99.0/24", "reserved", "cidr"),
    ("192.168.0.0/16", "private", "cidr"),
    ("198.18.0.0/15", "synthetic", "never"),
    ("198.51.100.0/24", "documentation", "cidr"),
    ("203.0.113.0/24", "documentation", "cidr"),
    ("224.0.0.0/4", "multicast", "never"),
    ("255.255.255.255/32", "broadcast", "never"),
    ("240.0.0.0/4", "reserved", "cidr"),
)
_V6: Final[tuple[tuple[str, str, Opening], ...]] = (
    ("::/128", "unspecified", "never"),
    ("::1/128", "loopback", "cidr"),
    ("::/96", "translated", "cidr"),
    ("::ffff:0:0:0/96", "translated", "cidr"),  # IPv4-translated, RFC 2765
    ("64:ff9b:1::/48", "translated", "cidr"),  # where the IPv4 part stands is the operator's secret
    ("100::/64", "reserved", "never"),  # discard
    ("2001:2::/48", "synthetic", "never"),
    ("2001:db8::/32", "documentation", "cidr"),
    ("2001::/32", "translated", "cidr"),
    ("2001::/23", "reserved", "cidr"),
    ("2002::/16", "translated", "cidr"),
    ("3fff::/20", "documentation", "cidr"),
    ("5f00::/16", "reserved", "cidr"),
    ("fc00::/7", "private", "cidr"),
    ("fe80::/10", "link-local", "cidr"),
    ("fec0::/10", "private", "cidr"),
    ("ff00::/8", "multicast", "never"),
)
_TABLES: Final[dict[int, tuple[tuple[Network, str, Opening], ...]]] = {
    4: tuple((ipaddress.IPv4Network(net), kind, opening) for net, kind, opening in _V4),
    6: tuple((ipaddress.IPv6Network(net), kind, opening) for net, kind, opening in _V6),
}
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_TRANSLATED: Final = ipaddress.IPv6Network("::ffff:0:0:0/96")
_COMPATIBLE: Final = ipaddress.IPv6Network("::/96")


def parse_address(text: str) -> Address:
    """An address in full, v4-mapped as IPv4. Raises ValueError, also for a zone id and for octal or short forms."""
    if "%" in text:
        raise ValueError(f"{text!r} has a zone id")
    address = ipaddress.ip_address(text)
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


@functools.lru_cache(maxsize=4096)
def closed(address: Address, own: frozenset[Address] = frozenset()) -> tuple[Closed, ...]:
    """Every reason why `address` is closed; empty for an ordinary public one. `own`: those of the host's interfaces.

    Each reason has to be opened by a rule before the address may be dialled.
    """
    found = [_closed_as_is(inside, own) for inside in (address, *inner_addresses(address))]
    return tuple(reason for reason in found if reason is not None)


def _closed_as_is(address: Address, own: frozenset[Address]) -> Closed | None:
    if address in _METADATA:
        return Closed("metadata", "single", address)
    for network, kind, opening in _TABLES[address.version]:
        if address in network:
            return Closed(kind, opening, address)
    # Global unicast is 2000::/3 and NAT64's prefix; whatever is assigned later is closed until it is known here.
    if isinstance(address, ipaddress.IPv6Address) and address not in _NAT64 and int(address) >> 125 != 1:
        return Closed("reserved", "cidr", address)
    return Closed("own", "cidr", address) if address in own else None


def inner_addresses(address: Address) -> tuple[ipaddress.IPv4Address, ...]:
    """The IPv4 addresses that an IPv6 one stands for or sends through (Teredo: server and client)."""
    if isinstance(address, ipaddress.IPv4Address):
        return ()
    if address.ipv4_mapped:
        return (address.ipv4_mapped,)
    if address.sixtofour:
        return (address.sixtofour,)
    if address.teredo:
        return address.teredo
    is_special = int(address) <= 1
    if not is_special and (address in _NAT64 or address in _TRANSLATED or address in _COMPATIBLE):
        return (ipaddress.IPv4Address(int(address) & 0xFFFFFFFF),)
    return ()
