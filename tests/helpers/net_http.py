"""HTTP stand-ins and scenes: servers that note every request they get, and calls that send them what the test says."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import h11

from tests.helpers.net_scenes import PROBE, Seen
from tests.helpers.net_servers import Outside
from tests.helpers.net_world import run_in_world

_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Site:
    """One HTTP/1.1 server under a label. What it does goes by the path:

    `/bytes/N` and `/chunked/N` give N bytes; `/close/N` without a length; `/ws` echoes WebSocket frames as they are;
    `/redirect?URL`; `/early` answers before the body; `/continue` sends 100 first; `/raw/...` see RAW; anything else
    says back what it got, but for what the gateway may have added.
    """

    RAW: Mapping[str, bytes] = {
        "/raw/garbage": b"this is no HTTP\r\n\r\n",
        "/raw/two-lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"2\r\nok\r\n0\r\n\r\n",
        "/raw/short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
        "/raw/nothing": b"",
        "/raw/upgrade": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "/raw/hop": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Gone\r\nX-Gone: 1\r\nX-Kept: 1\r\n\r\nok",
    }

    def __init__(self, label: str, requests: list[dict[str, Any]]) -> None:
        self.label = label
        self._requests = requests

    def __call__(self, conn: socket.socket, _outside: Outside) -> None:
        http = h11.Connection(h11.SERVER)
        while True:
            request = _event(conn, http)
            if not isinstance(request, h11.Request):
                return
            path = request.target.decode().partition("?")[0]
            noted = self._note(request)
            if path in self.RAW:
                conn.sendall(self.RAW[path])
                return
            if path == "/ws":
                _echo_frames(conn, http, request)
                return
            if path == "/continue":
                conn.sendall(http.send(h11.InformationalResponse(status_code=100, headers=[])))
            if path == "/early":
                _answer(conn, http, 200, b"early", [])
                return
            digest, size = hashlib.sha256(), 0
            while isinstance(event := _event(conn, http), h11.Data):
                digest.update(event.data)
                size += len(event.data)
            noted.update(body_bytes=size, body_sha256=digest.hexdigest(), complete=isinstance(event, h11.EndOfMessage))
            if not isinstance(event, h11.EndOfMessage):
                return
            self._reply(conn, http, request, noted)
            if http.our_state is not h11.DONE or http.their_state is not h11.DONE:
                return
            http.start_next_cycle()

    def _note(self, request: h11.Request) -> dict[str, Any]:
        noted = {
            "site": self.label,
            "method": request.method.decode(),
            "target": request.target.decode(),
            "headers": [[name.decode(), value.decode("latin-1")] for name, value in request.headers],
        }
        self._requests.append(noted)
        return noted

    def _reply(self, conn: socket.socket, http: h11.Connection, request: h11.Request, noted: dict[str, Any]) -> None:
        path, _, query = request.target.decode().partition("?")
        kind, _, rest = path[1:].partition("/")
        if kind in ("bytes", "chunked", "close"):
            data = blob(int(rest))
            framing = {"bytes": [("Content-Length", rest)], "chunked": [("Transfer-Encoding", "chunked")]}.get(kind)
            headers = framing or [("Connection", "close")]
            if kind == "close":
                conn.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + data)
                http.send_failed()
                return
            _answer(conn, http, 200, b"" if request.method == b"HEAD" else data, headers)
        elif kind == "redirect":
            _answer(conn, http, 302, b"", [("Location", query), ("Content-Length", "0")])
        else:
            said = f"{noted['method']} {noted['target']} at {self.label}, {noted['body_bytes']} bytes\n".encode()
            length = [("Content-Length", str(len(said)))]
            _answer(conn, http, 200, b"" if request.method == b"HEAD" else said, length)


def blob(size: int) -> bytes:
    """The same bytes for the same size, without a short period."""
    seed = hashlib.sha256(str(size).encode()).digest()
    block = b"".join(hashlib.sha256(seed + bytes([index])).digest() for index in range(251))
    return (block * (size // len(block) + 1))[:size]


def _event(conn: socket.socket, http: h11.Connection) -> Any:
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            http.receive_data(conn.recv(65536))
    except h11.RemoteProtocolError:
        return None
    return event


def _answer(conn: socket.socket, http: h11.Connection, status: int, body: bytes, headers: list[Any]) -> None:
    head = http.send(h11.Response(status_code=status, headers=headers))
    for at in range(0, len(body), 1 << 16):
        conn.sendall(head + http.send(h11.Data(data=body[at : at + (1 << 16)])))
        head = b""
    conn.sendall(head + http.send(h11.EndOfMessage()))


def _echo_frames(conn: socket.socket, http: h11.Connection, request: h11.Request) -> None:
    """Accept a WebSocket and send every byte back unmasked: frames of up to 125 bytes, one after another."""
    headers = dict(request.headers)
    if headers.get(b"upgrade") != b"websocket":
        while not isinstance(_event(conn, http), h11.EndOfMessage):
            continue
        _answer(conn, http, 426, b"no upgrade\n", [("Content-Length", "11")])
        return
    accept = base64.b64encode(hashlib.sha1(headers[b"sec-websocket-key"] + _MAGIC, usedforsecurity=False).digest())
    conn.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n"
    )
    data = http.trailing_data[0]
    while True:
        while len(data) < 6 or len(data) < 6 + (data[1] & 0x7F):
            chunk = conn.recv(65536)
            if not chunk:
                return
            data += chunk
        size, mask = data[1] & 0x7F, data[2:6]
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(data[6 : 6 + size]))
        conn.sendall(bytes([data[0], size]) + payload)
        if data[0] & 0x0F == 8:
            return
        data = data[6 + size :]


@dataclass(frozen=True)
class HttpScene:
    """One call: hosts, HTTP rules, and what runs inside. `probe` actions are `net_probe`'s, `argv` anything else."""

    allow: Sequence[str]
    http: Sequence[Any]
    probe: Sequence[Mapping[str, Any]] = ()
    argv: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    box: Mapping[str, Any] = field(default_factory=dict)


class SeenHttp(Seen):
    """What came of one scene. `requests` are those that servers got; `events` the record's lines about requests."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self.stdout: str = data["stdout"]
        self.requests: list[dict[str, Any]] = data["requests"]
        self.record: dict[str, Any] = data["record"]
        self.events = [item for item in self.network or [] if item["transport"] == "http"]

    @property
    def reached_targets(self) -> list[str]:
        return [request["target"] for request in self.requests]

    def header(self, name: str, index: int = 0) -> list[str]:
        """The values of a header of a request that a server got."""
        return [value for key, value in self.requests[index]["headers"] if key == name]

    def denied(self, reason: str) -> dict[str, Any]:
        """The one request that was refused, for this reason."""
        found = [event for event in self.events if event["decision"] == "deny"]
        assert [event["reason"] for event in found] == [reason], self.events
        return found[0]


def play_http(
    scenes: Mapping[str, HttpScene], hosts: Mapping[str, str], furnish: Callable[[Outside, list[Any]], str]
) -> dict[str, SeenHttp]:
    """Play every scene in one world. `furnish` returns the file of the authority behind the servers' certificates."""

    def body() -> Any:
        from sandbox import Sandbox

        outside, requests = Outside(), []  # type: tuple[Outside, list[Any]]
        roots = furnish(outside, requests)
        told = {}
        # One supervisor for all of them.
        with Sandbox("python"):
            for name, scene in scenes.items():
                requests.clear()
                settings = {"extra_roots": [roots], "allow_hosts": scene.allow, "http": scene.http, **scene.box}
                with Sandbox("python", wall_time="60s", **settings) as box:
                    told[name] = _tell(box, scene, outside, requests)
        return told

    return {name: SeenHttp(data) for name, data in run_in_world(body, hosts).items()}


def _tell(box: Any, scene: HttpScene, outside: Outside, requests: list[Any]) -> dict[str, Any]:
    argv = list(scene.argv) or ["python3", "-c", PROBE, json.dumps([dict(action) for action in scene.probe])]
    outcome = box.run(argv, **scene.settings)
    outside.wait_handled()
    record = outcome.record.to_json()
    return {
        "results": json.loads(outcome.stdout) if not scene.argv and outcome.stdout else [],
        "stdout": outcome.stdout.decode("utf-8", "replace"),
        "stderr": outcome.stderr.decode("utf-8", "replace"),
        "ending": outcome.ending.to_json(),
        "denials": list(outcome.denials),
        "network": record["network"],
        "usage": record["usage"],
        "notes": list(record["isolation"]["notes"]),
        "reached": [],
        "requests": list(requests),
        "record": record,
    }
