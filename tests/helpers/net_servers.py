"""Stand-ins for the outside, in threads of the world's process. Each notes who reached it, by its name."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import queue
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

# IPv6 lets nobody bind what is local by route alone, unless asked this way (ipv6(7)).
_IPV6_FREEBIND = 78
Handler = Callable[[socket.socket, "Outside"], None]


@dataclass
class Arrival:
    """One connection that came to the server `label`, and what it said first."""

    label: str
    first: bytes = b""

    def note(self, data: bytes) -> None:
        self.first = self.first or data[:64]


class Outside:
    """The stand-in servers of one world. `reached`: every connection that came since they were last taken."""

    def __init__(self) -> None:
        self.reached: list[Arrival] = []
        self.queries: list[str] = []
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._open: list[socket.socket] = []
        self._marks: dict[Any, threading.Event] = {}
        self._handled = threading.Condition()
        self._handling = 0

    def serve(self, label: str, address: str, port: int, handler: Handler) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = socket.socket(family, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        server.bind((address, port))
        server.listen(512)
        self._open.append(server)

        def accept() -> None:
            while True:
                try:
                    conn, peer = server.accept()
                except OSError:
                    return
                mark = self._marks.pop(peer, None)
                if mark is not None:
                    conn.close()
                    mark.set()
                    continue
                # Counted here and not by the connection's thread, which may run when the scene is over.
                arrival = Arrival(label)
                self.reached.append(arrival)
                with self._handled:
                    self._handling += 1
                threading.Thread(target=self._handle, args=(arrival, conn, handler), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()

    def _handle(self, arrival: Arrival, conn: socket.socket, handler: Handler) -> None:
        try:
            with conn:
                handler(_Noting(conn, arrival.note), self)  # type: ignore[arg-type]
        except OSError:
            return
        finally:
            with self._handled:
                self._handling -= 1
                self._handled.notify_all()

    def settle(self) -> None:
        """Return when every connection that was made before is in `reached`.

        A server takes its connections in the order in which they were made. So one of ours, last in each line, is taken
        when there are none left before it.
        """
        for server in self._open:
            if server.type != socket.SOCK_STREAM:
                continue
            with socket.socket(server.family, socket.SOCK_STREAM) as last:
                last.bind(("::1" if server.family == socket.AF_INET6 else "127.0.0.1", 0))
                taken = self._marks[last.getsockname()] = threading.Event()
                last.connect(server.getsockname())
                assert taken.wait(30), f"the stand-in at {server.getsockname()} takes no connections"

    def wait_handled(self) -> None:
        """Return when every server is done with all its connections: soon after their other sides have gone."""
        self.settle()
        with self._handled:
            assert self._handled.wait_for(lambda: self._handling == 0, 30), "a connection outlives its call"

    def take_reached(self) -> list[Arrival]:
        """What has arrived since the last time. Nothing that was connected before now shows up in a later one."""
        self.settle()
        found, self.reached = self.reached, []
        return found

    def count(self, label: str) -> int:
        return sum(1 for arrival in list(self.reached) if arrival.label == label)

    def serve_names(self, address: str, answers: Callable[[str, int], list[str]]) -> None:
        """A resolver: `answers(name, how many times it was asked before)` gives addresses of either family."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 53))
        self._open.append(sock)
        asked: dict[tuple[str, int], int] = {}

        def loop() -> None:
            while True:
                try:
                    data, peer = sock.recvfrom(2048)
                except OSError:
                    return
                at, labels = 12, []
                while data[at]:
                    labels.append(data[at + 1 : at + 1 + data[at]].decode())
                    at += data[at] + 1
                (kind,) = struct.unpack_from(">H", data, at + 1)
                name = ".".join(labels)
                self.queries.append(name)
                times = asked.get((name, kind), 0)
                asked[name, kind] = times + 1
                size = {1: 4, 28: 16}.get(kind, 0)
                packed = [ipaddress.ip_address(text).packed for text in answers(name, times)]
                found = [item for item in packed if len(item) == size]
                records = b"".join(b"\xc0\x0c" + struct.pack(">HHIH", kind, 1, 0, size) + item for item in found)
                head = data[:2] + struct.pack(">HHHHH", 0x8180 if packed else 0x8183, 1, len(found), 0, 0)
                sock.sendto(head + data[12 : at + 5] + records, peer)

        threading.Thread(target=loop, daemon=True).start()

    def close(self) -> None:
        for sock in self._open:
            sock.close()


class _Noting:
    """A socket that tells what it received first."""

    def __init__(self, sock: socket.socket, note: Callable[[bytes], None]) -> None:
        self._sock = sock
        self._on_data = note

    def recv(self, size: int) -> bytes:
        data = self._sock.recv(size)
        self._on_data(data)
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def http(conn: socket.socket, _outside: Outside) -> None:
    """One GET after another: `/bytes/N` gives N bytes, anything else its own path."""
    data = b""
    while True:
        while b"\r\n\r\n" not in data:
            chunk = conn.recv(65536)
            if not chunk:
                return
            data += chunk
        head, _, data = data.partition(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        if path.startswith("/bytes/"):
            size = int(path.split("/")[2])
            conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
            send_pattern(conn, size)
        else:
            body = f"you asked for {path}".encode()
            conn.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


def redirect(conn: socket.socket, _outside: Outside) -> None:
    """Sends the client to the URL that its path is."""
    where = conn.recv(65536).split(b" ")[1][1:]
    conn.sendall(b"HTTP/1.1 302 Found\r\nlocation: " + where + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


def send_pattern(conn: socket.socket, size: int) -> None:
    block = pattern_block()
    while size > 0:
        conn.sendall(memoryview(block)[: min(size, len(block))])
        size -= len(block)


def pattern_block() -> bytes:
    return b"".join(hashlib.sha256(struct.pack(">I", n)).digest() for n in range(1 << 15))


def pattern_digest(size: int, head: bytes = b"") -> str:
    block, digest = pattern_block(), hashlib.sha256(head)
    while size > 0:
        digest.update(memoryview(block)[: min(size, len(block))])
        size -= len(block)
    return digest.hexdigest()


def echo(conn: socket.socket, _outside: Outside) -> None:
    while data := conn.recv(65536):
        conn.sendall(data)


def greet(conn: socket.socket, _outside: Outside) -> None:
    """Speaks first, as SSH and SMTP do."""
    conn.sendall(b"SSH-2.0-standin\r\n")
    conn.recv(1024)


def answer_after_end(conn: socket.socket, _outside: Outside) -> None:
    """Reads to the end of file, and only then answers with the digest: what a half-close is for."""
    digest, total = hashlib.sha256(), 0
    while data := conn.recv(65536):
        digest.update(data)
        total += len(data)
    conn.sendall(f"{total} {digest.hexdigest()}".encode())


def reset_at_once(conn: socket.socket, _outside: Outside) -> None:
    conn.recv(1)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conn.close()


def tell_ends(conn: socket.socket, outside: Outside) -> None:
    """To `?` it says how the connection before it ended, which may still be about to: by a reset, or properly."""
    if conn.recv(1) == b"?":
        conn.sendall(outside.ends.get(timeout=20).encode())
        return
    try:
        while conn.recv(65536):
            pass
    except ConnectionResetError:
        outside.ends.put("reset")
    else:
        outside.ends.put("end")


def slow_sink(conn: socket.socket, _outside: Outside) -> None:
    while conn.recv(1024):
        time.sleep(0.05)


def silent(conn: socket.socket, _outside: Outside) -> None:
    """Accepts and says nothing until the other side goes."""
    while conn.recv(65536):
        pass


class Certificates:
    """A throw-away authority and server certificates, for stand-ins that speak TLS.

    `name`: of the directory, where there is more than one. `days`: how long they are good for; negative, were good.
    """

    def __init__(self, name: str = "certificates", days: float = 1) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        # Beside the world's state directory, and gone with the world.
        self._directory = Path(os.environ["SANDBOX_STATE"]).parent / name
        self._directory.mkdir(mode=0o755)
        self._days = days
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"stand-in authority, {name}")])
        self.ca_path = str(self._directory / "ca.pem")
        cert = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self._write("ca.pem", self._sign(cert))

    def _builder(self, subject: Any, key: Any) -> Any:
        from cryptography import x509

        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + timedelta(days=self._days))
        )

    def _sign(self, builder: Any) -> bytes:
        from cryptography.hazmat.primitives import hashes, serialization

        cert: bytes = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        return cert

    def _write(self, name: str, data: bytes) -> str:
        path = self._directory / name
        path.write_bytes(data)
        os.chmod(path, 0o644)
        return str(path)

    def context(self, *names: str, alpn: tuple[str, ...] = ()) -> ssl.SSLContext:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import NameOID

        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        pem = self._sign(self._builder(subject, key.public_key()).add_extension(alternatives, critical=False))
        pem += key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._write(f"{names[0]}.pem", pem))
        if alpn:
            context.set_alpn_protocols(list(alpn))
        return context

    def tls(self, handler: Handler, *names: str) -> Handler:
        """The handler behind TLS with a certificate for `names`."""
        context = self.context(*names)

        def wrapped(conn: socket.socket, outside: Outside) -> None:
            raw = getattr(conn, "_sock", conn)
            with context.wrap_socket(raw, server_side=True) as secure:
                handler(_Noting(secure, conn._on_data), outside)  # type: ignore[attr-defined,arg-type]

        return wrapped
