"""Who asks for a call and why: what the record says about the caller's side.

Set for a stretch of code by `call_context`, or for one call by `.call(why=...)`. Some agent frameworks run tools in
threads that lose context variables, so that everything here can be given with the call itself as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class CallContext:
    """Free text (`why`) and the ids that join a call's record to an agent, a session, a trace, another record."""

    why: str = ""
    agent: str = ""
    session: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_record_id: str = ""

    def updated(self, **given: object) -> CallContext:
        """This context with the given values; `parent` stands for `parent_record_id`. None leaves a value alone.

        Raises TypeError for an unknown name and for anything but text.
        """
        values: dict[str, str] = {}
        for name, value in given.items():
            field = "parent_record_id" if name == "parent" else name
            if field not in self.__slots__:
                raise TypeError(f"a call's context has no {name!r}; it has {', '.join((*NAMES, 'span_id'))}")
            if value is None:
                continue
            if not isinstance(value, str):
                raise TypeError(f"{name} must be text, not {type(value).__name__}")
            values[field] = value
        return replace(self, **values)


# What `.call()` takes beside the tool's own arguments.
NAMES = ("why", "agent", "session", "trace_id", "parent")
_EMPTY = CallContext()
_CURRENT: ContextVar[CallContext] = ContextVar("toolcall_sandbox_context", default=_EMPTY)


def current_context() -> CallContext:
    """The context that `call_context` set here, else an empty one."""
    return _CURRENT.get()


def parse_traceparent(text: str) -> tuple[str, str]:
    """The trace and span ids in a `traceparent`, `00-TRACE-SPAN-FLAGS`. Raises ValueError for anything else.

    Source: W3C Trace Context, 3.2: version ff and ids of zeros alone are invalid, later versions may add fields.
    """
    found = _TRACEPARENT.fullmatch(text)
    if not found or (found["version"] == "00" and found["more"]):
        raise ValueError(f"{text[:80]!r} is not 00-TRACE-SPAN-FLAGS of 32, 16 and 2 lower-case hexadecimal digits")
    return found["trace"], found["span"]


_TRACEPARENT = re.compile(
    r"(?P<version>(?!ff)[0-9a-f]{2})-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<span>(?!0{16})[0-9a-f]{16})-[0-9a-f]{2}"
    r"(?P<more>(-.*)?)"
)


@contextmanager
def call_context(**given: str) -> Iterator[CallContext]:
    """Set `why`, `agent`, `session`, `trace_id`, `span_id`, `parent` for the calls made within.

    Nested uses add up, the inner value wins. Follows context variables: into tasks and `asyncio.to_thread`, not into
    threads that are started by hand.
    """
    token = _CURRENT.set(_CURRENT.get().updated(**given))
    try:
        yield _CURRENT.get()
    finally:
        _CURRENT.reset(token)
