"""What the zygote and its jails need of socket, signal, json and contextlib, without what these bring along.

The first two turn every constant of theirs into an enum, the last two load regular expressions and collections: half of
what a zygote's start took, and pages that each of its jails would copy. `socket` and `signal` are the interpreter's own
modules behind those of that name: plain numbers, and sockets without `with` (`Socket` has it).
"""

from __future__ import annotations

import _json

# mypy knows the modules that people use; these are what they are made of.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from typing import Any
else:
    import _signal as signal
    import _socket as socket

__all__ = ["Socket", "dumps", "loads", "signal", "socket", "suppress"]


class Socket(socket.socket):
    """A socket that is closed at the end of its `with`."""

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class suppress:  # noqa: N801 - contextlib's name for it
    """Pass over these exceptions."""

    def __init__(self, *kinds: type[BaseException]) -> None:
        self._kinds = kinds

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, *_rest: object) -> bool:
        return kind is not None and issubclass(kind, self._kinds)


class _Reading:
    """What the interpreter's JSON scanner asks of whoever uses it; as in json.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod({"-Infinity": -float("inf"), "Infinity": float("inf"), "NaN": float("nan")}.get)


def _refuse(value: object) -> object:
    raise TypeError(f"{type(value).__name__} has no place in JSON")


_scan = _json.make_scanner(_Reading())  # type: ignore[arg-type]  # typeshed asks for itself
# markers, default, encoder, indent, separators, sort_keys, skipkeys, allow_nan; as in json.JSONEncoder.
_chunks = _json.make_encoder(None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, True)


def loads(data: bytes) -> Any:
    """As json.loads, of JSON in UTF-8 without white space around it. Raises ValueError."""
    text = data.decode()
    try:
        value, end = _scan(text, 0)
    except StopIteration as stop:
        raise ValueError(f"no JSON at {stop.value}") from None
    if end != len(text):
        raise ValueError(f"something behind the JSON at {end}")
    return value


def dumps(value: object) -> str:
    """As json.dumps without blanks, in ASCII. Raises TypeError; a value inside itself raises RecursionError."""
    return "".join(_chunks(value, 0))
