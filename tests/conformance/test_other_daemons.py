"""Daemons of kinds that will not do, as a call meets them: stand-ins that answer /version and /info as those do."""

from __future__ import annotations

import http.server
import json
import os
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import Sandbox

pytestmark = [pytest.mark.needs("root", "jail", "python:docker", "python:tenacity")]
LINUX: dict[str, Any] = {
    "OSType": "linux",
    "KernelVersion": os.uname().release,
    "SecurityOptions": ["name=seccomp,profile=default"],
    "MemoryLimit": True,
    "PidsLimit": True,
    "CpuCfsQuota": True,
}
# Of a Docker Desktop 4.30 on macOS: a Linux of its own in a virtual machine.
DESKTOP = {"KernelVersion": "6.6.26-linuxkit", "OperatingSystem": "Docker Desktop", "Name": "docker-desktop"}
ROOTLESS = {"SecurityOptions": ["name=seccomp,profile=builtin", "name=rootless", "name=cgroupns"]}
REMAPPED = {"SecurityOptions": ["name=seccomp,profile=builtin", "name=userns"]}


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


@pytest.fixture
def daemon(request: pytest.FixtureRequest, short_path: Path) -> Iterator[tuple[str, list[str]]]:
    """(its address, the requests that it got) of a stand-in whose /info is the test's parameter over `LINUX`."""
    asked: list[str] = []
    answers: dict[str, Any] = {
        "containers/json": [],
        "version": {"ApiVersion": "1.45", "MinAPIVersion": "1.24"},
        "info": {**LINUX, **request.param},
    }

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            name = "/".join(self.path.partition("?")[0].split("/")[2:]) or "version"
            body = json.dumps(answers.get(name, {"message": "No such image: x"})).encode()
            self.send_response(200 if name in answers else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def address_string(self) -> str:
            return "local"

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with _Server(str(short_path / "docker.sock"), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"unix://{short_path}/docker.sock", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("daemon", "says"),
    [
        pytest.param(DESKTOP, "it runs on another kernel", id="Docker Desktop"),
        pytest.param(ROOTLESS, "it is rootless", id="rootless"),
        pytest.param(REMAPPED, "userns-remap", id="userns-remap"),
        # The twin: what is asked of a daemon that will do comes next.
        pytest.param({}, "No such image", id="this host's"),
    ],
    indirect=["daemon"],
)
def test_a_daemon_that_will_not_do_is_refused_by_name_and_makes_nothing(
    daemon: tuple[str, list[str]], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = daemon
    monkeypatch.setenv("DOCKER_HOST", address)
    with Sandbox({"isolation": {"launcher": "docker", "image": "x"}}, state=tmp_path) as box:
        done = box.run(["true"])
    assert (done.ending.kind, done.ending.fault) == ("launch_error", "host")
    assert says in done.ending.message
    assert not [path for path in asked if "/containers/create" in path]
    assert any("/images/" in path for path in asked) == (says == "No such image")


@pytest.mark.needs("runsc")
@pytest.mark.parametrize(
    ("daemon", "says"),
    [
        pytest.param({"Runtimes": {"runc": {}}}, "knows no runtime 'runsc'", id="not registered"),
        pytest.param(
            {"Runtimes": {"runsc": {"runtimeArgs": ["--network=none"]}}}, "--oci-seccomp", id="told too little"
        ),
    ],
    indirect=["daemon"],
)
def test_gvisor_that_is_not_told_enough_is_refused_with_the_line_to_write(
    daemon: tuple[str, list[str]], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, asked = daemon
    monkeypatch.setenv("DOCKER_HOST", address)
    isolation = {"launcher": "docker", "runtime": "runsc", "image": "x", "best_effort": ["pids"]}
    with Sandbox({"isolation": isolation}, state=tmp_path) as box:
        done = box.run(["true"])
    assert (done.ending.kind, done.ending.fault) == ("launch_error", "host")
    assert says in done.ending.message
    assert '"--host-fifo=open"' in done.ending.message
    assert not [path for path in asked if "/images/" in path or "/containers/create" in path]
