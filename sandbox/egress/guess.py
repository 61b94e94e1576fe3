"""What the first bytes of a flow look like: a word for the record and for detectors, never a ground for a verdict."""

from __future__ import annotations

import re
from typing import Final

_METHODS: Final = b"GET |POST |PUT |HEAD |DELETE |OPTIONS |PATCH |CONNECT |TRACE |PRI \\* HTTP/2"
_SHAPES: Final[tuple[tuple[str, re.Pattern[bytes]], ...]] = (
    ("tls", re.compile(rb"\x16\x03[\x00-\x04]")),
    ("ssh", re.compile(rb"SSH-[12]\.")),
    ("http", re.compile(_METHODS + rb"|HTTP/1\.")),
    ("stratum", re.compile(rb'\s*\{.{0,200}"(?:mining\.|eth_submitLogin|login")', re.DOTALL)),
    ("json", re.compile(rb"\s*[{\[]")),
    ("git", re.compile(rb"[0-9a-f]{4}git-")),
    ("socks", re.compile(rb"\x05[\x01-\x08][\x00-\xff]|\x04[\x01\x02]")),
    ("bittorrent", re.compile(rb"\x13BitTorrent protocol")),
    ("greeting", re.compile(rb"220[ -]")),
    ("postgres", re.compile(rb"\x00\x00\x00[\x08-\xff](?:\x04\xd2\x16\x2f|\x00\x03\x00\x00)")),
    ("redis", re.compile(rb"\*\d+\r\n\$")),
    ("rdp", re.compile(rb"\x03\x00\x00.\x0e?\xe0", re.DOTALL)),
)
FIRST_BYTES: Final = 256


def guess(data: bytes) -> str:
    """A protocol's name, or "" when the bytes look like none that is known here."""
    return next((name for name, shape in _SHAPES if shape.match(data)), "")
