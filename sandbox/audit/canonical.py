"""Record data to bytes: what JSON cannot carry is made representable, then written as RFC 8785 says.

`clean` turns plain data into data that every JSON reader reads alike; `encode` gives its canonical bytes. Both are
pure. Text keeps what it is, apart from three things that canonical JSON cannot carry safely: lone surrogates
(a file name that is no UTF-8), DEL, and the C1 controls. RFC 8785 forbids escaping the last two, and a terminal obeys
U+009B like ESC [, so all three are stored as the visible text `\\udc80`, `\\x9b`. ESC and the other C0 controls need
nothing: JSON itself writes them as `\\u001b`. Making stored text fit for a terminal is `visible`'s work.

Not defended against: a reader that prints decoded text without `visible`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import PurePath

from sandbox.digests import sha256
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

TEXT_MAX_BYTES = 64 * 1024
ITEMS_MAX = 4096
DEPTH_MAX = 48
INTEGER_MAX = 2**53 - 1
_PLAIN_MAX_CHARS = TEXT_MAX_BYTES // 4  # UTF-8 takes at most four bytes a character

_UNSTORABLE = re.compile(r"[\x7f-\x9f\ud800-\udfff]")
# Besides controls and surrogates: line separators and the characters that reorder or hide what a reader sees.
_INVISIBLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202f\u205f-\u206f"
    r"\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U000e0000-\U000e0fff]"
)
# What holds itself is too deep, and found to be: there is no need to look out for it.
_encoder = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":"), sort_keys=True)
# Numbers that need a look: of more than 15 digits, whole ones with a point, with an exponent, and none at all. The
# pattern may also fit text inside a string, which only costs the look.
_ODD_NUMBER = re.compile(r"[:,\[](?=[-0-9NI])-?(?:[0-9]{16}|[0-9]+\.0[,}\]]|[0-9.]+e|NaN|Infinity)")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


@functools.cache
def unwritten() -> str:
    """Text that no data holds, for what is put in later: random, and it never leaves this process."""
    return os.urandom(16).hex()


def _escape(match: re.Match[str]) -> str:
    char = match.group(0)
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def visible(text: str, max_chars: int = 0) -> str:
    """Make text from a tool fit for a terminal or a log: one line, nothing that moves, hides or reorders.

    `max_chars` 0 keeps the whole length; otherwise the end is replaced by an ellipsis.
    """
    if max_chars and len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    return text if text.isprintable() and text.isascii() else _INVISIBLE.sub(_escape, text)


def bounded(text: str, max_bytes: int = TEXT_MAX_BYTES) -> str:
    """Cut text to `max_bytes` of UTF-8, saying in the text how much went; never splits a character."""
    if len(text) * 4 <= max_bytes:
        return text
    raw = text.encode("utf-8", "backslashreplace")
    if len(raw) <= max_bytes:
        return text
    note = f" [+{len(raw) - max_bytes} bytes]"
    return raw[:max_bytes].decode("utf-8", "ignore") + note


class Settled(dict["str", "Any"]):
    """A group of a record that will not change any more: it is walked and encoded once, however many entries hold it.

    Precondition: it stands right below the top of an entry, so that nesting is counted alike wherever it is.
    """

    __slots__ = ("_text",)
    _text: str

    @property
    def text(self) -> str:
        """Its canonical text."""
        try:
            return self._text
        except AttributeError:
            self._text = _text(dict(self), 1)
            return self._text


class _Cleaner:
    """One walk over the data, noting what the C encoder would not write canonically.

    `ascii_keys`: RFC 8785 sorts by UTF-16 units, Python by code points; they agree within ASCII. `texts`: by stand-in,
    the floats that ECMAScript and Python write differently, and what is encoded already.
    """

    def __init__(self, *, stand_ins: bool = False) -> None:
        self.ascii_keys = True
        self.texts: dict[str, str] = {}
        self._nonce = unwritten() if stand_ins else ""

    def walk(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return value if len(value) <= _PLAIN_MAX_CHARS and value.isprintable() else self.text(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, int):
            return int(value) if -INTEGER_MAX <= value <= INTEGER_MAX else str(int(value))
        if isinstance(value, float):
            return self.number(float(value))
        if depth >= DEPTH_MAX:
            return f"[deeper than {DEPTH_MAX} levels]"
        if isinstance(value, Settled) and self._nonce and depth == 1:
            return self.stand_in(value.text)
        if isinstance(value, Mapping):
            return self.mapping(value, depth)
        if isinstance(value, (list, tuple)):
            return self.sequence(value, depth)
        return self.other(value, depth)

    def text(self, value: str) -> str:
        value = bounded(value)
        return value if value.isprintable() else _UNSTORABLE.sub(_escape, value)

    def number(self, value: float) -> Any:
        if math.isnan(value):
            return "NaN"
        if math.isinf(value):
            return "Infinity" if value > 0 else "-Infinity"
        if abs(value) > INTEGER_MAX:
            # Canonical JSON writes some of these without a point: a reader would take them for exact integers.
            return repr(value)
        if value.is_integer():
            return int(value)
        if self._nonce and "e" in repr(value):
            # Python takes to exponents at other magnitudes than ECMAScript does, and writes them differently.
            return self.stand_in(_by_the_book(value))
        return value

    def stand_in(self, text: str) -> str:
        name = f"{self._nonce}{len(self.texts)}"
        self.texts[name] = text
        return name

    def mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        clean: dict[str, Any] = {}
        for count, (key, item) in enumerate(value.items()):
            if count == ITEMS_MAX:
                clean["[left out]"] = len(value) - ITEMS_MAX
                break
            if type(key) is not str or not key.isidentifier():
                key = self.text(str(key))
            if not key.isascii():
                self.ascii_keys = False
            clean[key] = self.walk(item, depth + 1)
        return clean

    def sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        clean = [self.walk(item, depth + 1) for item in value[:ITEMS_MAX]]
        if len(value) > ITEMS_MAX:
            clean.append(f"[+{len(value) - ITEMS_MAX} items]")
        return clean

    def other(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            return self.text(str.__str__(value))
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self.text(bytes(value).decode("utf-8", "surrogateescape"))
        if isinstance(value, (set, frozenset)):
            return self.sequence(sorted(value, key=str), depth)
        if isinstance(value, PurePath):
            return self.text(str(value))
        raise AuditError(f"a record holds plain data, not {kind_name(value)}")


def kind_name(value: object) -> str:
    """The type's name, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def clean(value: Any) -> Any:
    """Plain data as JSON data: integers beyond 2^53, NaN and infinities become strings, text is made storable.

    Text over 64 KiB, lists and objects over 4096 items and nesting over 48 levels are cut, and say so in place.
    Raises AuditError for anything that is no plain data (a bug of ours, not of the tool).
    """
    return _Cleaner().walk(value, 0)


def encode(value: Any) -> bytes:
    """The RFC 8785 bytes of `clean(value)`. Precondition: keys are text."""
    return _text(value, 0).encode()


def _text(value: Any, depth: int) -> str:
    return _plain_text(value, depth) or _walked_text(value, depth)


def _plain_text(value: Any, depth: int) -> str:
    """As `_walked_text`, by the C encoder alone; empty where only the walk can tell whether that is canonical."""
    if type(value) not in (dict, Settled):
        return ""
    settled = sorted(name for name, group in value.items() if type(group) is Settled) if depth == 0 else ()
    nonce = unwritten() if settled else ""
    try:
        text = _encoder.encode({**value, **dict.fromkeys(settled, nonce)} if settled else value)
    except (TypeError, ValueError, RecursionError):
        return ""
    # An item takes two characters at least, so this bounds their number too; an opening bracket bounds the nesting.
    nesting = text.count("{") + text.count("[") + depth
    if len(text) > 2 * ITEMS_MAX or nesting > DEPTH_MAX or not text.isascii() or "\x7f" in text:
        return ""
    if _ODD_NUMBER.search(text):
        return ""
    if not settled:
        return text
    # The encoder has sorted the keys as we did, so the gaps come in this order.
    first, *others = text.split(f'"{nonce}"')
    pieces = [first]
    for name, after in zip(settled, others, strict=True):
        pieces += value[name].text, after
    return "".join(pieces)


def _walked_text(value: Any, depth: int) -> str:
    cleaner = _Cleaner(stand_ins=True)
    data = cleaner.walk(value, depth)
    if not cleaner.ascii_keys:
        return _by_the_book(_Cleaner().walk(value, depth))
    # Same bytes as rfc8785 gives (a property test compares them), six times faster.
    text = _encoder.encode(data)
    for name, instead in cleaner.texts.items():
        text = text.replace(f'"{name}"', instead, 1)
    return text


def _by_the_book(data: Any) -> str:
    # Loaded for what is rare: it takes longer than the rest of this module.
    import rfc8785

    return rfc8785.dumps(data).decode()


def digest(data: bytes) -> str:
    """`sha256:<hex>` of bytes, the form in which records name content."""
    return "sha256:" + sha256(data).hexdigest()
