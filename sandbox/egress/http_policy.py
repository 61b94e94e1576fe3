"""What one call's policy says about HTTP: rules, secrets, extra authorities. Secrets' values are here only.

Whatever is noted of a request goes through `hide`: a host that says a secret back must not get it into the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from sandbox.http_rules import Group, HttpRules

HIDDEN: Final = "[secret]"


class Secret(NamedTuple):
    """A header that the gateway sets for one host. Its `repr` says nothing."""

    host: str
    header: bytes
    value: bytes
    plain: bool

    def __repr__(self) -> str:
        return f"<Secret for {self.host}>"


class HttpPolicy:
    """Of one call. Raises ValueError, without any value, for a secret that cannot stand in a header."""

    def __init__(self, policy: Mapping[str, Any], values: Mapping[str, str]) -> None:
        http = policy.get("http") or {}
        self.extra_roots: str = http.get("extra_roots", "")
        self._rules = HttpRules(http.get("rules", ()))
        self._entries: Mapping[str, Any] = http.get("secrets", {})
        self._words = tuple(sorted(values.values(), key=len, reverse=True))
        self.secrets = tuple(_secret(name, entry, values.get(name, "")) for name, entry in self._entries.items())

    def __repr__(self) -> str:
        return f"<HttpPolicy {self._rules!r} secrets={len(self.secrets)}>"

    def __bool__(self) -> bool:
        return bool(self._rules)

    def group(self, host: str) -> Group | None:
        """The rules that govern a host; None when anything may be sent to it."""
        return self._rules.group(host)

    def permitted(self, host: str) -> list[str]:
        """Those rules as a manifest writes them."""
        group = self.group(host)
        return [str(rule) for rule in (*group.allow, *group.deny)] if group else []

    def hide(self, text: str) -> str:
        for word in self._words:
            text = text.replace(word, HIDDEN)
        return text


def _secret(name: str, entry: Mapping[str, Any], value: str) -> Secret:
    if not value or not value.isascii() or not value.isprintable():
        raise ValueError(f"the secret {name} is missing or cannot be sent in a header")
    text = str(entry["format"]).replace("{}", value)
    return Secret(entry["host"], entry["header"].encode(), text.encode(), entry["plain"])
