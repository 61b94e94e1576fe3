"""Programs that know nothing of the gateway: they work where the manifest names the host, and fail soon elsewhere."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import shutil
import ssl
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.net_servers import Certificates, Outside, echo, greet
from tests.helpers.net_world import OTHER, WEB, run_in_world

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

NAMES = ("www.example.test", "git.example.test", "pypi.example.test")
HOSTS = {**dict.fromkeys(NAMES, WEB), "ssh.example.test": WEB, "evil.test": OTHER}
JAVA = """
import java.net.URI;
import java.net.http.*;
public class Fetch {
  public static void main(String[] args) throws Exception {
    var request = HttpRequest.newBuilder(URI.create(args[0])).build();
    System.out.println(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body());
  }
}
"""
COMMIT = "git -c user.name=t -c user.email=t@example.test commit -q --allow-empty -m two"
CODE = {
    "urllib": "import urllib.request,sys;print(urllib.request.urlopen(sys.argv[1],timeout=20).read().decode())",
    "requests": "import requests,sys;print(requests.get(sys.argv[1],timeout=20).text)",
    "httpx": "import httpx,sys;print(httpx.get(sys.argv[1],timeout=20).text)",
    "aiohttp": """
import aiohttp,asyncio,sys
async def main():
    async with aiohttp.ClientSession() as s, s.get(sys.argv[1]) as r: print(await r.text())
asyncio.run(main())""",
    "websockets": """
import sys
from websockets.sync.client import connect
with connect(sys.argv[1], open_timeout=60) as ws:
    for n in range(100): ws.send(f"message {n}"); assert ws.recv() == f"message {n}"
    ws.send(b"x" * 900000); print(len(ws.recv()), "back")
""",
    "h2": """
const session = require("http2").connect(process.argv[1]); let left = 20, bytes = 0;
session.on("error", e => { console.error(e.message); process.exit(1); });
for (let n = 0; n < 20; n++) {
  const stream = session.request({":path": `/${n}`});
  stream.on("data", data => { bytes += data.length; });
  stream.on("end", () => { if (--left == 0) { console.log(session.alpnProtocol, bytes); session.close(); } });
}""",
    "node": "fetch(process.argv[1]).then(r=>r.text()).then(console.log)",
}


H2_SERVER = """
const [address, pem] = process.argv.slice(1), pair = require("fs").readFileSync(pem);
const server = require("http2").createSecureServer({key: pair, cert: pair});
server.on("stream", stream => { stream.respond({":status": 200}); stream.end("h".repeat(100000)); });
server.listen(8443, address, () => console.log("ready"));
"""


class Files(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_POST(self) -> None:
        self._smart()

    def do_GET(self) -> None:
        if self.path.startswith("/smart/"):
            self._smart()
        else:
            super().do_GET()

    def _smart(self) -> None:
        """git-http-backend(1), by CGI."""
        path, _, query = self.path.partition("?")
        env = {"PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": self.directory, "GIT_HTTP_EXPORT_ALL": "1"}
        env |= {"PATH_INFO": path.removeprefix("/smart"), "QUERY_STRING": query, "REQUEST_METHOD": self.command}
        env |= {"CONTENT_TYPE": self.headers.get("Content-Type", ""), "REMOTE_ADDR": "192.0.2.1", "REMOTE_USER": "t"}
        env |= {"GIT_PROTOCOL": self.headers.get("Git-Protocol", ""), "GIT_CONFIG_GLOBAL": "/dev/null"}
        env |= {"HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", "")}
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        done = subprocess.run(["git", "http-backend"], env=env, input=body, capture_output=True, check=True)
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
        self.send_response(int(headers.pop("Status", "200").split()[0]))
        for name, value in {**headers, "Content-Length": str(len(answer))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)


class World:
    """Stand-in servers with files behind them, and what a client needs to trust them."""

    def __init__(self) -> None:
        self.root = Path(os.environ["SANDBOX_STATE"]).parent / "site"
        self.root.mkdir(mode=0o755)
        self.certificates = Certificates()
        (self.root / "hello").write_text("hello from outside\n")
        (self.root / "big").write_bytes(bytes(range(256)) * 4096 * 8)
        outside = Outside()
        outside.serve("ssh", WEB, 22, greet)
        outside.serve("echo", WEB, 7, echo)
        context = self.certificates.context(*NAMES)
        for port, secure in ((80, None), (443, context)):
            self._serve(WEB, port, secure)
        self._serve(OTHER, 443, self.certificates.context("evil.test"))

    def _serve(self, address: str, port: int, context: ssl.SSLContext | None) -> None:
        handler = functools.partial(Files, directory=str(self.root))
        server = http.server.ThreadingHTTPServer((address, port), handler)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def make_repository(self) -> None:
        """One commit; also over smart HTTP (`/smart/repo.git`), where it may be pushed to."""
        source, bare = str(self.root / "work"), str(self.root / "repo.git")
        env = {"PATH": os.environ["PATH"], "HOME": str(self.root), "GIT_CONFIG_GLOBAL": "/dev/null"}
        env |= {f"GIT_{who}_{what}": "t@example.test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        for argv in (
            ["git", "init", "-q", source],
            ["git", "-C", source, "commit", "-q", "--allow-empty", "-m", "one"],
            ["git", "clone", "-q", "--bare", source, bare],
            ["git", "-C", bare, "update-server-info"],
            ["git", "-C", bare, "config", "http.receivepack", "true"],
        ):
            subprocess.run(argv, check=True, env=env, capture_output=True)

    def log_of_repository(self) -> list[str]:
        argv = ["git", "-C", str(self.root / "repo.git"), "log", "--format=%s"]
        env = {"PATH": os.environ["PATH"], "GIT_CONFIG_GLOBAL": "/dev/null"}
        return subprocess.run(argv, check=True, env=env, capture_output=True, text=True).stdout.split()

    @contextmanager
    def http2(self) -> Iterator[None]:
        """A real HTTP/2 server at port 8443: node's."""
        pem = str(Path(self.certificates.ca_path).with_name(f"{NAMES[0]}.pem"))
        argv = ["node", "-e", H2_SERVER, WEB, pem]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            try:
                yield
            finally:
                server.kill()

    def run(self, argv: list[str], *allow: str, **settings: Any) -> dict[str, Any]:
        from sandbox import Sandbox

        ca = self.certificates.ca_path
        env = dict.fromkeys(("SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "REQUESTS_CA_BUNDLE"), ca)
        env |= {"NODE_EXTRA_CA_CERTS": ca, "PIP_CERT": ca, "GIT_TERMINAL_PROMPT": "0"}
        with Sandbox("shell", wall_time="90s", memory="2GiB", pids=256, read=[os.path.dirname(ca)]) as box:
            outcome = box.run(argv, env=env, allow_hosts=list(allow), **settings)
        return {
            "exit": outcome.exit_code,
            "out": outcome.stdout.decode("utf-8", "replace"),
            "err": outcome.stderr.decode("utf-8", "replace"),
            "denials": list(outcome.denials),
            "network": outcome.record.to_json()["network"],
            "seconds": outcome.record.to_json()["time"]["duration_s"],
        }


def in_world(body: Callable[[World], Any]) -> Any:
    return run_in_world(lambda: body(World()), HOSTS)


def reached(told: dict[str, Any], host: str, port: int) -> list[dict[str, Any]]:
    return [item for item in told["network"] if (item["host"], item["port"], item["decision"]) == (host, port, "allow")]


def test_curl_fetches_over_https_and_not_from_elsewhere() -> None:
    def body(world: World) -> list[Any]:
        fetch = "curl -sS --max-time 20 -o /tmp/big https://www.example.test/big && sha256sum /tmp/big | cut -c1-64"
        elsewhere = "curl -sS --max-time 20 https://evil.test/hello"
        fronted = f"curl -skS --max-time 20 --connect-to evil.test:443:{WEB}:443 https://evil.test/hello"
        pinned = "curl -skS --max-time 20 --connect-to evil.test:443:www.example.test:443 https://evil.test/hello"
        return [
            world.run(["sh", "-c", command], "www.example.test:443") for command in (fetch, elsewhere, fronted, pinned)
        ]

    fetch, elsewhere, fronted, pinned = in_world(body)
    assert fetch["out"].strip() == hashlib.sha256(bytes(range(256)) * 4096 * 8).hexdigest(), fetch
    assert reached(fetch, "www.example.test", 443)[0]["proto"] == "tls"
    assert elsewhere["exit"] == 6, "could not resolve"
    assert fronted["exit"] in (35, 56)
    assert pinned["exit"] in (35, 56)
    assert [item["sni"] for item in pinned["network"] if item["reason"] == "sni_mismatch"] == ["evil.test"]
    assert all(told["seconds"] < 10 for told in (elsewhere, fronted, pinned))


@pytest.mark.needs("git")
def test_git_clones_over_https() -> None:
    def body(world: World) -> list[Any]:
        world.make_repository()
        clone = "git clone -q https://git.example.test/repo.git && git -C repo log --format=%s"
        return [
            world.run(["sh", "-c", clone], "git.example.test:443"),
            world.run(["sh", "-c", clone], "www.example.test:443"),
        ]

    allowed, denied = in_world(body)
    assert allowed["out"].strip() == "one", allowed
    assert denied["exit"] != 0
    assert "git.example.test is not permitted" in denied["denials"][0]


@pytest.mark.needs("git")
def test_git_clones_and_pushes_over_smart_http() -> None:
    def body(world: World) -> list[Any]:
        world.make_repository()
        work = f"git clone -q https://git.example.test/smart/repo.git && cd repo && {COMMIT} && git push -q 2>&1"
        told = [world.run(["sh", "-c", work], f"{name}:443") for name in ("git.example.test", "www.example.test")]
        return [*told, world.log_of_repository()]

    allowed, denied, log = in_world(body)
    assert allowed["exit"] == 0, allowed
    assert log == ["two", "one"]
    assert denied["exit"] != 0
    assert "git.example.test is not permitted" in denied["denials"][0]


@pytest.mark.needs("node")
def test_http_2_passes_untouched_where_nobody_looks_into_it() -> None:
    def body(world: World) -> list[Any]:
        client = ["node", "-e", CODE["h2"]]
        with world.http2():
            return [
                world.run([*client, "https://www.example.test:8443"], "www.example.test:8443/tls"),
                world.run([*client, f"https://{WEB}:8443"], "www.example.test:8443/tls"),
            ]

    allowed, denied = in_world(body)
    assert allowed["out"].split() == ["h2", str(20 * 100_000)], allowed
    (flow,) = reached(allowed, "www.example.test", 8443)
    assert flow["proto"] == "tls"
    assert flow["bytes_in"] > 20 * 100_000
    assert denied["exit"] != 0
    assert denied["network"][-1]["reason"] == "address_not_named"


def test_websockets_pass() -> None:
    if not _importable("websockets"):
        pytest.skip("needs websockets in this interpreter")

    def body(world: World) -> list[Any]:
        from websockets.sync.server import ServerConnection, serve

        def echo_all(ws: ServerConnection) -> None:
            for message in ws:
                ws.send(message)

        server = serve(echo_all, WEB, 8444, ssl=world.certificates.context(*NAMES))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        client = ["python3", "-c", CODE["websockets"]]
        return [
            world.run([*client, f"wss://{name}:8444/"], "www.example.test:8444/tls")
            for name in ("www.example.test", "git.example.test")
        ]

    allowed, denied = in_world(body)
    assert allowed["out"].strip() == "900000 back", allowed
    assert denied["exit"] != 0
    assert "git.example.test is not permitted" in denied["denials"][0]


@pytest.mark.needs("ssh")
def test_ssh_gets_to_the_banner_where_its_port_is_named_and_no_further_through_a_tls_port() -> None:
    def body(world: World) -> list[Any]:
        ssh = ["ssh", "-v", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "StrictHostKeyChecking=no"]
        return [
            world.run([*ssh, "ssh.example.test"], "ssh.example.test:22"),
            world.run([*ssh, "-p", "443", "-N", "-R", "8022:localhost:22", "www.example.test"], "www.example.test:443"),
        ]

    named, tunnel = in_world(body)
    assert "standin" in named["err"], named
    assert named["network"][-1]["proto"] == "ssh"
    assert tunnel["exit"] == 255
    refused = [item for item in tunnel["network"] if item["decision"] == "deny"]
    assert [(item["reason"], item["proto"]) for item in refused] == [("not_tls", "ssh")]
    assert "only TLS is permitted" in tunnel["denials"][0]


@pytest.mark.parametrize("client", ["urllib", "requests", "httpx", "aiohttp"])
def test_python_clients_fetch(client: str) -> None:
    if client != "urllib" and shutil.which("python3") and not _importable(client):
        pytest.skip(f"needs {client} in this interpreter")

    def body(world: World) -> list[Any]:
        argv = ["python3", "-c", CODE[client]]
        return [
            world.run([*argv, "https://www.example.test/hello"], "www.example.test:443"),
            world.run([*argv, "http://www.example.test/hello"], "www.example.test:80"),
            world.run([*argv, "https://evil.test/hello"], "www.example.test:443"),
        ]

    secure, plain, denied = in_world(body)
    assert "hello from outside" in secure["out"], secure
    assert "hello from outside" in plain["out"], plain
    assert denied["exit"] != 0
    assert denied["denials"]


def _importable(name: str) -> bool:
    """As in a jail, which has the interpreter's own packages and none that a variable points to."""
    return (
        subprocess.run([sys.executable, "-I", "-c", f"import {name}"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.needs("node")
def test_node_fetches() -> None:
    def body(world: World) -> list[Any]:
        argv = ["node", "-e", CODE["node"]]
        return [
            world.run([*argv, "https://www.example.test/hello"], "www.example.test:443"),
            world.run([*argv, "https://evil.test/hello"], "www.example.test:443"),
        ]

    allowed, denied = in_world(body)
    assert "hello from outside" in allowed["out"], allowed
    assert denied["exit"] != 0
    assert "evil.test is not permitted" in denied["denials"][0]


@pytest.mark.needs("java")
def test_java_fetches() -> None:
    if shutil.which("javac") is None:
        pytest.skip("needs a JDK: javac is not installed")

    def body(world: World) -> list[Any]:
        source = world.root / "Fetch.java"
        source.write_text(JAVA)
        argv = ["java", "-Xmx256m", "Fetch.java"]
        return [
            world.run(
                ["sh", "-c", f"cp {source} . && {' '.join(argv)} http://{host}/hello"],
                "www.example.test:80",
                read=[os.path.dirname(world.certificates.ca_path), str(world.root)],
            )
            for host in ("www.example.test", "evil.test")
        ]

    allowed, denied = in_world(body)
    assert "hello from outside" in allowed["out"], allowed
    assert denied["exit"] != 0


def test_pip_installs_from_the_index_that_is_named() -> None:
    def body(world: World) -> list[Any]:
        _make_index(world.root)
        pip = "python3 -m pip install -q --no-cache-dir --disable-pip-version-check --retries 0 --target /tmp/there"
        command = f"{pip} --index-url https://pypi.example.test/simple standin && ls /tmp/there"
        return [
            world.run(["sh", "-c", command], "pypi.example.test:443"),
            world.run(["sh", "-c", command], "www.example.test:443"),
        ]

    allowed, denied = in_world(body)
    assert "standin.py" in allowed["out"], allowed
    assert denied["exit"] != 0
    assert any("pypi.example.test is not permitted" in line for line in denied["denials"])


def _make_index(root: Path) -> None:
    """One wheel of one module, as pip wants it."""
    project = root / "simple" / "standin"
    project.mkdir(parents=True)
    name = "standin-1.0-py3-none-any.whl"
    with zipfile.ZipFile(project / name, "w") as wheel:
        wheel.writestr("standin.py", "answer = 42\n")
        info = "standin-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", f"standin.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    (project / "index.html").write_text(f'<html><body><a href="{name}">{name}</a></body></html>')
