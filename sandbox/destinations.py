"""Network rules as a manifest writes them: `host:port`, `*.host`, `**.host`, `CIDR:port`, port ranges, a protocol.

A rule is read once, into `HostRule`, and written in one form. Names are normalised here and nowhere else: lower case,
no trailing dot, A-labels; whatever could be read as an address, or as more than a name, is refused. Meaning, never
text, decides whether one rule lies within another. Matching an attempt against rules is `sandbox.egress.rules`.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final, Literal, NamedTuple

from sandbox.grants import check_text
from sandbox.suffixes import is_public_suffix

Kind = Literal["name", "one", "many", "net"]
Protocol = Literal["", "tls", "tcp"]
# From narrow to wide: "" is TLS on port 443 and anything elsewhere.
PROTOCOLS: Final[tuple[Protocol, ...]] = ("tls", "", "tcp")
TLS_PORT: Final = 443
PORT_MAX: Final = 65535
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
# The two versions of IDNA read these differently: one name, two owners.
_AMBIGUOUS: Final = "ß\u03c2\u200c\u200d"


class HostRule(NamedTuple):
    """One network rule for the ports `low` to `high`. `one`: exactly one label more than `host`; `many`: one or more.

    `protocol` "tls": the flow must be TLS for that very name. "tcp": whatever it says. "": TLS on 443, else whatever.
    """

    kind: Kind
    host: str
    low: int
    high: int
    protocol: Protocol = ""

    def __str__(self) -> str:
        stars = {"one": "*.", "many": "**."}.get(self.kind, "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{stars}{host}:{self.ports}{'/' if self.protocol else ''}{self.protocol}"

    @property
    def ports(self) -> str:
        if (self.low, self.high) == (1, PORT_MAX):
            return "*"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"

    @property
    def is_tls(self) -> bool:
        """Whether nothing but TLS passes at any of its ports."""
        return self.protocol == "tls" or (not self.protocol and self.low == self.high == TLS_PORT)

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """The addresses of a rule of kind `net`."""
        return ipaddress.ip_network(self.host)


def parse_host(text: str, *, deny: bool = False) -> HostRule:
    """Read one rule. Without a port an allowed host means 443 only and a denied one every port.

    Raises ValueError with what is allowed. A denial may be as wide as it likes, but has no protocol.
    """
    check_text(text)
    host, ports, protocol = _split(text)
    if deny and protocol:
        raise ValueError(f"{text!r}: a denial holds for every protocol")
    low, high = _ports(text, ports, (1, PORT_MAX) if deny else (TLS_PORT, TLS_PORT))
    kind, name = _kind(text, host)
    if kind in ("one", "many") and not deny and is_public_suffix(name):
        raise ValueError(f"{text!r} is too wide: anyone can get a name below {name!r}; name the hosts that are meant")
    return HostRule(kind, name, low, high, _protocol(protocol, low, high))


def _kind(text: str, host: str) -> tuple[Kind, str]:
    if host.startswith("["):
        return "net", _network(text, host[1:-1])
    stars = re.match(r"\**", host)
    count = len(stars.group()) if stars else 0
    if count == 0 and re.fullmatch(r"[0-9./]+", host):
        return "net", _network(text, host)
    if host in ("*", "**"):
        raise ValueError(f"{text!r} is every host; name the hosts that are meant")
    rest = host[count + 1 :] if count else host
    if count > 2 or (count and host[count] != ".") or "*" in rest:
        raise ValueError(f"{text!r}: a wildcard is '*.' (one label) or '**.' (any depth) before a name")
    try:
        return ("name", "one", "many")[count], normal_name(rest)
    except ValueError as err:
        raise ValueError(f"{text!r}: {err}") from err


def normal_name(name: str) -> str:
    """The one form of a host name: lower case, A-labels, no trailing dot. Raises ValueError for anything else.

    Refused too: a last label that is a number, which resolvers read as an address (`127.1`, `0x7f000001`).
    """
    if any(char in _AMBIGUOUS for char in name):
        raise ValueError("it has a letter that the versions of IDNA read differently; write the name as 'xn--…'")
    try:
        ascii_name = name if name.isascii() else name.encode("idna").decode()
    except UnicodeError as err:
        raise ValueError(f"it is not a host name: {err}") from err
    ascii_name = ascii_name.lower().removesuffix(".")
    labels = ascii_name.split(".")
    if len(ascii_name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("it is not a host name; allowed: 'host:port', '*.host:port', '**.host:port', 'CIDR:port'")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("it would be read as an address; write that in full, such as 127.0.0.1")
    return ascii_name


def canonical_host(text: str) -> str:
    return str(parse_host(text))


def canonical_denied_host(text: str) -> str:
    return str(parse_host(text, deny=True))


def meet_hosts(one: str, other: str) -> str | None:
    """What two rules have in common, or None. Host patterns nest or are apart, so the meeting is again one rule."""
    a, b = parse_host(one), parse_host(other)
    low, high = max(a.low, b.low), min(a.high, b.high)
    if low > high:
        return None
    narrower = min(_protocol(a.protocol, low, high), _protocol(b.protocol, low, high), key=PROTOCOLS.index)
    both = {"low": low, "high": high, "protocol": _protocol(narrower, low, high)}
    if pattern_within(a, b):
        return str(a._replace(**both))  # type: ignore[arg-type]
    return str(b._replace(**both)) if pattern_within(b, a) else None  # type: ignore[arg-type]


def host_within(inner: str, outer: str) -> bool:
    return meet_hosts(inner, outer) == str(parse_host(inner))


def pattern_within(inner: HostRule, outer: HostRule) -> bool:
    """Compared by labels from the right, never by text: `evil-a.example` is not within `*.a.example`."""
    if (inner.kind == "net") != (outer.kind == "net"):
        return False
    if inner.kind == "net":
        a, b = inner.network, outer.network
        return a.version == b.version and a.subnet_of(b)  # type: ignore[arg-type]
    if outer.kind == "name" or inner.kind == outer.kind == "one":
        return inner.kind == outer.kind and inner.host == outer.host
    deeper = inner.host.endswith("." + outer.host)
    if outer.kind == "one":
        return inner.kind == "name" and deeper and "." not in inner.host[: -len(outer.host) - 1]
    return deeper or (inner.kind != "name" and inner.host == outer.host)


def _split(text: str) -> tuple[str, str | None, str]:
    """(host, ports or None, protocol): the last slash may also be a network's, `10.0.0.0/8`."""
    head, slash, protocol = text.rpartition("/")
    if not slash or protocol not in PROTOCOLS or not protocol:
        head, protocol = text, ""
    if head.startswith("["):
        end = head.find("]")
        if end < 0 or head[end + 1 : end + 2] not in ("", ":"):
            raise ValueError(f"{text!r}: an IPv6 address is written '[2001:db8::1]:443'")
        return head[: end + 1], head[end + 2 :] if end + 1 < len(head) else None, protocol
    if head.count(":") > 1:
        raise ValueError(f"{text!r}: an IPv6 address is written '[2001:db8::1]:443'")
    host, colon, ports = head.partition(":")
    return host, ports if colon else None, protocol


def _ports(text: str, ports: str | None, default: tuple[int, int]) -> tuple[int, int]:
    if ports is None:
        return default
    if ports == "*":
        return 1, PORT_MAX
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", ports, re.ASCII)
    if match:
        low, high = int(match[1]), int(match[2] or match[1])
        if 1 <= low <= high <= PORT_MAX:
            return low, high
    raise ValueError(f"{text!r}: the port is a number from 1 to 65535, a range such as 8000-8100, or '*' for any")


def _protocol(protocol: str, low: int, high: int) -> Protocol:
    """Leave out what goes without saying for these ports, so that a rule has one form."""
    if (protocol == "tls" and low == high == TLS_PORT) or (protocol == "tcp" and not low <= TLS_PORT <= high):
        return ""
    return protocol  # type: ignore[return-value]


def _network(text: str, host: str) -> str:
    if "%" in host:
        raise ValueError(f"{text!r} has a zone id, which means something else on every machine")
    # ipaddress takes neither octal nor short forms, which is what we want: libc would read 127.1 as 127.0.0.1.
    try:
        network = ipaddress.ip_network(host)
    except ValueError as err:
        raise ValueError(f"{text!r} is not an address or network: {err}") from err
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped and network.prefixlen >= 96:
        # One address, one spelling: the kernel itself turns the mapped form into IPv4.
        network = ipaddress.ip_network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return str(network.network_address) if network.num_addresses == 1 else str(network)
