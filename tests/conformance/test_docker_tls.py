"""TLS that the gateway looks into, for a call under docker: whom the image's programs trust, and what stays outside."""

from __future__ import annotations

import http.server
import ipaddress
import json
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sandbox import Sandbox
from sandbox.testing.stage import own_address
from tests.helpers import engine as engines

pytestmark = [pytest.mark.needs("root", "jail", "python:cryptography")]
ASK = """
import json, os, ssl, sys, urllib.error, urllib.request
def ask(url):
    try:
        with urllib.request.urlopen(url, timeout=20) as answer: return [answer.status, answer.read().decode()]
    except urllib.error.HTTPError as error: return [error.code, json.loads(error.read())["error"]]
    except urllib.error.URLError as error: return [0, type(error.reason).__name__]
def change(path):
    try: open(path, "a").write("x")
    except OSError as error: return error.errno
text = {path: open(path).read() for path in sys.argv[2:] if os.path.exists(path)}
print(json.dumps({
    "allowed": ask(sys.argv[1] + "/ok/x"), "denied": ask(sys.argv[1] + "/no"),
    "changes": [change(path) for path in text], "count": [one.count("BEGIN CERT") for one in text.values()],
    "keys": ["PRIVATE" in one for one in text.values()], "file": os.environ.get("SSL_CERT_FILE"),
}))
"""
BUNDLE = "/run/sandbox/tls/authorities.pem"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, list[str]]]:
    """(address, file of its authority, what it was asked) of a server with TLS on this host's own address."""
    host = own_address()
    certificate = _certificate(tmp_path_factory.mktemp("tls"), host)
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: object) -> None:
            """Nobody reads it."""

    with http.server.ThreadingHTTPServer((host, 0), Handler) as made:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        made.socket = context.wrap_socket(made.socket, server_side=True)
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield f"{host}:{made.server_address[1]}", str(certificate), asked
        finally:
            made.shutdown()
            thread.join()


def _certificate(directory: Path, host: str) -> Path:
    """One that vouches for itself, with its key, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "stand-in")])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(host))]), critical=False)
    )
    encoding = serialization.Encoding.PEM
    text = builder.sign(key, hashes.SHA256()).public_bytes(encoding)
    text += key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = directory / "server.pem"
    path.write_bytes(text)
    return path


def _ask(box: Sandbox, address: str) -> tuple[dict[str, Any], Any]:
    done = box.run(["python3", "-I", "-c", ASK, f"https://{address}", BUNDLE, engines.AUTHORITIES])
    assert done.ok, done.stderr.decode("utf-8", "replace")[-600:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found, done


def test_requests_in_tls_are_judged_and_the_images_programs_trust_the_gateway(
    docker: Callable[..., Sandbox], server: tuple[str, str, list[str]]
) -> None:
    address, authority, asked = server
    host = address.partition(":")[0]
    network = {"allow": [address], "http": [f"GET {host} /ok/** inspect"], "extra_roots": [authority]}
    asked.clear()
    found, done = _ask(docker(network=network), address)
    assert found["allowed"] == [200, "hello"]
    assert found["denied"][0] == 403
    assert asked == ["/ok/x"]
    requests = [item for item in done.record.to_json()["network"] if item["transport"] == "http"]
    verdicts = [(item["path"], item["decision"], item["reason"]) for item in requests]
    assert verdicts == [("/ok/x", "allow", None), ("/no", "deny", "http_path")]
    # The image's own authorities and one more, in the image's own place too, and nobody inside changes them.
    of_image = Path(engines.AUTHORITIES).read_text().count("BEGIN CERT") if os.path.exists(engines.AUTHORITIES) else 0
    assert set(found["count"]) == {of_image + 1}
    assert set(found["changes"]) <= {13, 30}
    assert not any(found["keys"])
    assert found["file"] == BUNDLE


def test_without_inspection_the_image_trusts_whom_it_trusted(
    docker: Callable[..., Sandbox], server: tuple[str, str, list[str]]
) -> None:
    address, _, asked = server
    asked.clear()
    found, _ = _ask(docker(network={"allow": [address]}), address)
    # Nobody has vouched for the server to the image's programs, and nothing stands between them.
    assert found["allowed"] == [0, "SSLCertVerificationError"]
    assert asked == []
    assert found["file"] is None
    assert len(found["count"]) == os.path.exists(engines.AUTHORITIES)
