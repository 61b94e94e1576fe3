"""Is this attempt permitted, by which rule, and if not, why: pure, from a manifest's own words.

Deny is looked at first and wins. Among the rules that allow, the most particular one decides: a name before a
wildcard, the longer one before the shorter, so that its protocol is the one that holds. Names are compared by whole
labels; an address is permitted only by a rule that is an address or a network itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Literal, NamedTuple

from sandbox.destinations import TLS_PORT, HostRule, parse_host
from sandbox.egress.addresses import Address, Closed, closed

NOT_NAMED = "not_named"
PORT_NOT_NAMED = "port_not_named"
DENIED = "denied_by_rule"
LITERAL = "address_not_named"
CLOSED = "closed_address"


class Verdict(NamedTuple):
    """One judgement. `rule` is the rule that decided, empty when none names the host. `detail` adds to `reason`."""

    allowed: bool
    rule: str = ""
    reason: str = ""
    detail: str = ""
    protocol: Literal["", "tls", "tcp"] = ""


class Names:
    """Rules for names, found by whole labels: exact, then `*.` of the parent, then `**.` from the longest."""

    def __init__(self, rules: Iterable[HostRule]) -> None:
        self._by_host: dict[tuple[str, str], list[HostRule]] = {}
        for rule in rules:
            if rule.kind != "net":
                self._by_host.setdefault((rule.kind, rule.host), []).append(rule)

    def matching(self, name: str) -> Iterable[HostRule]:
        """The rules that name `name`, most particular first, whatever their ports."""
        yield from self._by_host.get(("name", name), ())
        parent = name.partition(".")[2]
        yield from self._by_host.get(("one", parent), ())
        while parent:
            yield from self._by_host.get(("many", parent), ())
            parent = parent.partition(".")[2]


class Networks:
    """Rules for addresses, the smallest network first."""

    def __init__(self, rules: Iterable[HostRule]) -> None:
        found = [(rule.network, rule) for rule in rules if rule.kind == "net"]
        self._rules = sorted(found, key=lambda pair: -pair[0].prefixlen)

    def matching(self, address: Address) -> Iterable[HostRule]:
        return (rule for network, rule in self._rules if address in network)


class Rules:
    """What one manifest allows and denies. Raises ValueError for words that are no rules."""

    def __init__(self, allow: Iterable[str], deny: Iterable[str] = ()) -> None:
        self.allow = tuple(parse_host(text) for text in allow)
        self.deny = tuple(parse_host(text, deny=True) for text in deny)
        self._names, self._denied_names = Names(self.allow), Names(self.deny)
        self._networks, self._denied_networks = Networks(self.allow), Networks(self.deny)

    def __repr__(self) -> str:
        return f"<Rules allow={len(self.allow)} deny={len(self.deny)}>"

    def judge_name(self, name: str, port: int) -> Verdict:
        """May the call connect to `name` (normal form) at `port`? Its address is judged when it is known."""
        denial = _first(self._denied_names.matching(name), port)
        if denial:
            return Verdict(False, str(denial), DENIED)
        return _decide(self._names.matching(name), port, NOT_NAMED)

    def judge_address(self, address: Address, port: int, own: frozenset[Address] = frozenset()) -> Verdict:
        """May the call connect to this address, which it named itself?"""
        if denial := self._denial(address, port):
            return denial
        verdict = _decide(self._networks.matching(address), port, LITERAL)
        if verdict.allowed:
            return self._check_closed(address, port, own, verdict)
        kinds = [_describe(reason, address) for reason in closed(address, own)]
        return verdict._replace(detail=verdict.detail or ", ".join(kinds))

    def judge_resolved(self, address: Address, port: int, own: frozenset[Address], verdict: Verdict) -> Verdict:
        """May a connection that `verdict` allowed by name go to this address, which the name resolved to?"""
        return self._denial(address, port) or self._check_closed(address, port, own, verdict)

    def is_known(self, name: str) -> HostRule | None:
        """The rule by which DNS answers for `name`: one that allows it at some port, if no denial covers that rule."""
        for rule in self._names.matching(name):
            if not any(d.low <= rule.low and rule.high <= d.high for d in self._denied_names.matching(name)):
                return rule
        return None

    def denial_of_name(self, name: str) -> HostRule | None:
        """A rule that denies the name, at whichever port."""
        return next(iter(self._denied_names.matching(name)), None)

    def _denial(self, address: Address, port: int) -> Verdict | None:
        rule = _first(self._denied_networks.matching(address), port)
        return Verdict(False, str(rule), DENIED, f"address {address}") if rule else None

    def _check_closed(self, address: Address, port: int, own: frozenset[Address], verdict: Verdict) -> Verdict:
        for reason in closed(address, own):
            if not self._opens(reason, port):
                return Verdict(False, verdict.rule, CLOSED, f"{address} is {_describe(reason, address)}")
        return verdict

    def _opens(self, reason: Closed, port: int) -> bool:
        if reason.opening == "never":
            return False
        matching = (rule for rule in self._networks.matching(reason.address) if rule.low <= port <= rule.high)
        return any(reason.opening == "cidr" or rule.network.num_addresses == 1 for rule in matching)


@functools.lru_cache(maxsize=256)
def compile_rules(allow: tuple[str, ...], deny: tuple[str, ...]) -> Rules:
    """The rules of a manifest, which never change: calls of one tool share them. Raises ValueError."""
    return Rules(allow, deny)


def _describe(reason: Closed, address: Address) -> str:
    words = {"own": "one of this host's own addresses", "metadata": "a metadata service"}
    text = words.get(reason.kind, reason.kind)
    return text if reason.address == address else f"{text} inside ({reason.address})"


def _first(rules: Iterable[HostRule], port: int) -> HostRule | None:
    return next((rule for rule in rules if rule.low <= port <= rule.high), None)


def _decide(rules: Iterable[HostRule], port: int, otherwise: str) -> Verdict:
    seen = []
    for rule in rules:
        if rule.low <= port <= rule.high:
            return Verdict(True, str(rule), "", "", rule.protocol or ("tls" if port == TLS_PORT else "tcp"))
        seen.append(rule)
    if seen:
        return Verdict(False, str(seen[0]), PORT_NOT_NAMED, ", ".join(rule.ports for rule in seen[:8]))
    return Verdict(False, "", otherwise)
