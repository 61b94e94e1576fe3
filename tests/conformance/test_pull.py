"""`sandbox pull` with a real daemon, and a registry of the tests' own on loopback, slow enough to be watched."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from sandbox.cli.pull import Layers
from tests.helpers import engine as engines

CLI = [sys.executable, "-c", "from sandbox.cli.main import main; main()"]
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
SLOW_S = 2.0


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _image() -> tuple[bytes, dict[str, bytes]]:
    """(manifest, blobs by digest) of an image of one layer."""
    tar = engines.plain_image()
    layer = gzip.compress(tar, 1, mtime=0)
    settings = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [_digest(tar)]},
    }
    config = json.dumps(settings).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "size": len(config),
            "digest": _digest(config),
        },
        "layers": [
            {
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "size": len(layer),
                "digest": _digest(layer),
            }
        ],
    }
    return json.dumps(manifest).encode(), {_digest(config): config, _digest(layer): layer}


@pytest.fixture
def registry() -> Iterator[tuple[str, str]]:
    """(its address, the digest of the one image in it: `one:1`)."""
    manifest, blobs = _image()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            kind, name = self.path.split("/")[-2:]
            if self.path == "/v2/":
                self._answer(200, b"{}", "application/json")
            elif kind == "manifests" and name in ("1", _digest(manifest)) and "/one/" in self.path:
                self._answer(200, manifest, MANIFEST)
            elif kind == "blobs" and name in blobs:
                self._answer(200, blobs[name], "application/octet-stream")
            else:
                self._answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}', "application/json")

        do_HEAD = do_GET

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Docker-Content-Digest", _digest(body))
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(body) // 2
            self.wfile.write(body[:half])
            time.sleep(SLOW_S if len(body) > 100_000 else 0)
            self.wfile.write(body[half:])

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", next(digest for digest in blobs)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_an_image_is_pulled_with_its_progress_on_the_terminal(
    engine: engines.Engine, registry: tuple[str, str]
) -> None:
    address, digest = registry
    screen, terminal = os.openpty()
    env = {**os.environ, "DOCKER_HOST": engine.host, "TERM": "xterm", "COLUMNS": "120"}
    argv = [*CLI, "pull", f"{address}/one:1"]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=terminal) as pulling:
        os.close(terminal)
        seen = b""
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while more := os.read(screen, 65536):
                seen += more
        assert pulling.stdout is not None
        said = pulling.stdout.read().decode()
    os.close(screen)
    assert (pulling.returncode, said) == (0, f"{digest}\n"), seen
    assert f"pulling {address}/one:1: 0 of 1 layers".encode() in seen
    with contextlib.closing(engine.client()) as client:
        assert client.inspect_image(f"{address}/one:1")["Id"] == digest
    # What is not there is said, with our exit status; without a terminal nothing else is.
    argv[-1] = f"{address}/none:1"
    missing = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (missing.returncode, missing.stdout) == (125, "")
    assert "docker: " in missing.stderr
    assert "pulling" not in missing.stderr


def test_layers_are_counted_as_they_come() -> None:
    layers = Layers()
    for status, detail in (
        ("Pulling fs layer", {}),
        ("Downloading", {"current": 1_000_000, "total": 4_000_000}),
        ("Verifying Checksum", {}),
    ):
        layers.take_in({"id": "a", "status": status, "progressDetail": detail})
    layers.take_in({"id": "b", "status": "Already exists"})
    layers.take_in({"status": "Digest: sha256:1"})
    assert str(layers) == "1 of 2 layers, 1.0 of 4.0 MB"
    layers.take_in({"id": "a", "status": "Pull complete"})
    assert str(layers) == "2 of 2 layers, 4.0 of 4.0 MB"
