"""Checks of limits and of the way out: each is crossed, seen in the ending or as an errno, and kept to in the twin."""

from __future__ import annotations

import json
import time

from sandbox.testing.stage import PRELUDE, TIME_FACTOR, Listener, Stage


def memory(stage: Stage) -> None:
    code = "import mmap\nm = mmap.mmap(-1, {size} << 20)\nfor at in range(0, len(m), 4096): m[at] = 1\nanswer(1)"
    limited = {"memory": "64MiB"}
    done = stage.python(PRELUDE + code.format(size=256), resources=limited)
    assert done.ending.kind == "limit:memory", done
    assert stage.ask(code.format(size=16), resources=limited) == 1


def pids(stage: Stage) -> None:
    code = """
made = []
def fork():
    pid = os.fork()
    if not pid:
        import time; time.sleep(30); os._exit(0)
    made.append(pid)
answer([next((name for _ in range(40) if (name := refusal(fork))), ''), len(made)])
import signal
for pid in made: os.kill(pid, signal.SIGKILL)
"""
    refused, count = stage.ask(code, resources={"pids": 10})
    assert refused == "EAGAIN" and 4 <= count <= 10, f"{refused} after {count} forks"
    refused, count = stage.ask(code, resources={"pids": 64})
    assert (refused, count) == ("", 40), f"{refused} after {count} forks, with room for them"


def wall_time(stage: Stage) -> None:
    started = time.monotonic()
    done = stage.run(["sleep", "60"], resources={"wall_time": "1s"})
    assert done.ending.kind == "limit:wall_time", done
    assert time.monotonic() - started < 15 * TIME_FACTOR
    assert stage.run(["sleep", "0.1"]).ok


def cpu_time(stage: Stage) -> None:
    done = stage.python("while True: pass", resources={"cpu_time": "0.5s"})
    assert done.ending.kind == "limit:cpu_time", done
    assert stage.python("pass", resources={"cpu_time": f"{5 * TIME_FACTOR}s"}).ok


def cpus(stage: Stage) -> None:
    # What the interpreter's own start takes is no part of it: on a slow machine that may be more than all the rest. A
    # kernel of its own inside tells a process's time by what it was given to run in, held back or not; so the host's
    # account counts as well, less what an empty call takes. Where nothing holds, both are near 2 s.
    empty = stage.python("pass", resources={"cpus": 0.2}).record.usage.cpu_usage_s
    code = """
import time
end, began = time.monotonic() + 2, time.process_time()
while time.monotonic() < end: pass
answer(time.process_time() - began)
"""
    done = stage.python(PRELUDE + code, resources={"cpus": 0.2})
    assert done.ok, done.ending
    used = min(json.loads(done.stdout), done.record.usage.cpu_usage_s - empty)
    assert used < 0.2 * 2 + 0.2, f"used {used:.2f} s of CPU in 2 s, with a fifth of a core"
    code = "import time\nwhile time.process_time() < 1: pass"
    assert stage.python(code, resources={"cpus": 1.0}).record.usage.cpu_usage_s > 0.8, (
        "a second of work, counted as less"
    )


def output(stage: Stage) -> None:
    done = stage.python("while True: print('x' * 1000)", resources={"output": "64KiB"})
    assert done.ending.kind == "limit:output" and len(done.stdout) <= 64 << 10, done
    assert len(stage.python("print('x' * 1000)", resources={"output": "64KiB"}).stdout) == 1001


def disk(stage: Stage) -> None:
    code = """
def fill(path, size):
    with open(path, 'wb', buffering=0) as file:
        while size > 0: size -= file.write(bytes(min(size, 1 << 16)))
answer([refusal(fill, '/tmp/x', {0}), refusal(fill, '/workspace/x', {1}), refusal(fill, '/dev/shm/x', {1})])
"""
    found = stage.ask(code.format(16 << 20, 1 << 20), resources={"disk": "8MiB"})
    assert found == ["ENOSPC"] * 3, f"together beyond the disk limit: {found}"
    assert stage.ask(code.format(1 << 20, 1 << 20), resources={"disk": "8MiB"}) == ["", "", ""]


def inodes(stage: Stage) -> None:
    code = "answer(next((n for i in range({0}) if (n := refusal(os.mkdir, f'/tmp/{{i}}'))), ''))"
    assert stage.ask(code.format(200), resources={"inodes": 64}) == "ENOSPC"
    assert stage.ask(code.format(20), resources={"inodes": 64}) == ""


def _limit_of_files() -> list[int]:
    import resource

    return list(resource.getrlimit(resource.RLIMIT_NOFILE))


def open_files(stage: Stage) -> None:
    code = "answer(next((n for _ in range({0}) if (n := refusal(os.dup, 0))), ''))"
    limit = "import resource; answer(resource.getrlimit(resource.RLIMIT_NOFILE))"
    # The smallest that can be asked for is less than what a container's runtime needs for itself.
    for count in (16, 32):
        assert stage.ask(code.format(100), resources={"open_files": count}) == "EMFILE"
        assert stage.ask(limit, resources={"open_files": count}) == [count, count]
    with stage.box(resources={"open_files": 16}) as box:
        assert box.call(_limit_of_files).unwrap() == [16, 16]
    assert stage.ask(code.format(10), resources={"open_files": 32}) == ""


def io(stage: Stage) -> None:
    """A limit on disk traffic is held, or refused: never taken and left."""
    done = stage.run(["true"], resources={"io": "50MiB/s"})
    enforced = done.record.enforcement["io"]
    assert enforced["level"] == "full", enforced


_CONNECT = """
import socket, time
def connect(host, port):
    started = time.monotonic()
    try:
        with socket.create_connection((host, port), 10) as sock: found = sock.recv(5).decode()
    except OSError as error: found = type(error).__name__
    return [found, time.monotonic() - started]
"""


def no_network(stage: Stage) -> None:
    code = _CONNECT + "answer([connect('{0}', {1})])"
    own = """
server = socket.create_server(('127.0.0.1', 0))
with socket.create_connection(server.getsockname(), 5) as client:
    server.accept()[0].send(b'own'); answer(client.recv(3).decode())
"""
    with Listener() as listener:
        found = stage.ask(code.format(listener.host, listener.port))[0]
        assert found[0] != "hello" and listener.greeted == 0, f"reached the host: {found}"
    assert stage.ask(_CONNECT + own) == "own", "the tool cannot talk to itself"


def allowlist(stage: Stage) -> None:
    with Listener() as listener, Listener() as other:
        ports = [listener.port, other.port]
        code = f"{PRELUDE}{_CONNECT}answer([connect({listener.host!r}, port) for port in {ports}])"
        network = {"allow": [f"{listener.host}:{listener.port}"]}
        done = stage.python(code, network=network)
        assert done.ok, done.stderr.decode("utf-8", "replace")[-400:]
        allowed, denied = json.loads(done.stdout)
        assert allowed[0] == "hello" and listener.greeted == 1, f"the allowed host: {allowed}"
        assert denied[0] != "hello" and other.greeted == 0, f"another port: {denied}"
        assert denied[1] < 5 * TIME_FACTOR, f"a refusal took {denied[1]:.1f} s"
        verdicts = sorted(item["decision"] for item in done.record.to_json()["network"])
        assert verdicts == ["allow", "deny"], f"on record: {verdicts}"
        assert done.denials, "nothing is said of the refusal"


def names(stage: Stage) -> None:
    code = """
import socket
def look(name):
    try: return socket.getaddrinfo(name, 443, socket.AF_INET)[0][4][0]
    except OSError as error: return type(error).__name__
answer([look('allowed.example'), look('other.example')])
"""
    allowed, other = stage.ask(code, network={"allow": ["allowed.example:443"]})
    assert allowed.startswith("198.1"), f"an allowed name is {allowed}"
    assert other == "gaierror", f"a name that nobody allowed is {other}"


def no_datagrams(stage: Stage) -> None:
    code = """
import socket
def send(port):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(1); sock.connect(('192.0.2.1', port)); sock.send(b'x'); sock.recv(1)
answer(refusal(send, 9999) or 'answered')
"""
    found = stage.ask(code, network={"allow": ["allowed.example:443"]})
    assert found != "answered", "a datagram was answered"
