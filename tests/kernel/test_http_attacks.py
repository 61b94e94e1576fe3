"""Requests that are not permitted, in every disguise: refused, explained, on record, unheard by any server. Each beside
one that is permitted."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.net_http import HttpScene, SeenHttp, Site, play_http
from tests.helpers.net_scenes import do
from tests.helpers.net_servers import Certificates, Outside
from tests.helpers.net_world import OTHER, WEB

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

NAME = "www.example.test"
INTERNAL = "10.1.2.3"
HOSTS = {NAME: WEB, "other.example.test": OTHER, "inner.example.test": INTERNAL, "gone.example.test": "192.0.2.77"}
ALLOW = [f"{NAME}:80", f"{NAME}:443", f"{NAME}:8080"]
RULES = [f"GET,POST,HEAD {NAME} /ok/**", f"GET {NAME} /ws", f"GET {NAME} /raw/**"]


def furnish(outside: Outside, requests: list[Any]) -> str:
    certificates = Certificates()
    site = Site("www", requests)
    for port in (80, 8080):
        outside.serve("www", WEB, port, site)
    outside.serve("tls", WEB, 443, certificates.tls(Site("tls", requests), NAME))
    outside.serve("other", OTHER, 80, Site("other", requests))
    outside.serve("other", OTHER, 443, certificates.tls(Site("other", requests), "other.example.test"))
    outside.serve("internal", INTERNAL, 80, Site("internal", requests))
    return certificates.ca_path


def text(
    target: str, method: str = "GET", host: str = NAME, more: str = "", body: str = "", version: str = "1.1"
) -> str:
    return f"{method} {target} HTTP/{version}\r\nHost: {host}\r\n{more}\r\n{body}"


def raw(*parts: str, port: int = 80, host: str = NAME) -> dict[str, Any]:
    """Send these bytes as they are, and read until the connection ends."""
    return do("tcp", host=host, port=port, send="".join(parts), half_close=True)


def plain(*actions: dict[str, Any], http: list[str] | None = None, **more: Any) -> HttpScene:
    return HttpScene(more.pop("allow", ALLOW), http or RULES, actions, **more)


TRAVERSALS = {
    "dots": "/ok/../secret",
    "encoded dots": "/ok/%2e%2e/secret",
    "half encoded dots": "/ok/.%2E/secret",
    "encoded slash": "/ok/..%2fsecret",
    "backslash": "/ok/..\\secret",
    "encoded backslash": "/ok/..%5csecret",
    "double encoding": "/ok/%252e%252e/secret",
    "double encoded slash": "/ok/..%252fsecret",
    "thrice": "/ok/%25252e%25252e/secret",
    "parameters": "/ok/..;x=1/secret",
    "overlong": "/ok/%c0%ae%c0%ae/secret",
    "null": "/ok%00/../secret",
    "up and down": "/ok/x/../../secret",
    "fullwidth": "/ok/%ef%bc%8e%ef%bc%8e/secret",
    "query in the path": "/secret%3f/../ok/x",
    "twice the slash": "//secret",
}
SCENES = {
    "permitted": plain(
        raw(text("/ok/x?y=1"), text("/ok/", "HEAD"), text("/ok/p", "POST", more="Content-Length: 2\r\n", body="hi"))
    ),
    "method": plain(raw(text("/ok/x", "DELETE"))),
    "small letters": plain(raw(text("/ok/x", "get"))),
    "path": plain(raw(text("/secret"))),
    "path prefix": plain(raw(text("/okay"))),
    "connect": plain(raw(text(f"{NAME}:80", "CONNECT")), http=[f"* {NAME}"]),
    "connect elsewhere": plain(
        raw(text("other.example.test:443", "CONNECT", host="other.example.test:443")), http=[f"* {NAME}"]
    ),
    "trace": plain(raw(text("/ok/x", "TRACE")), http=[f"* {NAME}"]),
    "any method": plain(raw(text("/ok/x", "PURGE")), http=[f"* {NAME}"]),
    "fronting": plain(raw(text("/ok/x", host="other.example.test"))),
    "host with another port": plain(raw(text("/ok/x", host=f"{NAME}:8080"))),
    "host as it may be written": plain(
        raw(text("/ok/x", host="WWW.Example.TEST.:80")), raw(text("/ok/x", host=f"{NAME}:8080"), port=8080)
    ),
    "host of nobody": plain(raw(text("/ok/x", host=""))),
    "host with a user": plain(raw(text("/ok/x", host=f"{NAME}@other.example.test"))),
    "two hosts": plain(raw(text("/ok/x", more="Host: other.example.test\r\n"))),
    "no host": plain(raw("GET /ok/x HTTP/1.1\r\n\r\n"), raw("GET /ok/x HTTP/1.0\r\n\r\n")),
    "absolute": plain(raw(text(f"http://{NAME}/ok/x"))),
    "absolute elsewhere": plain(raw(text("http://other.example.test/ok/x"))),
    "absolute with a user": plain(raw(text(f"http://{NAME}@other.example.test/ok/x"))),
    "absolute other scheme": plain(raw(text(f"https://{NAME}/ok/x"))),
    "absolute other path": plain(raw(text(f"http://{NAME}/secret"))),
    "star": plain(raw(text("*", "OPTIONS")), http=[f"OPTIONS {NAME} /ok/**"]),
    "star permitted": plain(raw(text("*", "OPTIONS")), http=[f"OPTIONS {NAME}"]),
    "fragment": plain(raw(text("/ok/x#/../secret"))),
    "two lengths": plain(raw(text("/ok/x", "POST", more="Content-Length: 2\r\nContent-Length: 3\r\n", body="hi"))),
    "length and chunks": plain(
        raw(text("/ok/x", "POST", more="Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", body="0\r\n\r\n"))
    ),
    "chunks in 1.0": plain(
        raw(text("/ok/x", "POST", more="Transfer-Encoding: chunked\r\n", body="0\r\n\r\n", version="1.0"))
    ),
    "other coding": plain(raw(text("/ok/x", "POST", more="Transfer-Encoding: gzip, chunked\r\n", body="0\r\n\r\n"))),
    "disguised coding": plain(raw(text("/ok/x", "POST", more="Transfer-Encoding : chunked\r\n", body="0\r\n\r\n"))),
    "folded": plain(raw(text("/ok/x", more="X: 1\r\n Transfer-Encoding: chunked\r\n"))),
    "bare line feeds": plain(raw(text("/ok/x").replace("\r\n", "\n"))),
    "negative length": plain(raw(text("/ok/x", "POST", more="Content-Length: -1\r\n"))),
    "bad chunk": plain(raw(text("/ok/x", "POST", more="Transfer-Encoding: chunked\r\n", body="zz\r\nhi\r\n0\r\n\r\n"))),
    "chunked": plain(
        raw(text("/ok/x", "POST", more="Transfer-Encoding: chunked\r\n", body="2\r\nhi\r\n0\r\nX-Late: 1\r\n\r\n"))
    ),
    "hidden in a body": plain(
        raw(text("/ok/x", "POST", more="Content-Length: 60\r\n", body=text("/secret").ljust(60)))
    ),
    "behind a refusal": plain(
        raw(text("/secret", "POST", more="Content-Length: 60\r\n", body=text("/ok/x").ljust(60)))
    ),
    "pipelined": plain(raw(text("/ok/1"), text("/secret"), text("/ok/2"))),
    "not http": plain(raw("SSH-2.0-OpenSSH_9.2\r\n\r\n"), raw("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")),
    "version": plain(raw(text("/ok/x", version="2.0")), raw(text("/ok/x", version="0.9"))),
    "method override": plain(raw(text("/ok/x", "POST", more="X-HTTP-Method-Override: DELETE\r\n"))),
    "method override permitted": plain(raw(text("/ok/x", "POST", more="X-HTTP-Method-Override: GET\r\n"))),
    "path override": plain(raw(text("/ok/x", more="X-Original-URL: /secret\r\n"))),
    "websocket elsewhere": plain(
        raw(text("/secret", more="Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"))
    ),
    "other upgrade": plain(
        raw(
            text(
                "/ok/x",
                more="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
            )
        )
    ),
    "upgrade with a body": plain(
        raw(
            text(
                "/ws",
                more="Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nContent-Length: 5\r\n",
                body="hello",
            )
        )
    ),
    "upgrade by the server": plain(raw(text("/raw/upgrade"))),
    "hop headers": plain(
        raw(
            text(
                "/ok/x",
                more="Connection: X-Gone, Host\r\nX-Gone: 1\r\nKeep-Alive: 5\r\nTE: gzip\r\nX-Kept: 1\r\n",
            )
        )
    ),
    "denied": plain(
        raw(text("/ok/x")),
        raw(text("/admin/x")),
        raw(text("/ADMIN/x")),
        raw(text("/ok/%2e./admin/x")),
        http=[f"deny * {NAME} /admin/**"],
    ),
    "tls without inspection": plain(do("tls", host=NAME, port=443, sni=NAME, send=text("/ok/x"))),
    "tls at another port": plain(do("tls", host=NAME, port=8080, sni=NAME, send=text("/ok/x"))),
    "inner name": plain(
        raw(text("/ok/x", host="inner.example.test"), host="inner.example.test"),
        allow=["inner.example.test:80"],
        http=["GET inner.example.test"],
    ),
    "inner name opened": plain(
        raw(text("/ok/x", host="inner.example.test"), host="inner.example.test"),
        allow=["inner.example.test:80", "10.0.0.0/8:80"],
        http=["GET inner.example.test"],
    ),
    "literal": plain(
        raw(text("/ok/x", host=WEB), host=WEB),
        raw(text("/secret", host=WEB), host=WEB),
        raw(text("/ok/x"), host=WEB),
        allow=[f"{WEB}:80"],
        http=[f"GET {WEB} /ok/**"],
    ),
    "redirect": HttpScene(
        ALLOW,
        [f"GET {NAME} /redirect"],
        argv=["curl", "-sSL", "-o", "/dev/null", "-w", "%{http_code}", f"http://{NAME}/redirect?http://{INTERNAL}/x"],
    ),
    **{
        f"upstream {name}": plain(raw(text(f"/raw/{name}")))
        for name in ("garbage", "two-lengths", "short", "nothing", "hop")
    },
    **{f"traversal {name}": plain(raw(text(target))) for name, target in TRAVERSALS.items()},
}


@pytest.fixture(scope="module")
def seen() -> dict[str, SeenHttp]:
    return play_http(SCENES, HOSTS, furnish)


def said(result: dict[str, Any]) -> str:
    assert result["ok"], result
    return str(result["text"])


def assert_refused(scene: SeenHttp, reason: str, status: int = 403) -> dict[str, Any]:
    """The call is told in words, the record has it, and no server heard of it."""
    answer = said(scene.result)
    assert answer.startswith(f"HTTP/1.1 {status} Refused by the sandbox\r\n"), answer
    assert f'"reason": "{reason}"' in answer
    assert scene.requests == []
    event = scene.denied(reason)
    assert (event["status"], event["host"], event["port"], event["proto"]) == (status, NAME, 80, "http")
    assert len(scene.denials) == 1
    assert "is not permitted" in scene.denials[0]
    assert "Retrying will not help" in scene.denials[0]
    return event


def test_what_is_permitted_passes_and_is_on_record(seen: dict[str, SeenHttp]) -> None:
    scene = seen["permitted"]
    answer = said(scene.result)
    assert answer.count("HTTP/1.1 200 ") == 3
    assert "GET /ok/x?y=1 at www, 0 bytes" in answer
    assert "POST /ok/p at www, 2 bytes" in answer
    assert scene.reached_targets == ["/ok/x?y=1", "/ok/", "/ok/p"]
    lines = [(e["method"], e["path"], e["status"], e["rule"], e["decision"]) for e in scene.events]
    rule = f"GET,HEAD,POST {NAME} /ok/**"
    assert lines == [
        ("GET", "/ok/x", 200, rule, "allow"),
        ("HEAD", "/ok/", 200, rule, "allow"),
        ("POST", "/ok/p", 200, rule, "allow"),
    ]
    flow = scene.one(transport="tcp")
    assert (flow["rule"], flow["proto"], flow["decision"]) == (f"{NAME}:80", "http", "allow")
    assert sum(event["bytes_out"] for event in scene.events) == flow["bytes_out"] == scene.usage["network_bytes_out"]
    assert sum(event["bytes_in"] for event in scene.events) == flow["bytes_in"]
    assert (scene.usage["network_attempts"], scene.usage["network_requests"]) == (1, 3)
    assert scene.denials == []


@pytest.mark.parametrize("name", ["method", "small letters", "connect", "connect elsewhere", "trace"])
def test_a_method_that_no_rule_names_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    event = assert_refused(seen[name], "http_method")
    assert event["method"] in ("DELETE", "get", "CONNECT", "TRACE")


def test_a_rule_for_every_method_means_every_method(seen: dict[str, SeenHttp]) -> None:
    assert "PURGE /ok/x at www" in said(seen["any method"].result)


@pytest.mark.parametrize("name", ["path", "path prefix", "absolute other path"])
def test_a_path_that_no_rule_names_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    event = assert_refused(seen[name], "http_path")
    assert event["path"] in ("/secret", "/okay")
    assert "/ok/**" in seen[name].denials[0]


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_spelling_of_a_path_reaches_what_is_not_named(seen: dict[str, SeenHttp], name: str) -> None:
    reason = "http_path" if name in ("null", "overlong", "twice the slash") else "http_unclear_path"
    assert_refused(seen[f"traversal {name}"], reason)


@pytest.mark.parametrize(
    "name", ["fronting", "host with another port", "host of nobody", "host with a user", "absolute elsewhere",
             "absolute with a user", "absolute other scheme"],
)  # fmt: skip
def test_a_request_for_another_host_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    assert_refused(seen[name], "http_host")


def test_the_own_name_may_be_written_as_names_are(seen: dict[str, SeenHttp]) -> None:
    scene = seen["host as it may be written"]
    assert [said(result).startswith("HTTP/1.1 200") for result in scene.results] == [True, True]
    assert scene.header("host", 0) == [f"{NAME}:80"]
    assert scene.header("host", 1) == [f"{NAME}:8080"]


def test_an_absolute_target_for_the_own_host_goes_on_as_a_path(seen: dict[str, SeenHttp]) -> None:
    scene = seen["absolute"]
    assert "GET /ok/x at www" in said(scene.result)
    assert scene.header("host") == [NAME]


@pytest.mark.parametrize("name", ["two hosts", "no host"])
def test_a_request_has_one_host(seen: dict[str, SeenHttp], name: str) -> None:
    scene = seen[name]
    assert said(scene.result).startswith("HTTP/1.1 400 ")
    assert scene.denied("http_malformed")["status"] == 400
    if name == "no host":
        # HTTP/1.0 knows none; the server gets the one that was connected to.
        assert said(scene.results[1]).startswith("HTTP/1.1 200 ")
        assert scene.header("host") == [NAME]
    else:
        assert scene.requests == []


def test_the_star_of_options_is_every_path(seen: dict[str, SeenHttp]) -> None:
    assert_refused(seen["star"], "http_path")
    assert "OPTIONS * at www" in said(seen["star permitted"].result)


def test_a_target_with_a_fragment_is_refused(seen: dict[str, SeenHttp]) -> None:
    assert_refused(seen["fragment"], "http_malformed", 400)


@pytest.mark.parametrize("name", ["two lengths", "length and chunks", "chunks in 1.0", "folded", "bare line feeds"])
def test_a_request_that_can_be_read_in_two_ways_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    assert_refused(seen[name], "http_framing", 400)


@pytest.mark.parametrize("name", ["other coding", "disguised coding", "negative length"])
def test_a_request_that_cannot_be_read_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    scene = seen[name]
    assert said(scene.result).startswith("HTTP/1.1 400 ")
    assert scene.requests == []
    assert scene.denied(scene.events[0]["reason"])["reason"] in ("http_malformed", "http_framing")


def test_a_broken_body_ends_at_the_gateway(seen: dict[str, SeenHttp]) -> None:
    scene = seen["bad chunk"]
    assert said(scene.result).startswith("HTTP/1.1 400 ")
    assert [request.get("complete", False) for request in scene.requests] in ([], [False])
    assert scene.denied("http_malformed")


def test_chunks_go_on_as_chunks_without_trailers(seen: dict[str, SeenHttp]) -> None:
    scene = seen["chunked"]
    assert "POST /ok/x at www, 2 bytes" in said(scene.result)
    assert scene.header("transfer-encoding") == ["chunked"]
    assert scene.header("x-late") == []


def test_what_is_within_a_body_is_no_request(seen: dict[str, SeenHttp]) -> None:
    scene = seen["hidden in a body"]
    assert scene.reached_targets == ["/ok/x"]
    assert scene.requests[0]["body_bytes"] == 60
    assert said(scene.result).count("HTTP/1.1 ") == 1


def test_the_body_of_a_refused_request_is_no_request(seen: dict[str, SeenHttp]) -> None:
    assert_refused(seen["behind a refusal"], "http_path")


def test_requests_in_a_row_are_judged_one_by_one(seen: dict[str, SeenHttp]) -> None:
    scene = seen["pipelined"]
    answer = said(scene.result)
    statuses = [part.split(" ")[0] for part in answer.split("HTTP/1.1 ")[1:]]
    assert statuses == ["200", "403", "200"]
    assert scene.reached_targets == ["/ok/1", "/ok/2"]
    assert scene.denied("http_path")["path"] == "/secret"


@pytest.mark.parametrize("name", ["not http", "version"])
def test_other_protocols_are_refused(seen: dict[str, SeenHttp], name: str) -> None:
    scene = seen[name]
    assert [said(result)[:13] for result in scene.results] == ["HTTP/1.1 400 "] * 2
    assert [event["reason"] for event in scene.events] == ["http_malformed"] * 2
    assert scene.requests == []


def test_headers_that_change_the_request_are_refused(seen: dict[str, SeenHttp]) -> None:
    assert_refused(seen["method override"], "http_override")
    assert_refused(seen["path override"], "http_override")
    assert "POST /ok/x at www" in said(seen["method override permitted"].result)


def test_an_upgrade_follows_the_rule(seen: dict[str, SeenHttp]) -> None:
    assert_refused(seen["websocket elsewhere"], "http_path")


def test_of_other_upgrades_the_server_hears_nothing(seen: dict[str, SeenHttp]) -> None:
    scene = seen["other upgrade"]
    assert "GET /ok/x at www" in said(scene.result)
    names = {name for name, _ in scene.requests[0]["headers"]}
    assert names.isdisjoint({"upgrade", "connection", "http2-settings"})
    scene = seen["upgrade with a body"]
    assert said(scene.result).startswith("HTTP/1.1 426 ")
    assert scene.header("upgrade") == []


def test_an_upgrade_that_nobody_asked_for_ends_the_connection(seen: dict[str, SeenHttp]) -> None:
    scene = seen["upgrade by the server"]
    assert said(scene.result).startswith("HTTP/1.1 502 ")
    assert scene.events[0]["reason"] == "upstream_failed"


def test_headers_of_a_connection_stay_on_it(seen: dict[str, SeenHttp]) -> None:
    scene = seen["hop headers"]
    names = {name for name, _ in scene.requests[0]["headers"]}
    assert names == {"host", "x-kept"}
    answer = said(seen["upstream hop"].result).lower()
    assert "x-kept: 1" in answer
    assert "x-gone" not in answer


def test_a_denial_holds_in_every_spelling_and_leaves_the_rest(seen: dict[str, SeenHttp]) -> None:
    scene = seen["denied"]
    assert [said(result)[9:12] for result in scene.results] == ["200", "403", "403", "403"]
    assert scene.reached_targets == ["/ok/x"]
    assert {event["reason"] for event in scene.events[1:]} == {"http_denied"}


@pytest.mark.parametrize("name", ["tls without inspection", "tls at another port"])
def test_tls_that_nobody_looks_into_is_no_way_round_the_rules(seen: dict[str, SeenHttp], name: str) -> None:
    scene = seen[name]
    assert scene.result["ok"] is False
    assert scene.result["error"] in ("ECONNRESET", "EPIPE")
    assert scene.requests == []
    flow = scene.one(transport="tcp")
    assert (flow["decision"], flow["reason"]) == ("deny", "tls_not_inspected")
    assert "do not look into TLS" in scene.denials[0]


def test_addresses_are_judged_for_read_flows_too(seen: dict[str, SeenHttp]) -> None:
    scene = seen["inner name"]
    assert said(scene.result).startswith("HTTP/1.1 403 ")
    assert scene.one(transport="tcp", decision="deny")["reason"] == "closed_address"
    assert scene.requests == []
    assert "GET /ok/x at internal" in said(seen["inner name opened"].result)


def test_rules_for_an_address_hold_for_connections_to_it(seen: dict[str, SeenHttp]) -> None:
    scene = seen["literal"]
    assert [said(result)[9:12] for result in scene.results] == ["200", "403", "403"]
    assert scene.reached_targets == ["/ok/x"]
    assert [event["reason"] for event in scene.events] == [None, "http_path", "http_host"]


def test_a_redirect_to_an_internal_address_leads_nowhere(seen: dict[str, SeenHttp]) -> None:
    scene = seen["redirect"]
    assert [request["site"] for request in scene.requests] == ["www"]
    assert scene.one(transport="tcp", decision="deny")["host"] == INTERNAL


@pytest.mark.parametrize("name", ["garbage", "two-lengths", "nothing"])
def test_a_server_that_speaks_no_http_is_not_passed_on(seen: dict[str, SeenHttp], name: str) -> None:
    scene = seen[f"upstream {name}"]
    assert said(scene.result).startswith("HTTP/1.1 502 ")
    assert scene.events[0]["reason"] == "upstream_failed"
    assert scene.denials == []


def test_an_answer_that_breaks_off_breaks_off_inside(seen: dict[str, SeenHttp]) -> None:
    """As a reset, so that nobody takes it for whole."""
    scene = seen["upstream short"]
    assert scene.result["ok"] is False
    assert scene.result["error"] == "ECONNRESET"
    assert scene.events[0]["reason"] == "upstream_failed"
