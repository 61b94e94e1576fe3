"""Where distributions keep the certificates of the authorities that a system trusts, as one file.

The gateway verifies servers by it; a jail whose TLS is looked into gets it with the gateway's own authority added.
"""

from __future__ import annotations

import os

# Debian and Arch, Fedora and RHEL (old and new place), SUSE, Alpine and the BSDs.
FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)
# The same in Java's own form.
JAVA_FILES = (
    "/etc/ssl/certs/java/cacerts",
    "/etc/pki/ca-trust/extracted/java/cacerts",
    "/etc/pki/java/cacerts",
)


def system_file() -> str | None:
    """The first of them that is there; None where the system trusts nobody, or keeps it elsewhere."""
    return next((path for path in FILES if os.path.isfile(path)), None)
