"""TLS that the gateway looks into: for whom it is done, whom each side trusts, what holds inside. And secrets, which
the gateway adds for one host and which are nowhere else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.helpers.net_http import HttpScene, SeenHttp, Site, play_http
from tests.helpers.net_scenes import do
from tests.helpers.net_servers import Certificates, Outside
from tests.helpers.net_world import OTHER, WEB

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

NAME, ELSE = "www.example.test", "other.example.test"
HOSTS = {
    NAME: WEB,
    ELSE: OTHER,
    "expired.example.test": "93.184.216.35",
    "stranger.example.test": "93.184.216.36",
    "misnamed.example.test": "93.184.216.37",
    "nobody.example.test": "93.184.216.38",
}
ALLOW = [f"{NAME}:443", f"{NAME}:80", f"{ELSE}:443"]
RULES = [f"GET,POST {NAME} /ok/** inspect", f"GET {NAME} /redirect inspect", f"GET {NAME} /ws inspect"]
VALUE = "v3ry-s3cret-value-0123456789"
SECRETS = {"TOKEN": {"host": NAME, "format": "Bearer {}"}}


def furnish(outside: Outside, requests: list[Any]) -> str:
    good, old = Certificates(), Certificates("expired", days=-1)
    stranger = Certificates("stranger")
    site = Site("www", requests)
    outside.serve("www", WEB, 80, site)
    outside.serve("www", WEB, 443, good.tls(site, NAME))
    other = Site("other", requests)
    outside.serve("other", OTHER, 443, good.tls(other, ELSE))
    for name, certificates in (("expired", old), ("stranger", stranger), ("misnamed", good)):
        host = f"{name}.example.test"
        served = NAME if name == "misnamed" else host
        outside.serve(name, HOSTS[host], 443, certificates.tls(Site(name, requests), served))
    # The expired one's authority is trusted: what is wrong with it is its date alone.
    with open(good.ca_path, "a") as file, open(old.ca_path) as more:
        file.write(more.read())
    return good.ca_path


def curl(*arguments: str, **more: Any) -> HttpScene:
    argv = ["curl", "-sS", "-i", *arguments]
    return HttpScene(more.pop("allow", ALLOW), more.pop("http", RULES), argv=argv, **more)


def shell(script: str, **more: Any) -> HttpScene:
    return HttpScene(more.pop("allow", ALLOW), more.pop("http", RULES), argv=["sh", "-c", script], **more)


def secret(scene: HttpScene, **more: Any) -> HttpScene:
    entry = {**SECRETS["TOKEN"], **more}
    box = {"secrets": {"TOKEN": entry}, "secret_values": {"TOKEN": VALUE}, **scene.box}
    return HttpScene(scene.allow, scene.http, scene.probe, scene.argv, scene.settings, box)


LOOK = f"""
import os
found = []
for top in ("/etc", "/run", "/tmp", "/home", "/workspace", "/proc"):
    for directory, names, files in os.walk(top):
        if top == "/proc" and directory.count("/") > 2:
            names.clear()
        for name in files:
            if top == "/proc" and name not in ("environ", "cmdline"):
                continue
            try:
                with open(os.path.join(directory, name), "rb") as file:
                    if {VALUE[:12]!r}.encode() + {VALUE[12:]!r}.encode() in file.read(1 << 20):
                        found.append(os.path.join(directory, name))
            except OSError:
                pass
print(found, os.environ["TOKEN"])
"""
TRUST = (
    "env | grep -cE '^(SSL_CERT_FILE|CURL_CA_BUNDLE|REQUESTS_CA_BUNDLE|PIP_CERT|GIT_SSL_CAINFO|NODE_EXTRA_CA_CERTS)=';"
    "grep -c BEGIN /run/sandbox/tls/authorities.pem /etc/ssl/certs/ca-certificates.crt /run/sandbox/tls/authority.pem;"
    "cd /run/sandbox/tls; sha256sum authorities.pem authority.pem /etc/ssl/certs/ca-certificates.crt | cut -c1-64;"
    "(echo x >> /run/sandbox/tls/authorities.pem) 2>&1; (echo x >> /etc/ssl/certs/ca-certificates.crt) 2>&1;"
    "grep -rl 'PRIVATE KEY' /run /etc/ssl 2>/dev/null; echo end"
)
ISSUER = (
    "echo | openssl s_client -connect {0}:443 -servername {0} 2>/dev/null"
    " | openssl x509 -noout -issuer -ext subjectAltName"
)
UPSTREAM = ["expired", "stranger", "misnamed"]
SCENES = {
    "permitted": curl(f"https://{NAME}/ok/x"),
    "path": curl(f"https://{NAME}/no"),
    "method": curl("-X", "DELETE", f"https://{NAME}/ok/x"),
    "fronting": curl("-H", f"Host: {ELSE}", f"https://{NAME}/ok/x"),
    "absolute": curl("--request-target", f"https://{ELSE}/ok/x", f"https://{NAME}/ok/x"),
    "http2": curl("--http2", f"https://{NAME}/ok/x"),
    "no environment": shell(f"env -i curl -sS https://{NAME}/ok/x"),
    "other authorities": shell(f"curl -sS --cacert /dev/null https://{NAME}/ok/x"),
    "trust": shell(TRUST),
    "no trust": shell(TRUST, http=[f"GET {NAME}"]),
    "issuers": shell("; ".join(ISSUER.format(host) for host in (NAME, ELSE))),
    "sni": HttpScene(ALLOW, RULES, [
        do("tls", host=NAME, port=443, sni=NAME, send=f"GET /ok/x HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
        do("tls", host=NAME, port=443, sni=NAME, pieces=9, send=f"GET /ok/x HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
        do("tls", host=NAME, port=443, sni=ELSE, send="x"),
        do("tls", host=NAME, port=443, sni=None, send="x"),
        do("tcp", host=NAME, port=443, send=f"GET /ok/x HTTP/1.1\r\nHost: {NAME}\r\n\r\n"),
    ]),
    **{name: curl(f"https://{name}.example.test/ok/x", allow=[f"{name}.example.test:443"],
                  http=[f"GET {name}.example.test inspect"]) for name in [*UPSTREAM, "nobody"]},
    "expired, not looked into": shell(
        "curl -sS -k https://expired.example.test/ok/x", allow=["expired.example.test:443"], http=[]
    ),
    "secret": secret(curl(f"https://{NAME}/ok/x")),
    "secret elsewhere": secret(curl("-k", "-H", "Authorization: $TOKEN", f"https://{ELSE}/ok/x")),
    "secret of the tool's": secret(curl("-H", "authorization: Basic mine", "-H", "AUTHORIZATION: x", f"https://{NAME}/ok/x")),
    "secret spelt": secret(curl("-H", "x_api-key: mine", "-H", "X-API-KEY: mine", f"https://{NAME}/ok/x"),
                           header="X-Api-Key", format="{}"),
    "secret on the way": secret(curl("-H", "Connection: authorization", f"https://{NAME}/ok/x")),
    "secret in a trailer": secret(HttpScene(ALLOW, RULES, [do("tls", host=NAME, port=443, sni=NAME, send=(
        f"POST /ok/x HTTP/1.1\r\nHost: {NAME}\r\nTransfer-Encoding: chunked\r\nTrailer: Authorization\r\n\r\n"
        "0\r\nAuthorization: mine\r\n\r\n"))])),
    "secret redirected": secret(curl("-k", "-L", f"https://{NAME}/redirect?https://{ELSE}/ok/x")),
    "secret to another": secret(curl("-H", f"Host: {ELSE}", f"https://{NAME}/ok/x")),
    "secret without tls": secret(curl(f"http://{NAME}/ok/x")),
    "secret without tls, meant": secret(curl(f"http://{NAME}/ok/x"), plain=True),
    "secret inside": secret(HttpScene(ALLOW, RULES, argv=["python3", "-c", LOOK])),
    "secret said back": secret(curl(f"https://{NAME}/ok/{VALUE}", f"https://{NAME}/no/{VALUE}")),
    "placeholder": secret(shell("echo $TOKEN"), placeholder="sk-0000"),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, SeenHttp]:
    return play_http(SCENES, HOSTS, furnish)


def assert_refused(scene: SeenHttp, reason: str) -> dict[str, Any]:
    assert scene.stdout.startswith("HTTP/1.1 403 Refused by the sandbox\r\n"), (scene.stdout, scene.stderr)
    assert scene.requests == []
    event = scene.denied(reason)
    assert (event["proto"], event["port"], event["status"]) == ("https", 443, 403)
    assert len(scene.denials) == 1
    return event


def test_requests_inside_tls_are_judged_and_on_record(seen: dict[str, SeenHttp]) -> None:
    scene = seen["permitted"]
    assert scene.stdout.startswith("HTTP/1.1 200 "), scene.stderr
    assert "GET /ok/x at www" in scene.stdout
    (event,) = scene.events
    assert (event["proto"], event["path"], event["status"]) == ("https", "/ok/x", 200)
    assert event["rule"] == f"GET,POST {NAME} /ok/** inspect"
    flow = scene.one(transport="tcp")
    assert (flow["proto"], flow["sni"], flow["decision"]) == ("https", NAME, "allow")
    assert_refused(seen["path"], "http_path")
    assert_refused(seen["method"], "http_method")


@pytest.mark.parametrize("name", ["fronting", "absolute"])
def test_another_host_inside_tls_is_refused(seen: dict[str, SeenHttp], name: str) -> None:
    event = assert_refused(seen[name], "http_host")
    assert ELSE in event["detail"]


def test_a_client_of_http_2_is_served_in_http_1(seen: dict[str, SeenHttp]) -> None:
    assert seen["http2"].stdout.startswith("HTTP/1.1 200 ")


def test_programs_that_ignore_the_environment_trust_it_too(seen: dict[str, SeenHttp]) -> None:
    assert "GET /ok/x at www" in seen["no environment"].stdout
    scene = seen["other authorities"]
    assert scene.requests == []
    # The client says no by an alert and closes at once: its reset may overtake the alert.
    assert scene.one(transport="tcp")["reason"] in ("tls_rejected", "reset")


def test_the_jail_trusts_the_gateway_and_cannot_change_whom_it_trusts(seen: dict[str, SeenHttp]) -> None:
    lines = seen["trust"].stdout.splitlines()
    assert lines[0] == "6"
    bundle, system, own = (int(line.rpartition(":")[2]) for line in lines[1:4])
    assert own == 1
    assert bundle == system > 10
    authorities, authority, shown = lines[4:7]
    assert authorities == shown != authority
    assert all("Read-only file system" in line or "ermission denied" in line for line in lines[7:9]), lines
    assert lines[9:] == ["end"]


def test_without_inspection_nothing_of_it_is_there(seen: dict[str, SeenHttp]) -> None:
    scene = seen["no trust"]
    lines = scene.stdout.splitlines()
    assert lines[0] == "0"
    assert "/run/sandbox/tls" in scene.stderr
    inside = int(next(line for line in lines if line.startswith("/etc/ssl")).rpartition(":")[2])
    with_ours = int(seen["trust"].stdout.splitlines()[2].rpartition(":")[2])
    assert inside == with_ours - 1


def test_only_hosts_with_inspection_get_a_certificate_of_ours(seen: dict[str, SeenHttp]) -> None:
    text = seen["issuers"].stdout
    ours, theirs = text.split("issuer=")[1:]
    assert "toolcall-sandbox gateway" in ours
    assert f"DNS:{NAME}" in ours
    assert "stand-in authority" in theirs


def test_the_handshake_has_to_name_the_host(seen: dict[str, SeenHttp]) -> None:
    scene = seen["sni"]
    assert [result["ok"] for result in scene.results] == [True, True, False, False, False]
    assert all("HTTP/1.1 200 " in result["text"] for result in scene.results[:2])
    assert len(scene.requests) == 2
    denied = [item["reason"] for item in scene.attempts(transport="tcp", decision="deny")]
    assert denied == ["sni_mismatch", "sni_missing", "not_tls"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("expired", "expired"), ("stranger", "unable to get local issuer"), ("misnamed", "not valid for")],
)
def test_a_server_with_a_bad_certificate_gets_nothing(seen: dict[str, SeenHttp], name: str, says: str) -> None:
    scene = seen[name]
    event = assert_refused(scene, "upstream_certificate")
    assert says in event["detail"]
    assert says in scene.denials[0]
    if name == "expired":
        # Where nobody looks into TLS, what to make of a certificate is the call's own business.
        assert "GET /ok/x at expired" in seen["expired, not looked into"].stdout


def test_a_server_that_is_not_there_is_said_to_be_so(seen: dict[str, SeenHttp]) -> None:
    scene = seen["nobody"]
    assert scene.stdout.startswith("HTTP/1.1 502 ")
    assert "cannot be reached" in scene.stdout
    assert scene.denials == []


# --- secrets


def test_a_secret_is_set_for_its_host(seen: dict[str, SeenHttp]) -> None:
    scene = seen["secret"]
    assert scene.header("authorization") == [f"Bearer {VALUE}"]
    assert VALUE not in scene.stdout


@pytest.mark.parametrize("name", ["secret of the tool's", "secret on the way"])
def test_what_the_tool_says_in_its_place_is_replaced(seen: dict[str, SeenHttp], name: str) -> None:
    assert seen[name].header("authorization") == [f"Bearer {VALUE}"]


def test_no_spelling_of_the_header_and_no_trailer_stands_beside_it(seen: dict[str, SeenHttp]) -> None:
    headers = [pair for pair in seen["secret spelt"].requests[0]["headers"] if "api" in pair[0]]
    assert headers == [["x-api-key", VALUE]]
    scene = seen["secret in a trailer"]
    assert scene.header("authorization") == [f"Bearer {VALUE}"]
    assert "mine" not in json.dumps(scene.requests)


def test_no_other_host_gets_it(seen: dict[str, SeenHttp]) -> None:
    (request,) = seen["secret elsewhere"].requests
    assert request["site"] == "other"
    assert VALUE not in json.dumps(request)
    first, second = seen["secret redirected"].requests
    assert (first["site"], second["site"]) == ("www", "other")
    assert VALUE in json.dumps(first)
    assert VALUE not in json.dumps(second)
    assert_refused(seen["secret to another"], "http_host")


def test_it_is_not_sent_in_the_clear_unless_meant(seen: dict[str, SeenHttp]) -> None:
    scene = seen["secret without tls"]
    assert scene.stdout.startswith("HTTP/1.1 403 ")
    assert scene.requests == []
    assert scene.denied("secret_needs_tls")
    assert seen["secret without tls, meant"].header("authorization") == [f"Bearer {VALUE}"]


def test_inside_there_is_a_placeholder_and_nothing_else(seen: dict[str, SeenHttp]) -> None:
    assert seen["secret inside"].stdout.strip() == "[] placeholder-for-TOKEN", seen["secret inside"].stderr
    assert seen["placeholder"].stdout.strip() == "sk-0000"


def test_it_is_in_no_record_even_when_it_is_said_back(seen: dict[str, SeenHttp]) -> None:
    for name, scene in seen.items():
        command = scene.record.pop("command")
        assert VALUE not in json.dumps([scene.record, scene.denials]), name
        assert VALUE not in json.dumps(command["env_names"])
    scene = seen["secret said back"]
    assert [event["path"] for event in scene.events] == ["/ok/[secret]", "/no/[secret]"]
