"""HTTP that the gateway reads, plain and inside TLS: what honest programs do with it works, within the budgets."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from tests.helpers.net_http import HttpScene, SeenHttp, Site, blob, play_http
from tests.helpers.net_servers import Certificates, Outside
from tests.helpers.net_world import WEB

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

NAME = "www.example.test"
URL = {"plain": f"http://{NAME}", "inspected": f"https://{NAME}"}
MIB = 1 << 20
BIG = 48 * MIB


def furnish(outside: Outside, requests: list[Any]) -> str:
    certificates = Certificates()
    site = Site("www", requests)
    outside.serve("www", WEB, 80, site)
    outside.serve("www", WEB, 443, certificates.tls(site, NAME))
    return certificates.ca_path


def script(text: str, **settings: Any) -> HttpScene:
    return HttpScene([f"{NAME}:80", f"{NAME}:443"], [f"* {NAME} inspect"], argv=["sh", "-c", text], settings=settings)


def python(text: str, **settings: Any) -> HttpScene:
    argv = ["python3", "-c", text]
    return HttpScene([f"{NAME}:80", f"{NAME}:443"], [f"* {NAME} inspect"], argv=argv, settings=settings)


KEEP_ALIVE = """
import http.client, sys
kind = http.client.HTTPSConnection if {0!r} == "inspected" else http.client.HTTPConnection
conn = kind("www.example.test", timeout=20)
seen = set()
for index in range(300):
    conn.request("POST" if index % 3 == 0 else "GET", f"/{{index}}", body=b"x" * index if index % 3 == 0 else None)
    answer = conn.getresponse()
    seen.add((answer.status, answer.read().split()[1] == f"/{{index}}".encode()))
print(seen)
"""
WEBSOCKET = """
from websockets.sync.client import connect
scheme = "wss" if {0!r} == "inspected" else "ws"
with connect(f"{{scheme}}://www.example.test/ws", compression=None, open_timeout=20) as socket:
    for index in range(50):
        socket.send(f"message {{index}}")
        assert socket.recv(timeout=20) == f"message {{index}}"
print("fine")
"""
PARALLEL = """
import concurrent.futures, hashlib, urllib.request
def fetch(index):
    return hashlib.sha256(urllib.request.urlopen("{1}/bytes/300000", timeout=60).read()).hexdigest()
with concurrent.futures.ThreadPoolExecutor(40) as pool:
    print(set(pool.map(fetch, range(80))))
"""
# Asks for much, reads nothing for a while, goes.
DEAF = """
import socket, ssl, time
sock = socket.create_connection(("www.example.test", 443 if {0!r} == "inspected" else 80), timeout=20)
if {0!r} == "inspected":
    sock = ssl.create_default_context().wrap_socket(sock, server_hostname="www.example.test")
sock.sendall(b"GET /bytes/100000000 HTTP/1.1\\r\\nHost: www.example.test\\r\\n\\r\\n")
sock.recv(1)
time.sleep(1.5)
"""
# Many requests that never come to an end, and beside them some that do.
SLOWLORIS = """
import socket, ssl, time, urllib.request
held = []
for _ in range(100):
    sock = socket.create_connection(("www.example.test", 443 if {0!r} == "inspected" else 80), timeout=20)
    if {0!r} == "inspected":
        sock = ssl.create_default_context().wrap_socket(sock, server_hostname="www.example.test")
    sock.sendall(b"GET /slow HTTP/1.1\\r\\nHost: www.example.test\\r\\nX-Slow: ")
    held.append(sock)
for turn in range(10):
    print(len(urllib.request.urlopen("{1}/bytes/1000", timeout=20).read()))
    for sock in held: sock.sendall(b"x")
"""
EARLY = """
import http.client
kind = http.client.HTTPSConnection if {0!r} == "inspected" else http.client.HTTPConnection
conn = kind("www.example.test", timeout=20)
conn.putrequest("POST", "/early"); conn.putheader("Content-Length", "50000000"); conn.endheaders()
print(conn.getresponse().read())
"""
SCENES = {
    f"{name} {how}": scene
    for how, url in URL.items()
    for name, scene in {
        "keep-alive": python(KEEP_ALIVE.format(how)),
        "big": script(f"curl -sS {url}/bytes/{BIG} | sha256sum", memory="1GiB"),
        "chunked down": script(f"curl -sS {url}/chunked/{3 * MIB} | sha256sum"),
        "close down": script(f"curl -sS {url}/close/{3 * MIB} | sha256sum"),
        "chunked up": script(f"head -c {20 * MIB} /dev/zero | curl -sS -T - {url}/put", upload_max="30MiB"),
        "sized up": script(f"head -c {5 * MIB} /dev/zero > f; curl -sS -T f {url}/put"),
        "continue": script(f"head -c 1000 /dev/zero > f; curl -sSv -H 'Expect: 100-continue' -T f {url}/continue"),
        "early": python(EARLY.format(how)),
        "head": script(f"curl -sS -I {url}/bytes/12345"),
        "old": script(f"curl -sS -0 -i {url}/chunked/1000 | head -c 60"),
        "websocket": python(WEBSOCKET.format(how)),
        "parallel": python(PARALLEL.format(how, url), pids=128),
        "slowloris": python(SLOWLORIS.format(how, url)),
        "deaf": python(DEAF.format(how)),
        "download budget": script(f"curl -sS -o /dev/null {url}/bytes/{5 * MIB}", download_max="1MiB"),
        "upload budget": script(f"head -c {5 * MIB} /dev/zero | curl -sS -T - {url}/put", upload_max="1MiB"),
        "rate": script(f"curl -sS -o /dev/null -w '%{{time_total}}' {url}/bytes/{2 * MIB}", network_rate="1MiB/s"),
        "nothing": python(f"import socket; socket.create_connection(({NAME!r}, {443 if how == 'inspected' else 80}))"),
    }.items()
}


@pytest.fixture(scope="module")
def seen() -> dict[str, SeenHttp]:
    return play_http(SCENES, {NAME: WEB}, furnish)


How = pytest.mark.parametrize("how", URL)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@How
def test_many_requests_on_one_connection(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"keep-alive {how}"]
    assert scene.stdout.strip() == "{(200, True)}", scene.stderr
    assert (scene.usage["network_attempts"], scene.usage["network_requests"]) == (1, 300)
    assert sum(event.get("count", 1) for event in scene.events) == 300
    assert len(scene.requests) == 300


@How
@pytest.mark.parametrize(("name", "size"), [("big", BIG), ("chunked down", 3 * MIB), ("close down", 3 * MIB)])
def test_bodies_come_in_whole(seen: dict[str, SeenHttp], how: str, name: str, size: int) -> None:
    scene = seen[f"{name} {how}"]
    assert scene.stdout.split()[0] == sha256(blob(size)), scene.stderr
    assert scene.events[0]["bytes_in"] >= size


@How
@pytest.mark.parametrize(("name", "size"), [("chunked up", 20 * MIB), ("sized up", 5 * MIB)])
def test_bodies_go_out_whole(seen: dict[str, SeenHttp], how: str, name: str, size: int) -> None:
    scene = seen[f"{name} {how}"]
    (request,) = scene.requests
    assert (request["body_bytes"], request["body_sha256"]) == (size, sha256(bytes(size))), scene.stderr
    assert bool(scene.header("transfer-encoding")) == (name == "chunked up")
    assert scene.events[0]["bytes_out"] >= size


@How
def test_a_body_waits_for_the_server_to_want_it(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"continue {how}"]
    assert scene.header("expect") == ["100-continue"]
    assert scene.requests[0]["body_bytes"] == 1000
    assert "HTTP/1.1 100" in scene.stderr


@How
def test_an_answer_may_come_before_the_body(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"early {how}"]
    assert scene.stdout.strip() == "b'early'", scene.stderr
    assert scene.events[0]["status"] == 200


@How
def test_head_has_the_length_and_no_body(seen: dict[str, SeenHttp], how: str) -> None:
    assert "content-length: 12345" in seen[f"head {how}"].stdout.lower()


@How
def test_a_client_of_http_1_0_gets_no_chunks(seen: dict[str, SeenHttp], how: str) -> None:
    text = seen[f"old {how}"].stdout.lower()
    assert text.startswith("http/1.1 200")
    assert "chunked" not in text


@How
def test_websockets_work(seen: dict[str, SeenHttp], how: str) -> None:
    if "No module named" in seen[f"websocket {how}"].stderr:
        pytest.skip("needs websockets in this interpreter")
    scene = seen[f"websocket {how}"]
    assert scene.stdout.strip() == "fine", scene.stderr
    (event,) = scene.events
    assert (event["method"], event["path"], event["status"]) == ("GET", "/ws", 101)
    assert event["bytes_out"] > 50 * len("message 1")


@How
def test_many_connections_at_once(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"parallel {how}"]
    assert scene.stdout.strip() == str({sha256(blob(300000))}), scene.stderr
    assert scene.usage["network_requests"] == 80


@How
def test_a_reader_that_does_not_read_holds_the_server_up(seen: dict[str, SeenHttp], how: str) -> None:
    """What the gateway and both kernels buffer is some megabytes, however much there is."""
    scene = seen[f"deaf {how}"]
    assert 0 < scene.usage["network_bytes_in"] < 24 * MIB


@How
def test_requests_that_never_end_hold_up_no_others(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"slowloris {how}"]
    assert scene.stdout.split() == ["1000"] * 10, scene.stderr
    assert [request["target"] for request in scene.requests] == ["/bytes/1000"] * 10
    assert sum(item.get("count", 1) for item in scene.attempts(transport="tcp")) >= 101


@How
def test_budgets_are_exact(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"download budget {how}"]
    assert scene.usage["network_bytes_in"] == MIB
    flow = scene.one(transport="tcp", decision="deny")
    assert (flow["reason"], flow["detail"]) == ("budget", "download_max")
    scene = seen[f"upload budget {how}"]
    assert scene.usage["network_bytes_out"] == MIB
    flow = scene.one(transport="tcp", decision="deny")
    assert (flow["reason"], flow["detail"]) == ("budget", "upload_max")
    assert all(request.get("body_bytes", 0) < MIB for request in scene.requests)


@How
def test_the_rate_holds(seen: dict[str, SeenHttp], how: str) -> None:
    assert 1.2 < float(seen[f"rate {how}"].stdout) < 10


@How
def test_a_look_at_the_port_is_no_denial(seen: dict[str, SeenHttp], how: str) -> None:
    scene = seen[f"nothing {how}"]
    assert scene.one(transport="tcp")["reason"] == "no_data"
    assert scene.denials == []
