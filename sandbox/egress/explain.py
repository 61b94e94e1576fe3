"""Denials in words that a model can act on: what was tried, that it is not permitted, what is, and what not to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from sandbox.egress.journal import Attempt

SHOWN_MAX: Final = 20
LINE_MAX: Final = 2000
_RULES_SHOWN_MAX: Final = 12

_REASONS: Final = {
    "not_named": "the manifest does not name this host",
    "port_not_named": "the manifest names this host, but only at port {detail}",
    "denied_by_rule": "the manifest denies it (rule {rule})",
    "address_not_named": "the manifest names no such address{more}; connect by name, not by address",
    "closed_address": "{detail}, which stays closed unless the manifest names that very address",
    "not_tcp": "only TCP is carried, and datagrams reach nothing; use TCP",
    "loopback_of_gateway": "nothing listens there",
    "unknown_synthetic": "that address was not given out for any name in this call; look the name up again",
    "sni_missing": "the TLS handshake named no host; it has to name {host}",
    "sni_mismatch": "the TLS handshake named {detail} and not {host}",
    "not_tls": "only TLS is permitted at this port, and this was not TLS ({detail})",
    "hello_timeout": "only TLS is permitted at this port, and no TLS handshake came in time",
    "dns_rate": "too many DNS queries in a short time",
    "dns_names": "too many different names ({detail})",
    "dns_tunnel": "the name looks like data sent through DNS ({detail})",
    "gateway_busy": "too many connections are open on this host machine",
    "budget": "the budget {detail} of this call is used up",
    "http_method": "the rules for {host} permit {detail}",
    "http_path": "the rules for {host} permit only the paths {detail}",
    "http_denied": "the manifest denies it (rule {rule})",
    "http_unclear_path": "the path can be read in several ways, and only {detail} is permitted; write it plainly",
    "http_host": "the request is for {detail}, and this connection was made to {host}",
    "http_framing": "its head can be read in more than one way ({detail})",
    "http_malformed": "only HTTP/1.1 is understood here ({detail})",
    "http_override": "the header {detail} could change what the request asks for",
    "tls_not_inspected": "requests to {host} are judged, and the rules for it do not look into TLS; use plain HTTP",
    "secret_needs_tls": "a secret is added to requests to {host}, which is not done without TLS; use https",
    "upstream_certificate": "the server's certificate is not good: {detail}",
    "upstream_failed": "the server did not answer as it should ({detail})",
    "connect_failed": "the server cannot be reached ({detail})",
    "resolve_failed": "the name cannot be looked up ({detail})",
}


def sentence(reason: str, *, detail: str = "", rule: str = "", host: str = "") -> str:
    """A reason of the journal's in words."""
    more = f" ({detail})" if detail else ""
    return _REASONS.get(reason, reason).format(more=more, detail=detail, rule=rule, host=host)


def denial(attempt: Attempt, allowed: Sequence[str]) -> str:
    """One sentence or two for one distinct denial. Of a request, `allowed` are the rules of its host."""
    if attempt.transport == "http":
        return _request_denial(attempt, allowed)
    what = f"{attempt.host}:{attempt.port}" if attempt.transport != "dns" else attempt.host
    verb = {"dns": "looking up", "udp": "sending datagrams to"}.get(attempt.transport, "connecting to")
    reason = sentence(attempt.reason, detail=attempt.detail, rule=attempt.rule, host=attempt.host)
    permitted = ", ".join(allowed[:_RULES_SHOWN_MAX]) + (", …" if len(allowed) > _RULES_SHOWN_MAX else "")
    return f"{verb} {what} is not permitted: {reason}. Permitted: {permitted or 'nothing'}. Retrying will not help."


def _request_denial(attempt: Attempt, allowed: Sequence[str]) -> str:
    usual = {"http": 80, "https": 443}[attempt.proto] == attempt.port
    host = f"[{attempt.host}]" if ":" in attempt.host else attempt.host
    url = f"{attempt.proto}://{host}{'' if usual else f':{attempt.port}'}{attempt.path[:200]}"
    reason = sentence(attempt.reason, detail=attempt.detail, rule=attempt.rule, host=attempt.host)
    what = f"{attempt.method[:20]} {url}".strip()
    if attempt.decision == "allow":
        return f"{what} failed: {reason}."
    shown = "; ".join(allowed[:_RULES_SHOWN_MAX]) + ("; …" if len(allowed) > _RULES_SHOWN_MAX else "")
    return f"{what} is not permitted: {reason}. Rules: {shown}. Retrying will not help."


def _shown(line: str) -> str:
    """Names and paths are the call's own words: nothing in them may command a terminal or hide itself."""
    if line.isprintable():
        return line[:LINE_MAX]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:LINE_MAX])


def _varied(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The first of each kind before all others, so that a scan of many hosts does not hide what else was tried."""
    kinds: set[tuple[str, str]] = set()
    first: list[Attempt] = []
    rest: list[Attempt] = []
    for attempt in attempts:
        kind = (attempt.transport, attempt.reason)
        (rest if kind in kinds else first).append(attempt)
        kinds.add(kind)
    return first + rest


def denials(
    attempts: Iterable[Attempt], allowed: Sequence[str], rules_of: Callable[[str], Sequence[str]] = lambda _host: ()
) -> list[str]:
    """A line for each distinct denial, the first so many, with a count of the rest. `rules_of`: a host's HTTP rules."""
    found = (
        denial(attempt, rules_of(attempt.host) if attempt.transport == "http" else allowed)
        for attempt in _varied(attempts)
    )
    lines = list(dict.fromkeys(map(_shown, found)))
    rest = len(lines) - SHOWN_MAX
    return [*lines[:SHOWN_MAX], *([f"and {rest} more denials, see the record"] if rest > 0 else [])]
