"""HTTP rules: which requests a call may send to a host that `network.allow` lets it connect to. Pure.

A rule is one line, `[deny] METHODS HOST [PATH] [inspect]`, such as `GET,HEAD api.example.org /repos/** inspect`; in a
profile it is a table. Rules restrict: a host that some rule names may be sent nothing but what its rules permit, and
a host that none names is as open as `network.allow` leaves it. Only the rules of the most particular host pattern
count (a name before `*.` before `**.`); within them any rule that allows is enough, and deny wins. Where there is only
a denial, everything else is permitted. TLS is looked into (and the rule holds for it) only with `inspect`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple

from sandbox.destinations import PORT_MAX, HostRule, parse_host, pattern_within
from sandbox.grants import check_text
from sandbox.http_paths import EVERYTHING, Pattern, Segments, parse_pattern, readings

METHODS_MAX: Final = 32
_METHOD = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")
# CONNECT would make the host a relay to any other; TRACE says back what the gateway added.
NEVER_METHODS: Final = frozenset(("CONNECT", "TRACE"))
KEYS: Final = ("host", "method", "path", "access", "inspect")
_FORM: Final = "'[deny] METHODS HOST [PATH] [inspect]', such as 'GET,HEAD api.example.org /repos/** inspect'"

METHOD = "http_method"
PATH = "http_path"
DENIED = "http_denied"
UNCLEAR = "http_unclear_path"
NOT_INSPECTED = "tls_not_inspected"


class HttpRule(NamedTuple):
    """One rule. No `methods`: every method. `inspect`: it permits requests inside TLS, which the gateway then ends."""

    host: HostRule
    methods: tuple[str, ...]
    path: Pattern
    allow: bool = True
    inspect: bool = False

    def __str__(self) -> str:
        words = ["" if self.allow else "deny", ",".join(self.methods) or "*", host_text(self.host), str(self.path)]
        return " ".join(filter(None, (*words, "inspect" if self.inspect else "")))

    @property
    def is_everything(self) -> bool:
        return not self.methods and self.path.is_everything

    def has_method(self, method: str) -> bool:
        return not self.methods or method in self.methods

    def is_within(self, other: HttpRule) -> bool:
        """Whether it names no request that `other` does not; both are of one kind, and their hosts are not compared."""
        return (
            (not other.methods or (bool(self.methods) and set(self.methods) <= set(other.methods)))
            and self.path.is_within(other.path)
            and (other.inspect or not self.inspect)
        )

    def meet(self, other: HttpRule, host: HostRule) -> HttpRule | None:
        """What both permit, said for `host`."""
        path = self.path.meet(other.path)
        if not self.methods or not other.methods:
            methods = self.methods or other.methods
        else:
            methods = tuple(method for method in self.methods if method in other.methods)
            if not methods:
                return None
        return path and HttpRule(host, methods, path, self.allow, self.inspect and other.inspect)


class Verdict(NamedTuple):
    """May this request be sent? `reason` and `detail` are for the journal; `rule` decided, or is the nearest miss."""

    allowed: bool
    rule: str = ""
    reason: str = ""
    detail: str = ""


class Group(NamedTuple):
    """The rules of one host pattern."""

    host: HostRule
    allow: tuple[HttpRule, ...]
    deny: tuple[HttpRule, ...]

    @property
    def permitted(self) -> tuple[HttpRule, ...]:
        """What is allowed when denials are left aside: everything but TLS where there are only denials."""
        if any(rule.is_everything for rule in self.deny):
            return ()
        if self.allow:
            return self.allow
        return (HttpRule(self.host, (), parse_pattern(EVERYTHING)),)

    @property
    def inspects(self) -> bool:
        """Whether TLS to such a host is looked into. If not, none may pass, since nobody could judge it."""
        return any(rule.inspect for rule in self.permitted)

    def judge(self, method: str, path: str, *, tls: bool) -> Verdict:
        """May a request with this method and path be sent? Every reading of the path has to be permitted."""
        ways = readings(path)
        for rule in self.deny:
            if rule.has_method(method) and any(way is None or _is_denied(rule, way) for way in ways):
                return Verdict(False, str(rule), DENIED)
        permitted = [rule for rule in self.permitted if rule.inspect or not tls]
        if not permitted:
            return Verdict(False, str(self.host), NOT_INSPECTED if tls and self.permitted else METHOD, "none")
        candidates = [rule for rule in permitted if rule.has_method(method)]
        if not candidates:
            allowed = sorted({name for rule in permitted for name in rule.methods})
            return Verdict(False, str(permitted[0]), METHOD, ", ".join(allowed))
        deciding = [next((rule for rule in candidates if _permits(rule, way)), None) for way in ways]
        if deciding[0] is None or None in deciding:
            paths = ", ".join(dict.fromkeys(str(rule.path) for rule in candidates))
            return Verdict(False, str(candidates[0]), UNCLEAR if any(deciding) else PATH, paths[:200])
        return Verdict(True, str(deciding[0]))


def _permits(rule: HttpRule, way: Segments | None) -> bool:
    return rule.path.is_everything if way is None else rule.path.matches(way)


def _is_denied(rule: HttpRule, way: Segments) -> bool:
    """Whatever the server makes of upper and lower case."""
    folded = rule.path._replace(segments=tuple(part.casefold() for part in rule.path.segments))
    return folded.matches(tuple(part.casefold() for part in way))


class HttpRules:
    """The rules of one manifest. Raises ValueError for words that are no rules."""

    def __init__(self, texts: Iterable[str]) -> None:
        found: dict[HostRule, list[HttpRule]] = {}
        for text in texts:
            rule = parse_http(text)
            found.setdefault(rule.host, []).append(rule)
        self.groups = {
            host: Group(host, tuple(r for r in rules if r.allow), tuple(r for r in rules if not r.allow))
            for host, rules in found.items()
        }
        self._nets = sorted((host for host in found if host.kind == "net"), key=lambda h: -h.network.prefixlen)

    def __repr__(self) -> str:
        return f"<HttpRules groups={len(self.groups)}>"

    def __bool__(self) -> bool:
        return bool(self.groups)

    def group(self, host: str) -> Group | None:
        """The group that governs a host: a name in normal form, or an address."""
        if not self.groups:
            return None
        return next((self.groups[key] for key in self._keys(host) if key in self.groups), None)

    def group_within(self, host: HostRule) -> Group | None:
        """The group that governs all of a host pattern: its own, or that of the narrowest pattern around it."""
        around = [group for group in self.groups.values() if pattern_within(host, group.host)]
        return min(around, key=lambda one: sum(pattern_within(g.host, one.host) for g in around), default=None)

    def _keys(self, host: str) -> Iterator[HostRule]:
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            yield pattern("name", host)
            parent = host.partition(".")[2]
            yield pattern("one", parent)
            while parent:
                yield pattern("many", parent)
                parent = parent.partition(".")[2]
            return
        yield from (net for net in self._nets if address in net.network)


def pattern(kind: Any, host: str) -> HostRule:
    """A host pattern: a network rule for every port."""
    return HostRule(kind, host, 1, PORT_MAX)


def host_text(host: HostRule) -> str:
    return str(host).removesuffix(":*")


@lru_cache(maxsize=4096)
def parse_http(text: str) -> HttpRule:
    """Read one rule. Raises ValueError with what is allowed."""
    check_text(text)
    words = text.split(" ")
    allow = words[0] != "deny"
    inspect = words[-1] == "inspect"
    body = words[0 if allow else 1 : len(words) - inspect]
    if len(body) not in (2, 3) or not all(body):
        raise ValueError(f"{text!r} is not a rule; allowed: {_FORM}")
    if inspect and not allow:
        raise ValueError(f"{text!r}: 'inspect' belongs to the rule that allows; a denial holds for whatever is seen")
    methods = _methods(text, body[0])
    return HttpRule(_host(text, body[1]), methods, parse_pattern(body[2] if body[2:] else EVERYTHING), allow, inspect)


def _methods(text: str, words: str) -> tuple[str, ...]:
    if words == "*":
        return ()
    methods = tuple(sorted(dict.fromkeys(words.split(","))))
    if len(methods) > METHODS_MAX or not all(_METHOD.fullmatch(method) for method in methods):
        raise ValueError(f"{text!r}: {words!r} is no list of methods; allowed: '*', or such as 'GET,HEAD'")
    for never in NEVER_METHODS.intersection(methods):
        raise ValueError(f"{text!r}: {never} is never carried")
    return methods


def _host(text: str, host: str) -> HostRule:
    """Any pattern of a network rule; it may be as wide as it likes, since it only restricts."""
    rule = parse_host(host, deny=True)
    if str(rule) != f"{host_text(rule)}:*" or re.search(r"\]:|^[^\[]*:", host):
        raise ValueError(f"{text!r}: an HTTP rule holds at every port that network.allow names; leave the port out")
    return rule


def canonical_http(text: str) -> str:
    return str(parse_http(text))


def text_of(table: Mapping[str, Any]) -> str:
    """The one line of a rule that is written as a table. Raises ValueError."""
    unknown = [key for key in table if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; allowed: {', '.join(KEYS)}")
    host, path, access = table.get("host"), table.get("path", EVERYTHING), table.get("access", "allow")
    method, inspect = table.get("method", "*"), table.get("inspect", False)
    methods = [method] if isinstance(method, str) else method
    if not isinstance(host, str) or not host:
        raise ValueError("has no 'host'")
    if not isinstance(methods, Sequence) or not methods or not all(isinstance(name, str) for name in methods):
        raise ValueError(f"method: {method!r} is neither a method nor a list of them")
    if not isinstance(path, str) or " " in path:
        raise ValueError(f"path: {path!r} is not a path")
    if access not in ("allow", "deny"):
        raise ValueError(f"access: {access!r} is not allowed; allowed: 'allow', 'deny'")
    if not isinstance(inspect, bool):
        raise ValueError(f"inspect: {inspect!r} is not true or false")
    words = ["deny" if access == "deny" else "", ",".join(methods), host, path, "inspect" if inspect else ""]
    return " ".join(filter(None, words))


def beyond(inner: Sequence[str], outer: Sequence[str], reached: Sequence[str]) -> list[tuple[str, str]]:
    """Where `inner` permits requests that `outer` does not, for hosts that `reached` (network rules) can reach.

    Pairs of the rule that goes beyond, or "" where a rule is missing, and the rule or host of `outer` that it should
    lie within.
    """
    ours, theirs = HttpRules(inner), HttpRules(outer)
    found: list[tuple[str, str]] = []
    rules = [parse_host(text) for text in reached]
    for host in dict.fromkeys((*theirs.groups, *ours.groups)):
        limit = theirs.group_within(host)
        if limit is None or not any(pattern_within(host, rule) or pattern_within(rule, host) for rule in rules):
            continue
        mine = ours.group_within(host)
        if mine is None:
            found.append(("", str((limit.allow or limit.deny)[0])))
            continue
        for rule in mine.permitted:
            if not any(rule.is_within(other) for other in limit.permitted):
                found.append((str(rule) if mine.allow else "", str((limit.allow or limit.deny)[0])))
        for denial in limit.deny:
            if mine.permitted and not any(denial.is_within(other) for other in mine.deny):
                found.append(("", str(denial)))
    return list(dict.fromkeys(found))


def meet_http(ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The rules that permit what both permit, for every host."""
    one, other = HttpRules(ours), HttpRules(theirs)
    met: list[HttpRule] = []
    for host in dict.fromkeys((*one.groups, *other.groups)):
        around = [group for group in (one.group_within(host), other.group_within(host)) if group is not None]
        met += _meet_groups(around[0], around[-1], host)
    return list(dict.fromkeys(str(rule) for rule in met))


def _meet_groups(a: Group, b: Group, host: HostRule) -> list[HttpRule]:
    pairs = (mine.meet(theirs, host) for mine in a.permitted for theirs in b.permitted)
    allowed = list(dict.fromkeys(rule for rule in pairs if rule is not None))
    if not allowed:
        return [HttpRule(host, (), parse_pattern(EVERYTHING), allow=False)]
    # What lies within another one says nothing more; without it, meeting the same rules again changes nothing.
    allowed = [rule for rule in allowed if not any(rule.is_within(other) and rule != other for other in allowed)]
    denials = [rule._replace(host=host) for rule in (*a.deny, *b.deny)]
    return [*(allowed if a.allow or b.allow else []), *denials]
