"""What runs inside the jail in network tests: does what its argument says, prints one JSON line.

Only the standard library; its text is passed to `python3 -c`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import socket
import ssl
import struct
import sys
import time
import urllib.error
import urllib.request


def name(number):
    return errno.errorcode.get(number, str(number))


def code(error):
    if isinstance(error, socket.gaierror):
        return "EAI_NONAME" if error.errno in (socket.EAI_NONAME, socket.EAI_NODATA) else f"EAI {error.errno}"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLError):
        return f"ssl:{error.reason}"
    return name(error.errno)


def read_all(sock, limit=1 << 40):
    chunks, total, digest = [], 0, hashlib.sha256()
    while total < limit:
        data = sock.recv(1 << 18)
        if not data:
            break
        total += len(data)
        digest.update(data)
        if sum(map(len, chunks)) < 4096:
            chunks.append(data)
    return {"text": b"".join(chunks)[:4096].decode("latin-1"), "bytes": total, "sha256": digest.hexdigest()}


def tcp(
    host, port, send="", half_close=False, read=True, timeout=10, chunks=None, pause=0.0, once=False, size=0, family=0
):
    if family:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        host = socket.getaddrinfo(host, port, kind)[0][4][0]
    sock = socket.create_connection((host, port), timeout=timeout)
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in chunks or [send or "x" * size]:
            sock.sendall(piece.encode("latin-1"))
            time.sleep(pause)
        if half_close:
            sock.shutdown(socket.SHUT_WR)
        if once:
            return {"text": sock.recv(65536).decode("latin-1")}
        return read_all(sock) if read else {}


def abort(host, port):
    """Say something and go with a reset."""
    with socket.create_connection((host, port), timeout=10) as sock:
        sock.sendall(b"x")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return {}


def sip(host, port, send):
    """Read everything a little at a time, through a small buffer."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(20)
        sock.connect((host, port))
        sock.sendall(send.encode())
        sock.shutdown(socket.SHUT_WR)
        digest, total = hashlib.sha256(), 0
        while data := sock.recv(16384):
            total += len(data)
            digest.update(data)
            time.sleep(0.002)
    return {"bytes": total, "sha256": digest.hexdigest()}


def tls(host, port, sni=None, send="", timeout=10, address=None, pieces=0, once=True):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    raw = socket.create_connection((address or host, port), timeout=timeout)
    with raw:
        if pieces:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return in_pieces(context, raw, sni, send, pieces)
        with context.wrap_socket(raw, server_hostname=sni) as sock:
            sock.sendall(send.encode())
            return {"text": sock.recv(65536).decode("latin-1"), "version": sock.version()}


def in_pieces(context, raw, sni, send, pieces):
    """A handshake whose first flight goes out a few bytes at a time."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=sni)
    first = True
    while True:
        try:
            client.do_handshake()
            break
        except ssl.SSLWantReadError:
            data = outgoing.read()
            step = pieces if first else len(data) or 1
            for at in range(0, len(data), step):
                raw.sendall(data[at : at + step])
                time.sleep(0.01 if first else 0)
            first = False
            received = raw.recv(65536)
            if not received:
                raise ConnectionResetError(errno.ECONNRESET, "closed") from None
            incoming.write(received)
    client.write(send.encode())
    raw.sendall(outgoing.read())
    while True:
        try:
            return {"text": client.read(65536).decode("latin-1")}
        except ssl.SSLWantReadError:
            incoming.write(raw.recv(65536))


def follow(url):
    """Fetch it and go where it sends us, as every client does."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return {"text": reply.read().decode("latin-1")}
    except urllib.error.URLError as error:
        raise error.reason from None


def udp(host, port, send="x", timeout=3):
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(infos[0][0], socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        sock.connect(infos[0][4])
        sock.send(send.encode("latin-1"))
        return {"text": sock.recv(65536).decode("latin-1")}


def lookup(host):
    return {"addresses": sorted({info[4][0] for info in socket.getaddrinfo(host, 443)})}


def dns(server, host, kind=1, over="udp"):
    packed = b"".join(bytes((len(part),)) + part.encode() for part in host.split(".")) + b"\0"
    query = struct.pack(">HHHHHH", 99, 0x100, 1, 0, 0, 0) + packed + struct.pack(">HH", kind, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    if over == "udp":
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(5)
            sock.sendto(query, (server, 53))
            reply, source = sock.recvfrom(4096)
    else:
        with socket.create_connection((server, 53), timeout=5) as sock:
            sock.sendall(struct.pack(">H", len(query)) + query)
            (size,) = struct.unpack(">H", sock.recv(2))
            reply, source = sock.recv(size), (server, 53)
    code_, answers = struct.unpack_from(">H", reply, 2)[0] & 15, struct.unpack_from(">H", reply, 6)[0]
    return {"code": code_, "answers": answers, "from": source[0]}


def ask_many(server, pattern, count):
    """One question after another, each for a name of its own; counts of the codes of the answers."""
    codes = {}
    for number in range(count):
        code_ = str(dns(server, pattern.format(number))["code"])
        codes[code_] = codes.get(code_, 0) + 1
    return codes


def make(family, kind, protocol=0):
    with socket.socket(getattr(socket, family), getattr(socket, kind), protocol):
        return {}


def flood(host, port, count, hold=False, send=""):
    """Many connections, one after another or held open; counts of how they ended."""
    ends, held = {}, []
    for _ in range(count):
        try:
            sock = socket.create_connection((host, port), timeout=10)
            if send:
                sock.sendall(send.encode())
            if hold:
                held.append(sock)
                end = "open"
            else:
                end = "data" if sock.recv(1) else "eof"
                sock.close()
        except OSError as error:
            end = code(error)
        ends[end] = ends.get(end, 0) + 1
    for sock in held:
        try:
            sock.settimeout(15)
            end = "held data" if sock.recv(1) else "held eof"
        except OSError as error:
            end = f"held {code(error)}"
        ends[end] = ends.get(end, 0) + 1
        sock.close()
    return ends


def own_server(address, port):
    """The tool's own server on its own address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, port), family=family)
    with server, socket.create_connection((address, port), timeout=5) as client:
        conn, _ = server.accept()
        with conn:
            conn.sendall(b"mine")
            return {"text": client.recv(10).decode()}


def leave(host, port, size=0, count=1):
    """Connect, say something, and end without waiting for anything. The rest of the actions is not done."""
    for _ in range(count):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex((socket.gethostbyname(host), port))
        if size:
            sock.setblocking(True)
            sock.sendall(b"x" * size)
    print("[]", flush=True)
    import os

    os._exit(0)


def main():
    results = []
    for action in json.loads(sys.argv[1]):
        what = action.pop("do")
        started = time.monotonic()
        try:
            result = {"ok": True, **globals()[what](**action)}
        except OSError as error:
            result = {"ok": False, "error": code(error)}
        result["seconds"] = round(time.monotonic() - started, 3)
        results.append(result)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
