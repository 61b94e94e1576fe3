"""What one call tried on the network, for its record: single events while there are few, sums beyond. Pure.

Counts stay exact whatever the call does; what it can make us keep is bounded. A name or a greeting from inside is
data: it is cut to length here and made visible where it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

SINGLE_MAX: Final = 200
GROUPS_MAX: Final = 200
TEXT_MAX: Final = 300


class Attempt(NamedTuple):
    """One attempt, as it ended. `t` is RFC 3339; `resolved_ip` what was dialled, or the address that was asked for."""

    t: str
    transport: str
    proto: str
    host: str
    port: int
    decision: str
    rule: str = ""
    reason: str = ""
    detail: str = ""
    sni: str = ""
    resolved_ip: str = ""
    bytes_out: int = 0
    bytes_in: int = 0
    duration_s: float = 0.0
    # Of a request (transport "http"), whose bytes are its connection's too and counted there.
    method: str = ""
    path: str = ""
    status: int = 0


_OF_REQUESTS: Final = ("method", "path", "status")


class Journal:
    """Collects attempts. `totals` counts every one of them."""

    def __init__(self) -> None:
        self._singles: list[Attempt] = []
        self._groups: dict[tuple[str, ...], dict[str, Any]] = {}
        self._single_requests = 0
        self.totals = {"attempts": 0, "denied": 0, "lookups": 0, "lookups_denied": 0, "bytes_out": 0, "bytes_in": 0}
        self.denials: dict[tuple[object, ...], Attempt] = {}
        self._reasons: set[str] = set()

    def add(self, attempt: Attempt) -> None:
        """Keep one attempt: whole while there is room, else in the sum of its kind."""
        is_lookup, is_request = attempt.transport == "dns", attempt.transport == "http"
        is_denied = attempt.decision != "allow"
        self._count("lookups" if is_lookup else "requests" if is_request else "attempts")
        if is_denied:
            self._count("lookups_denied" if is_lookup else "requests_denied" if is_request else "denied")
            self._keep_denial(attempt)
        if not is_request:
            self.totals["bytes_out"] += attempt.bytes_out
            self.totals["bytes_in"] += attempt.bytes_in
        # Requests may be many to one connection, and must not take the room of connections.
        self._single_requests += is_request
        if is_lookup or len(self._singles) >= SINGLE_MAX or (is_request and self._single_requests > SINGLE_MAX // 2):
            self._sum_up(attempt)
        else:
            self._singles.append(attempt)

    def _count(self, what: str) -> None:
        self.totals[what] = self.totals.get(what, 0) + 1

    def is_new_denial(self, host: str, port: int, reason: str) -> bool:
        """Whether a denial of this kind would be the first, and kept."""
        return (host, port, reason, "", "") not in self.denials and self._has_room_for(reason)

    def _keep_denial(self, attempt: Attempt) -> None:
        key = (attempt.host, attempt.port, attempt.reason, attempt.method, attempt.path)
        if key not in self.denials and self._has_room_for(attempt.reason):
            self.denials[key] = attempt
            self._reasons.add(attempt.reason)

    def _has_room_for(self, reason: str) -> bool:
        """However much was denied before, the first denial for another reason is kept: reasons are ours, and few."""
        return len(self.denials) < GROUPS_MAX or reason not in self._reasons

    def _sum_up(self, attempt: Attempt) -> None:
        fields = ("transport", "proto", "host", "port", "decision", "rule", "reason", "method")
        key = tuple(str(getattr(attempt, name)) for name in fields)
        if key not in self._groups and len(self._groups) >= GROUPS_MAX:
            key = (attempt.transport, "", "", "", attempt.decision, "", attempt.reason, "")
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _as_item(attempt) if key[2] else _others(attempt)
            group["count"] = 1
            return
        group["count"] += 1
        group["t_last"] = attempt.t
        if attempt.transport == "http":
            group["path"], group["status"] = "", 0
        for name in ("bytes_out", "bytes_in", "duration_s"):
            group[name] = round(group[name] + getattr(attempt, name), 6)

    def items(self) -> list[dict[str, Any]]:
        """The record's `network` group, in order of time; a sum stands where its first attempt was."""
        found = [_as_item(attempt) for attempt in self._singles] + list(self._groups.values())
        return sorted(found, key=lambda item: str(item["t"]))


def _as_item(attempt: Attempt) -> dict[str, Any]:
    item: dict[str, Any] = attempt._asdict()
    if attempt.transport != "http":
        for name in _OF_REQUESTS:
            del item[name]
    return {name: value[:TEXT_MAX] if isinstance(value, str) else value for name, value in item.items()}


def _others(attempt: Attempt) -> dict[str, Any]:
    """The sum of everything with that reason that found no group of its own any more."""
    empty = Attempt(attempt.t, attempt.transport, "", "(others)", 0, attempt.decision, reason=attempt.reason)
    sums: Mapping[str, Any] = {name: getattr(attempt, name) for name in ("bytes_out", "bytes_in", "duration_s")}
    return {**_as_item(empty), **sums}
