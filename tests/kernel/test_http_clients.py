"""Real programs whose TLS is looked into: they work without being told, and what the rules do not name is refused."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.helpers.net_world import run_in_world
from tests.kernel import test_egress_clients as clients

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

WWW, GIT, PYPI = clients.NAMES
CODE = clients.CODE


class World(clients.World):
    """The same servers; the gateway knows their authority, and the call is told nothing of any."""

    def run(self, argv: list[str], *http: str, **settings: Any) -> dict[str, Any]:
        from sandbox import Sandbox

        allow = [f"{name}:{port}" for name in clients.NAMES for port in (80, 443)]
        options = {"wall_time": "90s", "memory": "2GiB", "pids": 256, "extra_roots": [self.certificates.ca_path]}
        with Sandbox("shell", allow_hosts=allow, http=list(http), **options) as box:
            outcome = box.run(argv, env={"GIT_TERMINAL_PROMPT": "0"}, **settings)
        record = outcome.record.to_json()
        return {
            "exit": outcome.exit_code,
            "out": outcome.stdout.decode("utf-8", "replace"),
            "err": outcome.stderr.decode("utf-8", "replace"),
            "denials": list(outcome.denials),
            "requests": [item for item in record["network"] if item["transport"] == "http"],
        }


def in_world(body: Callable[[World], Any]) -> Any:
    return run_in_world(lambda: body(World()), clients.HOSTS)


def refused(told: dict[str, Any]) -> list[str]:
    return [item["path"] for item in told["requests"] if item["decision"] == "deny"]


def test_curl_downloads() -> None:
    def body(world: World) -> list[Any]:
        fetch = f"curl -sS --max-time 30 https://{WWW}/big | sha256sum | cut -c1-64"
        return [world.run(["sh", "-c", fetch], f"GET {WWW} {path} inspect") for path in ("/big", "/hello")]

    allowed, denied = in_world(body)
    assert allowed["out"].strip() == hashlib.sha256(bytes(range(256)) * 4096 * 8).hexdigest(), allowed
    assert refused(denied) == ["/big"]


@pytest.mark.parametrize("client", ["urllib", "requests", "httpx", "aiohttp"])
def test_python_clients_fetch(client: str) -> None:
    if client != "urllib" and not _importable(client):
        pytest.skip(f"needs {client} in this interpreter")

    def body(world: World) -> list[Any]:
        argv = ["python3", "-c", CODE[client]]
        urls = (f"https://{WWW}/hello", f"http://{WWW}/hello", f"https://{WWW}/big")
        return [world.run([*argv, url], f"GET {WWW} /hello inspect") for url in urls]

    secure, plain, denied = in_world(body)
    assert "hello from outside" in secure["out"], secure
    assert "hello from outside" in plain["out"], plain
    assert refused(denied) == ["/big"]
    assert "Retrying will not help" in denied["denials"][0]


def _importable(name: str) -> bool:
    return subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


@pytest.mark.needs("node")
def test_node_fetches() -> None:
    def body(world: World) -> list[Any]:
        argv = ["node", "-e", CODE["node"]]
        return [world.run([*argv, f"https://{WWW}{path}"], f"GET {WWW} /hello inspect") for path in ("/hello", "/big")]

    allowed, denied = in_world(body)
    assert "hello from outside" in allowed["out"], allowed
    # An answer like any other, which says why: nobody has to guess at a broken connection.
    assert '"reason": "http_path"' in denied["out"]


@pytest.mark.needs("git")
def test_git_clones_what_is_named() -> None:
    def body(world: World) -> list[Any]:
        world.make_repository()
        clone = f"git clone -q https://{GIT}/repo.git && git -C repo log --format=%s"
        return [
            world.run(["sh", "-c", clone], f"GET {GIT} {path} inspect") for path in ("/repo.git/**", "/other.git/**")
        ]

    allowed, denied = in_world(body)
    assert allowed["out"].strip() == "one", allowed
    assert denied["exit"] != 0
    assert refused(denied) == ["/repo.git/info/refs"]


@pytest.mark.needs("git")
def test_git_may_read_a_repository_and_not_write_it() -> None:
    def body(world: World) -> list[Any]:
        world.make_repository()
        work = f"git clone -q https://{GIT}/smart/repo.git && cd repo && {clients.COMMIT} && git push -q 2>&1"
        reading = (
            f"GET {GIT} /smart/repo.git/info/refs inspect",
            f"POST {GIT} /smart/repo.git/git-upload-pack inspect",
        )
        first = world.run(["sh", "-c", work], *reading)
        before = world.log_of_repository()
        return [
            first,
            before,
            world.run(["sh", "-c", work], *reading, f"POST {GIT} /smart/repo.git/git-receive-pack inspect"),
            world.log_of_repository(),
        ]

    reader, before, writer, after = in_world(body)
    assert refused(reader) == ["/smart/repo.git/git-receive-pack"], reader
    assert before == ["one"]
    assert writer["exit"] == 0, writer
    assert after == ["two", "one"]


def test_pip_installs_from_the_part_of_an_index_that_is_named() -> None:
    def body(world: World) -> list[Any]:
        clients._make_index(world.root)
        pip = "python3 -m pip install -q --no-cache-dir --disable-pip-version-check --retries 0 --target /tmp/there"
        command = f"{pip} --index-url https://{PYPI}/simple standin && ls /tmp/there"
        return [world.run(["sh", "-c", command], f"GET {PYPI} /simple/{part}/** inspect") for part in ("standin", "x")]

    allowed, denied = in_world(body)
    assert "standin.py" in allowed["out"], allowed
    assert denied["exit"] != 0
    assert refused(denied) == ["/simple/standin/"]


@pytest.mark.needs("java")
def test_java_fetches() -> None:
    if shutil.which("javac") is None:
        pytest.skip("needs a JDK: javac is not installed")

    def body(world: World) -> list[Any]:
        source = world.root / "Fetch.java"
        source.write_text(clients.JAVA)
        rule, read = f"GET {WWW} /hello inspect", [str(world.root)]
        command = f"cp {source} .; java -Xmx256m Fetch.java https://{WWW}"
        return [world.run(["sh", "-c", f"{command}{path}"], rule, read=read) for path in ("/hello", "/big")]

    allowed, denied = in_world(body)
    assert "hello from outside" in allowed["out"], allowed
    assert '"reason": "http_path"' in denied["out"]
