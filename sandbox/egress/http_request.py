"""One HTTP request of a call: is it permitted, and what exactly goes on to the server. Pure; h11 has done the reading.

What goes on is written anew from what was read, so that the server cannot read it otherwise than it was judged here:
one length, one Host, no folded lines, no headers that belong to the connection. Source: RFC 9110, 9112 (3, 6, 11.2).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import h11

from sandbox.destinations import TLS_PORT, normal_name
from sandbox.egress.http_policy import Secret
from sandbox.http_rules import METHOD, NEVER_METHODS, Group

HTTP_PORT: Final = 80
HOST: Final = "http_host"
FRAMING: Final = "http_framing"
MALFORMED: Final = "http_malformed"
OVERRIDE: Final = "http_override"
NEEDS_TLS: Final = "secret_needs_tls"

Headers = list[tuple[bytes, bytes]]
# They speak of one connection, not of the message (RFC 9110, 7.6.1). What frames a message is kept apart.
_HOP: Final = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authorization", b"proxy-authenticate"),
        *(b"te", b"trailer", b"upgrade", b"http2-settings"),
    )
)
_KEPT: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"expect"))
# Frameworks take a request's method, and some its path, from these instead.
_METHOD_OVERRIDES: Final = frozenset((b"x-http-method-override", b"x-http-method", b"x-method-override"))
_PATH_OVERRIDES: Final = frozenset((b"x-original-url", b"x-rewrite-url"))
_FOLDED = re.compile(rb"\n[ \t]")
_BARE_LF = re.compile(rb"(?<!\r)\n")
_ABSOLUTE = re.compile(r"(https?)://([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(?::([0-9]{1,5}))?")


class Place(NamedTuple):
    """Where a flow goes: the host and port that the call connected to, and whether inside TLS."""

    host: str
    port: int
    tls: bool

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def usual_port(self) -> int:
        return TLS_PORT if self.tls else HTTP_PORT

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == self.usual_port else f"{host}:{self.port}"


class Judged(NamedTuple):
    """What came of one request. `onward` is what the server gets; None when it gets nothing.

    `asked`: the path as it was asked for, without the query, which is the call's own business.
    """

    method: str
    asked: str
    onward: h11.Request | None = None
    rule: str = ""
    reason: str = ""
    detail: str = ""
    is_upgrade: bool = False


class _Refusal(Exception):
    def __init__(self, reason: str, detail: str = "", rule: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.rule = reason, detail, rule


def judge(request: h11.Request, head: bytes, place: Place, group: Group, secrets: Sequence[Secret]) -> Judged:
    """`head`: the bytes that the request was read from."""
    method = request.method.decode("ascii")
    target = request.target.decode("ascii")
    asked = target.partition("?")[0]
    try:
        _check_form(request, head)
        if method.upper() in NEVER_METHODS:
            raise _Refusal(METHOD, f"anything but {' and '.join(sorted(NEVER_METHODS))}", str(group.host))
        asked, query = _path(target, place)
        host = _host_header(request, place)
        verdict = group.judge(method, asked, tls=place.tls)
        if not verdict.allowed:
            raise _Refusal(verdict.reason, verdict.detail, verdict.rule)
        _check_overrides(request, asked, place, group)
        _check_secrets(place, secrets)
    except _Refusal as refusal:
        return Judged(method, asked, None, refusal.rule, refusal.reason, refusal.detail)
    is_upgrade = _is_websocket(request)
    ours = [secret for secret in secrets if secret.host == place.host]
    headers = _onward_headers(request, host, ours, is_upgrade=is_upgrade)
    onward = h11.Request(method=request.method, target=(asked + query).encode(), headers=headers)
    return Judged(method, asked, onward, verdict.rule, is_upgrade=is_upgrade)


def _check_form(request: h11.Request, head: bytes) -> None:
    """Refuse what h11 reads in one way and others read in another."""
    names = {name for name, _ in request.headers}
    if request.http_version not in (b"1.0", b"1.1"):
        raise _Refusal(MALFORMED, f"HTTP/{request.http_version.decode('ascii')}")
    if _FOLDED.search(head) or _BARE_LF.search(head):
        raise _Refusal(FRAMING, "a folded header line, or a line that ends without a carriage return")
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version == b"1.0"):
        raise _Refusal(FRAMING, "Transfer-Encoding beside Content-Length, or in HTTP/1.0")


def _path(target: str, place: Place) -> tuple[str, str]:
    """(path, query with its question mark) of whichever form the target has."""
    if match := _ABSOLUTE.fullmatch(target):
        scheme, authority, target = match[1].lower(), match[2], match[3] or "/"
        if scheme != place.scheme or not _is_place(authority, place):
            raise _Refusal(HOST, f"{scheme}://{authority}"[:200])
        target = target if target.startswith("/") else f"/{target}"
    if target == "*":
        return target, ""
    if not target.startswith("/") or "#" in target:
        raise _Refusal(MALFORMED, "a request target that is neither a path nor a URL")
    path, mark, query = target.partition("?")
    return path, mark + query


def _host_header(request: h11.Request, place: Place) -> bytes:
    """The Host header to send on: the name of the flow, with a port where the call gave one.

    h11 has seen to it that there is exactly one in HTTP/1.1.
    """
    values = [value for name, value in request.headers if name == b"host"]
    if not values:
        return place.authority.encode()
    text = values[0].decode("latin-1")
    if len(values) > 1 or not _is_place(text, place):
        raise _Refusal(HOST, text[:200])
    host = f"[{place.host}]" if ":" in place.host else place.host
    return (f"{host}:{place.port}" if re.search(r":[0-9]+$", text) else host).encode()


def _is_place(authority: str, place: Place) -> bool:
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        return False
    try:
        host = str(ipaddress.ip_address(match[1].strip("[]")))
    except ValueError:
        try:
            host = normal_name(match[1])
        except ValueError:
            return False
    return host == place.host and (match[2] is None or int(match[2]) == place.port)


def _check_overrides(request: h11.Request, path: str, place: Place, group: Group) -> None:
    for name, value in request.headers:
        plain = name.replace(b"_", b"-")
        if plain in _PATH_OVERRIDES:
            raise _Refusal(OVERRIDE, name.decode("ascii"))
        if plain in _METHOD_OVERRIDES:
            method = value.decode("latin-1").strip().upper()
            if method in NEVER_METHODS or not group.judge(method, path, tls=place.tls).allowed:
                raise _Refusal(OVERRIDE, name.decode("ascii"))


def _check_secrets(place: Place, secrets: Sequence[Secret]) -> None:
    if not place.tls and any(secret.host == place.host and not secret.plain for secret in secrets):
        raise _Refusal(NEEDS_TLS)


def _is_websocket(request: h11.Request) -> bool:
    """An upgrade that is carried. Of any other the server hears nothing, and answers in HTTP/1.1."""
    headers = dict(request.headers)
    return (
        request.method == b"GET"
        and request.http_version == b"1.1"
        and headers.get(b"upgrade", b"").strip().lower() == b"websocket"
        and b"upgrade" in _words(headers.get(b"connection", b""))
        and not {b"content-length", b"transfer-encoding"}.intersection(headers)
    )


def _words(value: bytes) -> set[bytes]:
    return {word.strip().lower() for word in value.split(b",")}


def _onward_headers(request: h11.Request, host: bytes, secrets: Sequence[Secret], *, is_upgrade: bool) -> Headers:
    """What the call itself says under a secret's header is left out, however it spells that."""
    ours = {secret.header.lower().replace(b"_", b"-") for secret in secrets}
    headers = without_hop_headers(request.headers.raw_items(), leave_out={b"host", *ours})
    headers.insert(0, (b"Host", host))
    headers += [(secret.header, secret.value) for secret in secrets]
    if is_upgrade:
        headers += [(b"Connection", b"Upgrade"), (b"Upgrade", b"websocket")]
    return headers


def without_hop_headers(headers: Iterable[tuple[bytes, bytes]], leave_out: Iterable[bytes] = ()) -> Headers:
    """Headers that go on. What `Connection` names goes too, but for what frames and routes the message."""
    pairs = [(name, name.lower(), value) for name, value in headers]
    named = {word for _, name, value in pairs if name == b"connection" for word in _words(value)}
    gone = (_HOP | named) - _KEPT | set(leave_out)
    return [(raw, value) for raw, name, value in pairs if name not in gone and name.replace(b"_", b"-") not in gone]
