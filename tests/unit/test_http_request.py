"""One request, as it came and as it goes on: whatever came in, the server can read what goes out in one way only."""

from __future__ import annotations

import email.parser
import http.client
import io
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.egress.http_policy import Secret
from sandbox.egress.http_request import Judged, Place, judge, without_hop_headers
from sandbox.http_rules import HttpRules

HOST = "www.example.test"
SECRET = Secret(HOST, b"X-Api-Key", b"the-value", False)
GROUP = HttpRules([f"GET,POST {HOST} /ok/** inspect"]).group(HOST)
TLS, PLAIN = Place(HOST, 443, True), Place(HOST, 80, False)


def judged(raw: bytes, place: Place = TLS, secrets: tuple[Secret, ...] = (SECRET,)) -> Judged | None:
    """None for what is no request at all."""
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(raw)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    if not isinstance(event, h11.Request):
        return None
    head = raw[: len(raw) - len(connection.trailing_data[0])]
    assert GROUP is not None
    return judge(event, head, place, GROUP, secrets)


def written(request: h11.Request) -> tuple[str, list[tuple[str, str]], bytes]:
    """What the server gets, read by somebody else's parser: request line, headers, bytes behind the head."""
    data = h11.Connection(h11.CLIENT).send(request)
    assert data is not None
    line, _, rest = data.partition(b"\r\n")
    head, end, behind = rest.partition(b"\r\n\r\n")
    assert end
    parsed = http.client.parse_headers(io.BytesIO(head + b"\r\n\r\n"))
    assert isinstance(parsed, email.message.Message)
    return line.decode("latin-1"), [(name.lower(), value) for name, value in parsed.items()], behind


def request(target: str = "/ok/x", *more: str, method: str = "GET", host: str = HOST) -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", f"Host: {host}", *more, "", ""]).encode("latin-1")


def test_what_goes_on_is_what_was_judged() -> None:
    found = judged(request("/ok/x?q=/../1", "Accept: */*", "Connection: close, X-Gone", "X-Gone: 1", "x-api-key: mine"))
    assert found is not None
    assert found.onward is not None
    line, headers, behind = written(found.onward)
    assert line == "GET /ok/x?q=/../1 HTTP/1.1"
    assert headers == [("host", HOST), ("accept", "*/*"), ("x-api-key", "the-value")]
    assert behind == b""
    assert found.asked == "/ok/x"


@pytest.mark.parametrize("spelt", ["X-API-KEY", "x-api-key", "X_Api_Key", "x_api-KEY"])
def test_every_spelling_of_a_secrets_header_goes(spelt: str) -> None:
    found = judged(request("/ok/x", f"{spelt}: mine", f"{spelt}: again"))
    assert found is not None
    assert found.onward is not None
    assert [value for name, value in written(found.onward)[1] if "api" in name] == ["the-value"]


def test_a_secret_of_another_host_is_left_out() -> None:
    other = Secret("other.example.test", b"X-Other", b"not-here", True)
    found = judged(request(), TLS, (SECRET, other))
    assert found is not None
    assert found.onward is not None
    assert b"not-here" not in b"".join(value for _, value in found.onward.headers)


def test_framing_cannot_be_taken_away_by_naming_it_in_connection() -> None:
    named = "Connection: host, content-length, transfer-encoding, x"
    headers = without_hop_headers([(b"Connection", named.partition(": ")[2].encode()), (b"Content-Length", b"3"),
                                   (b"X", b"1")])  # fmt: skip
    assert headers == [(b"Content-Length", b"3")]


METHODS = ["GET", "POST", "DELETE", "CONNECT", "TRACE", "get", "PRI"]
TARGETS = [
    "/ok/x",
    "/ok/",
    "/no",
    "/ok/../no",
    "/ok/%2e%2e/no",
    f"https://{HOST}/ok/x",
    "https://evil.test/ok/x",
    "*",
    f"http://{HOST}/ok/x",
    "evil.test:443",
    "/ok/x?a#b",
    "//evil.test/ok/x",
    "/ok/x?x=HTTP/1.1",
]
NAMES = [
    "Host",
    "Content-Length",
    "Transfer-Encoding",
    "Connection",
    "Upgrade",
    "X-Api-Key",
    "X_Api_Key",
    "Expect",
    "TE",
    "Trailer",
    "X",
    "Keep-Alive",
    "Proxy-Connection",
    "X-HTTP-Method-Override",
    "X-Original-URL",
    "Cookie",
    "Content-Length ",
    " X",
    "Http2-Settings",
]
VALUES = [
    HOST,
    "evil.test",
    f"{HOST}:443",
    "5",
    "-1",
    "0, 0",
    "chunked",
    "identity",
    "gzip, chunked",
    "close",
    "upgrade",
    "host, x-api-key",
    "websocket",
    "h2c",
    "100-continue",
    "",
    "DELETE",
    "/no",
    "a\tb",
    "x\x01y",
    "é",
]
ENDS = st.sampled_from(["\r\n", "\r\n", "\r\n", "\r\n", "\n", "\r\n ", "\r"])
fields = st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES), ENDS), max_size=6)


@given(
    st.sampled_from(METHODS), st.sampled_from(TARGETS), fields, st.sampled_from(["1.1", "1.0", "2.0"]), st.booleans()
)
@settings(max_examples=600)
def test_whatever_comes_in_one_thing_goes_out(method: str, target: str, lines: Any, version: str, named: bool) -> None:
    head = f"{method} {target} HTTP/{version}\r\n" + (f"Host: {HOST}\r\n" if named else "")
    raw = (head + "".join(f"{name}: {value}{end}" for name, value, end in lines) + "\r\n").encode("latin-1")
    found = judged(raw)
    if found is None or found.onward is None:
        return
    line, headers, behind = written(found.onward)
    assert behind == b""
    sent_method, sent_target, sent_version = line.split(" ")
    assert (sent_method, sent_version) == (method, "HTTP/1.1")
    assert sent_target.startswith("/ok/")
    names = [name for name, _ in headers]
    assert [value for name, value in headers if name == "host"] in ([HOST], [f"{HOST}:443"])
    assert [value for name, value in headers if name.replace("_", "-") == "x-api-key"] == ["the-value"]
    assert names.count("content-length") + names.count("transfer-encoding") <= 1
    allowed_hop = {"connection", "upgrade"} if found.is_upgrade else set()
    assert {"connection", "upgrade", "te", "trailer", "keep-alive", "proxy-connection"} & set(names) <= allowed_hop


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_arbitrary_bytes_are_refused_or_judged_and_never_break_anything(data: bytes) -> None:
    for raw in (data, b"GET /ok/" + data, request()[:-2] + data + b"\r\n\r\n"):
        found = judged(raw)
        assert found is None or found.onward is None or written(found.onward)[0].startswith(("GET /ok/", "POST /ok/"))
