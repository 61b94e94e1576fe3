"""The DNS messages that the gateway reads and writes: one question in, one answer out. Pure.

Only the question section is read, with strict bounds: no compression in a question that we accept, one question, the
Internet class. Anything else gets an error code and is never looked at further. Nothing is ever forwarded.
Source: RFC 1035, RFC 2308 (negative answers), RFC 6891 (answers without OPT are allowed).
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

A, NS, CNAME, SOA, PTR, MX, TXT, AAAA, SRV, SVCB, HTTPS, ANY = 1, 2, 5, 6, 12, 15, 16, 28, 33, 64, 65, 255
TYPE_NAMES: Final = {
    A: "A", NS: "NS", CNAME: "CNAME", SOA: "SOA", PTR: "PTR", MX: "MX", TXT: "TXT", AAAA: "AAAA", SRV: "SRV",
    SVCB: "SVCB", HTTPS: "HTTPS", ANY: "ANY", 10: "NULL",
}  # fmt: skip
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5
MESSAGE_MAX_BYTES: Final = 1024
TTL_S: Final = 5
_HEADER = struct.Struct(">HHHHHH")
_RESPONSE, _RECURSION_DESIRED, _RECURSION_AVAILABLE = 0x8000, 0x0100, 0x0080
_POINTER_TO_QUESTION: Final = b"\xc0\x0c"


class Query(NamedTuple):
    """One question. `labels` are raw bytes; `question` the section as it came, to be said back."""

    ident: int
    flags: int
    labels: tuple[bytes, ...]
    kind: int
    question: bytes

    @property
    def kind_name(self) -> str:
        return TYPE_NAMES.get(self.kind, f"TYPE{self.kind}")

    @property
    def name(self) -> str:
        """As text for rules and records: bytes that no host name has stay visible as escapes."""
        return ".".join("".join(map(_shown, label)) for label in self.labels)


class BadQuery(Exception):
    """A message that is no query we answer properly; `reply` is what to send back, empty for silence."""

    def __init__(self, reason: str, reply: bytes = b"") -> None:
        super().__init__(reason)
        self.reply = reply


def _shown(byte: int) -> str:
    """A byte of a label. A dot within one is no separator, and a control character no command to a terminal."""
    return chr(byte) if 0x21 <= byte <= 0x7E and byte not in b".\\" else f"\\x{byte:02x}"


def parse_query(data: bytes) -> Query:
    """Read one query. Raises BadQuery."""
    if len(data) < _HEADER.size:
        raise BadQuery("shorter than a header")
    ident, flags, questions, answers, authorities, _ = _HEADER.unpack_from(data)
    if flags & _RESPONSE:
        raise BadQuery("a response")
    if len(data) > MESSAGE_MAX_BYTES:
        raise BadQuery("longer than a query", _error(ident, flags, FORMERR))
    if flags >> 11 & 0xF:
        raise BadQuery("not a standard query", _error(ident, flags, NOTIMP))
    if questions != 1 or answers or authorities:
        raise BadQuery("not one question", _error(ident, flags, FORMERR))
    labels, end = _labels(data, _HEADER.size)
    if labels is None or len(data) < end + 4:
        raise BadQuery("a broken name", _error(ident, flags, FORMERR))
    kind, internet = struct.unpack_from(">HH", data, end)
    if internet not in (1, 255):
        raise BadQuery("not of the Internet class", _error(ident, flags, REFUSED))
    return Query(ident, flags, labels, kind, data[_HEADER.size : end + 4])


def _labels(data: bytes, at: int) -> tuple[tuple[bytes, ...] | None, int]:
    labels: list[bytes] = []
    total = 0
    while at < len(data):
        size = data[at]
        if size == 0:
            return tuple(labels), at + 1
        total += size + 1
        if size > 63 or total > 254 or at + 1 + size > len(data):
            break
        labels.append(data[at + 1 : at + 1 + size])
        at += 1 + size
    return None, at


def answer(query: Query, code: int, addresses: tuple[bytes, ...] = (), names: tuple[str, ...] = ()) -> bytes:
    """The reply: packed addresses (4 or 16 bytes) for A and AAAA, names for PTR, or none."""
    records = [(AAAA if len(packed) == 16 else A, packed) for packed in addresses]
    records += [(PTR, _packed_name(name)) for name in names]
    body = b"".join(
        _POINTER_TO_QUESTION + struct.pack(">HHIH", kind, 1, TTL_S, len(data)) + data for kind, data in records
    )
    flags = _RESPONSE | _RECURSION_AVAILABLE | query.flags & _RECURSION_DESIRED | code
    return _HEADER.pack(query.ident, flags, 1, len(records), 0, 0) + query.question + body


def _error(ident: int, flags: int, code: int) -> bytes:
    reply = _RESPONSE | _RECURSION_AVAILABLE | flags & (_RECURSION_DESIRED | 0x7800) | code
    return _HEADER.pack(ident, reply, 0, 0, 0, 0)


def _packed_name(name: str) -> bytes:
    return b"".join(bytes((len(label),)) + label.encode("ascii") for label in name.split(".")) + b"\0"


def reverse_address(labels: tuple[bytes, ...]) -> str:
    """The address that a PTR query asks for, as text; empty when the name is no whole reverse name."""
    parts = [label.lower().decode("ascii", "replace") for label in labels]
    if parts[-2:] == ["in-addr", "arpa"] and len(parts) == 6:
        return ".".join(reversed(parts[:4]))
    if parts[-2:] == ["ip6", "arpa"] and len(parts) == 34 and all(len(part) == 1 for part in parts[:32]):
        digits = "".join(reversed(parts[:32]))
        return ":".join(digits[index : index + 4] for index in range(0, 32, 4))
    return ""
