"""What a call's gateway needs of the caller: the values of its secrets, and files of extra authorities.

Values are read anew for each call, so that they can change, and go out in sealed memory that only the gateway reads.
No error says a value: neither ours, nor one of a function that was to give it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from sandbox.errors import ManifestError
from sandbox.manifest import Manifest
from sandbox.manifest_secrets import VALUE_MAX_BYTES, Secret

SecretValues = Mapping[str, str | Callable[[], str]]
ROOTS_MAX_BYTES = 4 << 20


def values(manifest: Manifest, given: SecretValues) -> bytes | None:
    """The values by name, as JSON; None where the manifest names none.

    Raises ManifestError for one that is not there, is given without being named, or cannot stand in a header.
    """
    entries = manifest.secrets.entries
    for name in given:
        if name not in entries:
            raise ManifestError("the manifest names no such secret", where=f"secret_values.{name}")
    if not entries or manifest.network.mode == "none":
        return None
    return json.dumps({name: _value(name, secret, given) for name, secret in entries.items()}).encode()


def _value(name: str, secret: Secret, given: SecretValues) -> str:
    where = f"secrets.{name}"
    value = _given(given[name], where) if name in given else _found(secret, where)
    if not value or not value.isascii() or not value.isprintable() or len(value) > VALUE_MAX_BYTES:
        message = f"its value is empty, longer than {VALUE_MAX_BYTES} bytes, or not printable ASCII"
        raise ManifestError(message, where=where)
    return value


def _given(source: str | Callable[[], str], where: str) -> str:
    if isinstance(source, str):
        return source
    try:
        value = source()
    except Exception as error:  # noqa: BLE001 - whatever it is; its text may hold the value, so only its kind is said
        failed = f"raised {type(error).__name__}"
    else:
        if isinstance(value, str):
            return value
        failed = f"returned {type(value).__name__}"
    # Not within the handler: there the function's own error would go along as the context of ours.
    raise ManifestError(f"the function that should give it {failed}", where=where)


def _found(secret: Secret, where: str) -> str:
    if secret.env:
        if secret.env not in os.environ:
            raise ManifestError(f"the variable {secret.env} is not set", where=where)
        return os.environ[secret.env].strip()
    if secret.file:
        try:
            with open(secret.file, "rb") as file:
                return file.read(VALUE_MAX_BYTES + 2).decode("ascii", "replace").strip()
        except OSError as error:
            raise ManifestError(f"{secret.file}: {error.strerror}", where=where) from error
    hint = "name an 'env' or a 'file', or give it: Sandbox(secret_values={...})"
    raise ManifestError("it has no source", where=where, hint=hint)


def extra_roots(manifest: Manifest) -> tuple[tuple[str, str, str], ...]:
    """(path, digest, certificates) of each file of extra authorities, as it is now. Raises ManifestError."""
    return tuple(_roots(Path(path)) for path in manifest.network.extra_roots)


def _roots(path: Path) -> tuple[str, str, str]:
    import ssl

    where = "network.extra_roots"
    try:
        with path.open("rb") as file:
            data = file.read(ROOTS_MAX_BYTES)
        text = data.decode("ascii")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except OSError as error:
        # SSLError is one, for what is no certificate.
        reason = error.strerror if error.filename else "it holds no certificates in PEM"
        raise ManifestError(f"{path}: {reason}", where=where) from error
    except ValueError as error:
        raise ManifestError(f"{path}: it holds no certificates in PEM", where=where) from error
    return str(path), f"sha256:{hashlib.sha256(data).hexdigest()}", text
