"""Whose call it is: options and variables of the environment, as the context of a call."""

from __future__ import annotations

import os
from typing import Any

from sandbox.cli.tell import say
from sandbox.context import parse_traceparent
from sandbox.errors import ManifestError

TRACE_VARIABLE = "TRACEPARENT"


def gather(*, traceparent: str | None, **named: str | None) -> dict[str, str]:
    """What `call_context` takes. Raises ManifestError for a `--traceparent` that is none.

    In the environment one that is none is left out, and said so: it was not meant for us in particular.
    """
    found: dict[str, Any] = {name: value for name, value in named.items() if value}
    text = os.environ.get(TRACE_VARIABLE, "") if traceparent is None else traceparent
    if not text and traceparent is None:
        return found
    try:
        trace_id, span_id = parse_traceparent(text)
    except ValueError as error:
        if traceparent is not None:
            raise ManifestError(str(error), where="--traceparent") from error
        say(f"{TRACE_VARIABLE} is left out: {error}")
        return found
    return found | {"trace_id": trace_id, "span_id": span_id}
