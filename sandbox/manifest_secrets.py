"""Secrets as a manifest names them: where a value comes from and the one host that gets it. Never the value itself.

The value is read by the caller for each call and goes to the gateway, which sets it as a header of requests to that
host. Inside the jail there is a placeholder in the environment, for programs that insist on having something.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from sandbox.destinations import normal_name
from sandbox.grants import check_path, check_text

SECRETS_MAX: Final = 64
VALUE_MAX_BYTES: Final = 16 * 1024
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
# Headers by which messages are framed and routed: with one of these, the value would decide where a request goes.
_FRAMING: Final = frozenset(
    (
        *("connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade"),
    )
)


def _secret_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a variable name; allowed: letters, digits, '_'")
    return name


def _host(text: str) -> str:
    try:
        return normal_name(text)
    except ValueError:
        raise ValueError(f"{text!r} is not one host; a secret goes to one host, without port or wildcard") from None


def _header(name: str) -> str:
    if not _HEADER.fullmatch(name) or name.lower() in _FRAMING:
        raise ValueError(f"{name!r} is not a header that can carry a secret; allowed: such as 'Authorization'")
    return name


def _format(text: str) -> str:
    if text.count("{}") != 1 or not text.isascii() or not text.isprintable() or text != text.strip():
        raise ValueError(f"{text!r} is not a header's value with one '{{}}' in it, such as 'Bearer {{}}'")
    return text


def _variable(name: str) -> str:
    return _secret_name(name) if name else name


def _file(path: str) -> str:
    return check_path(path) if path else path


class Secret(BaseModel):
    """One value and its one use. `env` or `file` say where the caller finds it; neither: the program gives it.

    `plain`: also on plain HTTP, where everyone on the way can read it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    host: Annotated[str, AfterValidator(_host)]
    header: Annotated[str, AfterValidator(_header)] = "Authorization"
    format: Annotated[str, Field(max_length=200), AfterValidator(_format)] = "{}"
    env: Annotated[str, AfterValidator(_variable)] = ""
    file: Annotated[str, AfterValidator(_file)] = ""
    placeholder: Annotated[str, Field(max_length=1000), AfterValidator(check_text)] = ""
    plain: Annotated[bool, Field(strict=True)] = False

    @model_validator(mode="after")
    def _check_source(self) -> Secret:
        if self.env and self.file:
            raise ValueError("names a variable and a file; a secret has one source")
        return self

    def placeholder_for(self, name: str) -> str:
        """What stands in the jail's environment instead of the value."""
        return self.placeholder or f"placeholder-for-{name}"


SecretName = Annotated[str, AfterValidator(_secret_name)]


class Secrets(BaseModel):
    """Values that never enter the jail, by the names of the variables that hold their placeholders inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    entries: dict[SecretName, Secret] = Field(default_factory=dict, max_length=SECRETS_MAX)
