"""The part of a plan that HTTP rules and secrets make: what the gateway is told, whom the jail trusts. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from sandbox._linux import roots
from sandbox.http_rules import HttpRules
from sandbox.manifest import Manifest
from sandbox.plan import Step

AUTHORITY_FILE: Final = "/run/sandbox/tls/authority.pem"
BUNDLE_FILE: Final = "/run/sandbox/tls/authorities.pem"
JAVA_FILE: Final = "/run/sandbox/tls/authorities.jks"
# Variables by which programs and libraries are told of a file of authorities in place of their own.
_BUNDLE_VARIABLES: Final = (
    "SSL_CERT_FILE",  # OpenSSL, Go, Ruby, Rust's native roots
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "GIT_SSL_CAINFO",
    "AWS_CA_BUNDLE",
    "CARGO_HTTP_CAINFO",
    "NPM_CONFIG_CAFILE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
)
# Those that add to what the program brings along.
_AUTHORITY_VARIABLES: Final = ("NODE_EXTRA_CA_CERTS", "DENO_CERT")


def is_read(manifest: Manifest) -> bool:
    """Whether the gateway reads HTTP for such a call."""
    return manifest.network.mode == "allowlist" and bool(manifest.network.http)


def inspects(manifest: Manifest) -> bool:
    """Whether it looks into TLS for such a call: then, and only then, the jail has to trust it."""
    return is_read(manifest) and any(group.inspects for group in HttpRules(manifest.network.http).groups.values())


def steps(manifest: Manifest) -> tuple[Step, ...]:
    """The step that makes the jail trust the gateway; the supervisor puts the certificate in."""
    if not inspects(manifest):
        return ()
    files = {"authority_file": AUTHORITY_FILE, "bundle_file": BUNDLE_FILE, "java_file": JAVA_FILE}
    covers = {"covers": list(roots.FILES), "java_covers": list(roots.JAVA_FILES)}
    return (Step("trust", "view", {"authority": "", **files, **covers}),)


def environment(manifest: Manifest) -> dict[str, str]:
    """Placeholders for secrets, and where programs find whom to trust."""
    found = {}
    if inspects(manifest):
        found = dict.fromkeys(_BUNDLE_VARIABLES, BUNDLE_FILE)
        found |= dict.fromkeys(_AUTHORITY_VARIABLES, AUTHORITY_FILE)
    return found | {name: secret.placeholder_for(name) for name, secret in manifest.secrets.entries.items()}


def policy(manifest: Manifest, extra_roots: Iterable[tuple[str, str, str]]) -> dict[str, Any] | None:
    """What the gateway is told beside rules for hosts; None when it reads nothing. No value of a secret is in it."""
    if not is_read(manifest):
        return None
    secrets = {
        name: secret.model_dump(include={"host", "header", "format", "plain"})
        for name, secret in manifest.secrets.entries.items()
    }
    text = "\n".join(certificates for _, _, certificates in extra_roots)
    return {"rules": list(manifest.network.http), "secrets": secrets, "extra_roots": text}
