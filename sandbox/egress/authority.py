"""The gateway's own certificate authority, for looking into TLS: made when the gateway starts, gone with it.

Its key and those of the certificates it issues are in this process's memory only. What it signs is believed nowhere
but inside the jails of calls whose manifest asks for inspection: they get its certificate with their view.
Source: RFC 5280; ssl, load_cert_chain.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import time
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandbox._linux import wire

COMMON_NAME: Final = "toolcall-sandbox gateway"
AUTHORITY_DAYS: Final = 365
LEAF_DAYS: Final = 7
LEAVES_KEPT_S: Final = 86400.0
LEAVES_MAX: Final = 4096
# Clocks inside and outside are the same, but some programs check to the second.
_BACKDATED: Final = timedelta(hours=1)


class Authority:
    """Issues a certificate for a name when it is first asked for, and keeps it for a day."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, COMMON_NAME)])
        self._certificate = self._make()
        self._contexts: dict[str, tuple[float, ssl.SSLContext]] = {}

    def __repr__(self) -> str:
        return f"<Authority leaves={len(self._contexts)}>"

    @property
    def pem(self) -> str:
        """Its certificate, which is no secret."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode()

    def context(self, host: str) -> ssl.SSLContext:
        """For answering as `host`, a name in normal form or an address. HTTP/1.1 is all that is offered."""
        kept = self._contexts.get(host)
        now = time.monotonic()
        if kept is not None and now - kept[0] < LEAVES_KEPT_S:
            return kept[1]
        if len(self._contexts) >= LEAVES_MAX:
            self._contexts.clear()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        self._load(context, host)
        self._contexts[host] = (now, context)
        return context

    def _load(self, context: ssl.SSLContext, host: str) -> None:
        pem = self._leaf(host).public_bytes(serialization.Encoding.PEM) + self._leaf_key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        # The ssl module reads from a path only. This one is anonymous memory of ours, and is closed at once.
        fd = wire.memfd("certificate", pem)
        try:
            context.load_cert_chain(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATED)
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _make(self) -> x509.Certificate:
        builder = self._builder(self._name, self._key.public_key(), AUTHORITY_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return builder.add_extension(_usage(signs=True), critical=True).sign(self._key, hashes.SHA256())

    def _leaf(self, host: str) -> x509.Certificate:
        # A common name has 64 characters at most; only the alternative name counts anyway.
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
        builder = self._builder(subject, self._leaf_key.public_key(), LEAF_DAYS)
        for extension, critical in (
            (x509.SubjectAlternativeName([_general_name(host)]), False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        ):
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
