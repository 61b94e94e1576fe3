"""Which names DNS inside a jail knows, and under which synthetic addresses: pure but for the counters of one call.

An allowed name gets one IPv4 and one IPv6 address that nobody else has, so that each later connection's name is known
exactly. Nobody outside is asked before a connection comes. A wildcard rule lets the call choose the rest of a name,
and the gateway will look that name up outside when it is connected to: how much can be said that way is bounded here.
"""

from __future__ import annotations

import ipaddress
import math
from collections import Counter
from typing import Final, NamedTuple

from sandbox.destinations import HostRule, normal_name
from sandbox.egress.addresses import SYNTHETIC_V4, SYNTHETIC_V6, Address
from sandbox.egress.budget import TokenBucket
from sandbox.egress.dns import AAAA, ANY, NOERROR, NXDOMAIN, PTR, REFUSED, A, Query, answer, reverse_address
from sandbox.egress.rules import DENIED, NOT_NAMED, Rules

# Asking again for a name that was given out says nothing new to anybody; other questions are rated more tightly.
QUERIES_PER_S: Final = 5000.0
NEW_QUERIES_PER_S: Final = 50.0
NAMES_MAX: Final = 4096
# What one call may say through the names below its wildcards, in all: room for some hundred hosts, none for a file.
CHOSEN_NAMES_MAX: Final = 256
CHOSEN_BYTES_MAX: Final = 4096
LABEL_MAX_BYTES: Final = 40
ENTROPY_FROM_BYTES: Final = 20
ENTROPY_MAX_BITS: Final = 4.1
# The first addresses of the range are the jail's own and the resolver's.
_RESERVED: Final = 16


class Answered(NamedTuple):
    """What one query was told. `reason` is empty when it was answered as asked."""

    reply: bytes
    name: str
    kind: str
    rule: str = ""
    reason: str = ""
    detail: str = ""


class NameTable:
    """The names of one call."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._index: dict[str, int] = {}
        self._names: list[str] = []
        self._queries = TokenBucket(QUERIES_PER_S, burst_s=1.0)
        self._new_queries = TokenBucket(NEW_QUERIES_PER_S, burst_s=8.0)
        self._chosen_names = self._chosen_bytes = 0

    def name_of(self, address: Address) -> str | None:
        """The name that was given `address`; None for an address that is not synthetic or was never given out."""
        network = SYNTHETIC_V4 if address.version == 4 else SYNTHETIC_V6
        if address not in network:
            return None
        index = int(address) - int(network.network_address) - _RESERVED
        return self._names[index] if 0 <= index < len(self._names) else None

    def addresses_of(self, name: str) -> tuple[ipaddress.IPv4Address, ipaddress.IPv6Address]:
        """The synthetic addresses of a name, which gets them now if it has none."""
        index = self._index.get(name)
        if index is None:
            index = self._index[name] = len(self._names)
            self._names.append(name)
        return SYNTHETIC_V4[index + _RESERVED], SYNTHETIC_V6[index + _RESERVED]

    def answer(self, query: Query, now: float) -> Answered:
        """Judge a query and make its reply."""
        if self._is_too_many(query, now):
            return Answered(answer(query, REFUSED), query.name, query.kind_name, "", "dns_rate")
        if query.kind == PTR:
            return self._reverse(query)
        try:
            name = normal_name(query.name)
        except ValueError:
            return Answered(answer(query, NXDOMAIN), query.name, query.kind_name, "", NOT_NAMED, "not a host name")
        if name == "localhost" or name.endswith(".localhost"):
            loopback = {A: (b"\x7f\0\0\x01",), AAAA: (bytes(15) + b"\x01",)}
            return Answered(answer(query, NOERROR, loopback.get(query.kind, ())), name, query.kind_name, "loopback")
        return self._judge(query, name)

    def _is_too_many(self, query: Query, now: float) -> bool:
        buckets = [self._queries]
        if query.name.lower() not in self._index:
            buckets.append(self._new_queries)
        if any(bucket.wait_s(now) > 0 for bucket in buckets):
            return True
        for bucket in buckets:
            bucket.take(1)
        return False

    def _judge(self, query: Query, name: str) -> Answered:
        kind = query.kind_name
        rule = self._rules.is_known(name)
        if rule is None:
            denial = self._rules.denial_of_name(name)
            reason = DENIED if denial else NOT_NAMED
            return Answered(answer(query, NXDOMAIN), name, kind, str(denial or ""), reason)
        if refusal := self._refusal(name, rule):
            return Answered(answer(query, REFUSED), name, kind, str(rule), *refusal)
        packed = tuple(address.packed for address in self.addresses_of(name))
        wanted = {A: packed[:1], AAAA: packed[1:], ANY: packed}
        # Every other type gets "no such record": HTTPS and SVCB could name other hosts, TXT and NULL carry tunnels.
        return Answered(answer(query, NOERROR, wanted.get(query.kind, ())), name, kind, str(rule))

    def _refusal(self, name: str, rule: HostRule) -> tuple[str, str] | None:
        if name in self._index:
            return None
        if len(self._names) >= NAMES_MAX:
            return "dns_names", f"more than {NAMES_MAX} names in one call"
        if rule.kind == "name":
            return None
        chosen = name[: -len(rule.host) - 1]
        for label in chosen.split("."):
            if len(label) > LABEL_MAX_BYTES:
                return "dns_tunnel", f"a label of {len(label)} bytes below a wildcard"
            if len(label) >= ENTROPY_FROM_BYTES and entropy_bits(label) > ENTROPY_MAX_BITS:
                return "dns_tunnel", "a label below a wildcard that looks like encoded data"
        if self._chosen_names >= CHOSEN_NAMES_MAX or self._chosen_bytes + len(chosen) > CHOSEN_BYTES_MAX:
            return "dns_tunnel", f"more than {CHOSEN_NAMES_MAX} names or {CHOSEN_BYTES_MAX} bytes below wildcards"
        self._chosen_names += 1
        self._chosen_bytes += len(chosen)
        return None

    def _reverse(self, query: Query) -> Answered:
        """Who has a synthetic address is known here; all other reverse names are nobody's."""
        try:
            found = self.name_of(ipaddress.ip_address(reverse_address(query.labels)))
        except ValueError:
            found = None
        if found is None:
            return Answered(answer(query, NXDOMAIN), query.name, "PTR", "reverse")
        return Answered(answer(query, NOERROR, names=(found,)), query.name, "PTR", "reverse")


def entropy_bits(text: str) -> float:
    """Shannon entropy of the characters, in bits each. Words stay below 4; base32 and base64 of some length do not."""
    counts = Counter(text)
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
