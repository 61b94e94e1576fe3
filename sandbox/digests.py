"""SHA-256 without loading OpenSSL where little is digested: that takes 3 ms, and is five times as fast afterwards.

A command's single call digests some fifty kilobytes in each of its processes. The interpreter's own code does that
much; whoever goes on gets hashlib's.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from hashlib import _Hash
    from hashlib import sha256 as _own
else:
    try:
        from _sha2 import sha256 as _own  # Python 3.12
    except ImportError:
        try:
            from _sha256 import sha256 as _own
        except ImportError:  # an interpreter that was built with OpenSSL's alone
            from hashlib import sha256 as _own

OWN_BYTES_MAX = 128 * 1024
_HELD_BYTES_MAX = 16 * 1024
_left_bytes = OWN_BYTES_MAX


def sha256(data: bytes = b"") -> _Hash:
    """As hashlib.sha256. For what comes in pieces there is `Running`."""
    global _left_bytes  # of this process: what it has digested so far tells how long it goes on
    if len(data) <= _left_bytes:
        # An object costs as well.
        _left_bytes -= len(data) + 256
        return _own(data)
    _left_bytes = -1
    from hashlib import sha256 as openssl

    return openssl(data)


class Running:
    """The digest of what comes piece by piece, however much of it."""

    __slots__ = ("_digest", "_held")

    def __init__(self) -> None:
        self._held = bytearray()
        self._digest: _Hash | None = None

    def update(self, data: bytes) -> None:
        if self._digest is not None:
            self._digest.update(data)
            return
        self._held += data
        if len(self._held) > _HELD_BYTES_MAX:
            from hashlib import sha256 as openssl

            self._digest = openssl(self._held)
            self._held = bytearray()

    def hexdigest(self) -> str:
        return (self._digest or sha256(bytes(self._held))).hexdigest()
