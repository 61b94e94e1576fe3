"""The entries of tables and rules that have a form of their own: `environment.set`, `[secrets]`, `[[network.http]]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from sandbox.http_rules import text_of
from sandbox.manifest_secrets import Secret
from sandbox.manifest_words import explain


def entry_value(table: str, raw: Any, expand: Callable[[str], str]) -> Any:
    """One entry of a user's table; `expand` makes a real path of one that was written.

    Raises ValueError, without the value of a secret that was put in the wrong place.
    """
    if table == "environment.set":
        if not isinstance(raw, str):
            raise ValueError(f"{raw!r} is not a string")
        return raw
    if isinstance(raw, Secret):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError("is not a table; a secret has 'host', and 'env' or 'file'")
    words = dict(raw)
    if isinstance(words.get("file"), str) and words["file"]:
        words["file"] = expand(words["file"])
    try:
        return Secret.model_validate(words)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in details["loc"])
        said = explain({**details, "input": "…"}) if details["type"] != "value_error" else explain(details)
        raise ValueError(f"{where}: {said}" if where else said) from None


def rule_text(raw: Any) -> Any:
    """An HTTP rule as one line, whichever way it is written. Raises ValueError."""
    return text_of(raw) if isinstance(raw, Mapping) else raw
