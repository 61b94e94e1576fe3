"""The file form: its JSON Schema for editors, and a manifest written back in it."""

from __future__ import annotations

from typing import Any, Final, get_args

from sandbox.http_rules import KEYS as HTTP_KEYS
from sandbox.manifest import CONTROLS, SECTIONS, Manifest
from sandbox.manifest_secrets import Secret
from sandbox.profile_fields import FIELDS, SECRETS, SETTING, Field
from sandbox.units import (
    RATE_PATTERN,
    SIZE_PATTERN,
    TIME_PATTERN,
    UNLIMITED,
    format_rate,
    format_size,
    format_time,
)

_FORMATS: Final = {"size": format_size, "rate": format_rate, "time": format_time}
_PATTERNS: Final = {
    "size": (SIZE_PATTERN, "512MiB"),
    "rate": (RATE_PATTERN, "50MiB/s"),
    "time": (TIME_PATTERN, "30s"),
}
_VARIABLE: Final = {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}
_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "isolation.required": CONTROLS,
    "isolation.best_effort": CONTROLS,
    "audit.capture": ("args", "output", "result"),
}


def to_file_form(manifest: Manifest, *, defaults: bool = False) -> dict[str, Any]:
    """The manifest as a profile would write it; without `defaults` only what differs from them."""
    plain = Manifest()
    form: dict[str, Any] = {}
    for key in ("name", "description"):
        if getattr(manifest, key):
            form[key] = getattr(manifest, key)
    for spec in FIELDS:
        value = getattr(getattr(manifest, spec.section), spec.field)
        if spec.is_list and value is None:
            continue
        if spec.key == SECRETS:
            form.update({"secrets": _file_value(spec, value)} if value else {})
        elif defaults or value != getattr(getattr(plain, spec.section), spec.field):
            form.setdefault(spec.section, {})[spec.name] = _file_value(spec, value)
    return form


def format_value(spec: Field, value: Any) -> str:
    """One value for people."""
    written = _file_value(spec, value)
    if isinstance(written, bool):
        return str(written).lower()
    return written if isinstance(written, str) and spec.kind in _FORMATS else repr(written)


def _file_value(spec: Field, value: Any) -> Any:
    if spec.key == SETTING:
        return dict(value)
    if spec.key == SECRETS:
        return {name: secret.model_dump(exclude_defaults=True) for name, secret in value.items()}
    if value is None:
        return UNLIMITED
    if spec.kind in _FORMATS:
        return _FORMATS[spec.kind](value)
    return list(value) if spec.is_list else value


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a profile file: units as strings, `extends`, `remove`, `sealed`."""
    sections = {name: _section_schema(name) for name in SECTIONS}
    names = {"type": "array", "items": {"type": "string", "minLength": 1}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "toolcall-sandbox profile",
        "description": "What a tool call may do. Nothing that is not named is granted.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "$schema": {"type": "string"},
            "name": {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"},
            "description": {"type": "string", "maxLength": 1000},
            "extends": {
                "description": "Profiles to start from, left to right: names or paths.",
                "anyOf": [{"type": "string", "minLength": 1}, names],
            },
            "sealed": {"type": "boolean", "description": "Whoever builds on this profile may only narrow it."},
            "remove": _remove_schema(),
            **sections,
        },
    }


def _section_schema(section: str) -> dict[str, Any]:
    if section == "secrets":
        return _secrets_schema()
    fields = [spec for spec in FIELDS if spec.section == section]
    return {
        "type": "object",
        "description": (SECTIONS[section].__doc__ or "").strip(),
        "additionalProperties": False,
        "properties": {spec.name: {"description": spec.help, **_value_schema(spec)} for spec in fields},
    }


def _value_schema(spec: Field) -> dict[str, Any]:
    schema = _plain_schema(spec)
    return {"anyOf": [schema, {"const": UNLIMITED}]} if spec.unlimited else schema


def _plain_schema(spec: Field) -> dict[str, Any]:
    if spec.kind in _PATTERNS:
        pattern, example = _PATTERNS[spec.kind]
        return {"type": "string", "pattern": pattern, "examples": [example]}
    if spec.kind == "table":
        return {"type": "object", "propertyNames": _VARIABLE, "additionalProperties": {"type": "string"}}
    if spec.is_list:
        items: dict[str, Any] = {"type": "string", "minLength": 1}
        if spec.kind == "http":
            items = {"anyOf": [items, _http_schema()]}
        if spec.key in _WORDS:
            items = {"enum": list(_WORDS[spec.key])}
        return {"type": "array", "items": items}
    if spec.kind == "word" and spec.words:
        return {"enum": list(spec.words)}
    if spec.kind == "flag":
        return {"type": "boolean"}
    if spec.kind in ("count", "real"):
        return {"type": "integer" if spec.kind == "count" else "number", **_range(spec)}
    return {"type": "string"}


def _http_schema() -> dict[str, Any]:
    """A rule as a table; the one-line form is a string."""
    method = {"type": "string", "pattern": r"^(\*|[A-Z][A-Z0-9_-]*(,[A-Z][A-Z0-9_-]*)*)$"}
    properties: dict[str, Any] = {
        "host": {"type": "string", "minLength": 1, "description": "A name, '*.name', '**.name' or CIDR; no port."},
        "method": {"anyOf": [method, {"type": "array", "items": method, "minItems": 1}]},
        "path": {"type": "string", "pattern": "^/[^ ?#]*$", "examples": ["/repos/**"]},
        "access": {"enum": ["allow", "deny"]},
        "inspect": {"type": "boolean", "description": "Also for HTTPS: the gateway ends TLS and looks inside."},
    }
    assert tuple(properties) == HTTP_KEYS
    return {"type": "object", "required": ["host"], "additionalProperties": False, "properties": properties}


def _secrets_schema() -> dict[str, Any]:
    entry = Secret.model_json_schema()
    properties = {
        name: {key: value for key, value in body.items() if key not in ("title", "default")}
        for name, body in entry["properties"].items()
    }
    secret = {"type": "object", "required": ["host"], "additionalProperties": False, "properties": properties}
    text = "Values that never enter the jail: the gateway sets each as a header of requests to its one host."
    return {"type": "object", "description": text, "propertyNames": _VARIABLE, "additionalProperties": secret}


def _range(spec: Field) -> dict[str, Any]:
    """The bounds that the manifest itself checks, so that editor and library cannot disagree."""
    info = SECTIONS[spec.section].model_fields[spec.field]
    metadata = [*info.metadata]
    for part in get_args(info.annotation):
        metadata += getattr(part, "__metadata__", ())
    bounds: dict[str, Any] = {}
    for entry in metadata:
        for constraint in getattr(entry, "metadata", [entry]):
            if hasattr(constraint, "ge"):
                bounds["minimum"] = constraint.ge
            if hasattr(constraint, "le"):
                bounds["maximum"] = constraint.le
    return bounds


def _remove_schema() -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for spec in FIELDS:
        entries: dict[str, Any] = {"type": "array", "items": {"type": "string"}}
        if spec.kind == "http":
            entries["items"] = {"anyOf": [entries["items"], _http_schema()]}
        if spec.key == SECRETS:
            properties[spec.section] = {"anyOf": [entries, {"const": True}]}
        elif (spec.is_list and spec.name != "deny") or spec.key == SETTING:
            keys = properties.setdefault(
                spec.section, {"type": "object", "additionalProperties": False, "properties": {}}
            )
            keys["properties"][spec.name] = {"anyOf": [entries, {"const": True}]}
    return {
        "type": "object",
        "description": "Inherited entries to take away: a list of them, or true for all. A denial cannot be removed.",
        "additionalProperties": False,
        "properties": properties,
    }
