"""Certificates of authorities in the form in which Java keeps them (JKS), since it reads no PEM.

The format has a checksum made with a password; Java opens its own file of authorities without one, and "changeit" is
what everybody else uses. Source: sun.security.provider.JavaKeyStore (OpenJDK), engineStore.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct

PASSWORD = "changeit"  # noqa: S105 - of a file with nothing secret in it
_MAGIC, _VERSION, _CERTIFICATE = 0xFEEDFEED, 2, 2
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----\s+([A-Za-z0-9+/=\s]+?)-----END CERTIFICATE-----")


def from_pem(pem: bytes) -> bytes:
    """A key store with every certificate in `pem`."""
    certificates = [base64.b64decode(body) for body in _PEM.findall(pem)]
    out = [struct.pack(">III", _MAGIC, _VERSION, len(certificates))]
    for index, certificate in enumerate(certificates):
        alias = b"authority-%d" % index
        out.append(struct.pack(">IH", _CERTIFICATE, len(alias)) + alias)
        # When it was put in, which nobody asks for.
        out.append(struct.pack(">QH", 0, 5) + b"X.509")
        out.append(struct.pack(">I", len(certificate)) + certificate)
    data = b"".join(out)
    return (
        data + hashlib.sha1(PASSWORD.encode("utf-16-be") + b"Mighty Aphrodite" + data, usedforsecurity=False).digest()
    )
