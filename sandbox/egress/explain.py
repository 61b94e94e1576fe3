"""Denials in words that a model can act on: what was tried, that it is not permitted, what is, and what not to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from sandbox.egress.journal import Attempt

SHOWN_MAX: Final = 20
_RULES_SHOWN_MAX: Final = 12

_REASONS: Final = {
    "not_named": "the manifest does not name this host",
    "port_not_named": "the manifest names this host, but only at port {detail}",
    "denied_by_rule": "the manifest denies it (rule {rule})",
    "address_not_named": "the manifest names no such address; connect by name, not by address",
    "closed_address": "{detail}, which stays closed unless the manifest names that very address",
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
}


def denial(attempt: Attempt, allowed: Sequence[str]) -> str:
    """One sentence or two for one distinct denial."""
    what = f"{attempt.host}:{attempt.port}" if attempt.proto != "dns" else attempt.host
    verb = "looking up" if attempt.proto == "dns" else "connecting to"
    words = {"detail": attempt.detail, "rule": attempt.rule, "host": attempt.host}
    reason = _REASONS.get(attempt.reason, attempt.reason).format(**words)
    permitted = ", ".join(allowed[:_RULES_SHOWN_MAX]) + (", …" if len(allowed) > _RULES_SHOWN_MAX else "")
    return f"{verb} {what} is not permitted: {reason}. Permitted: {permitted or 'nothing'}. Retrying will not help."


def denials(attempts: Iterable[Attempt], allowed: Sequence[str]) -> list[str]:
    """A line for each distinct denial, the first so many, with a count of the rest."""
    lines = list(dict.fromkeys(denial(attempt, allowed) for attempt in attempts))
    rest = len(lines) - SHOWN_MAX
    return [*lines[:SHOWN_MAX], *([f"and {rest} more denials, see the record"] if rest > 0 else [])]
