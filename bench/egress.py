"""What the egress gateway costs, beside direct loopback and other ways out of a namespace, in one interleaved run.

Connect and first byte, throughput with one flow and with sixteen, processor time, and what an allowlist adds to the
start of a call. All of it runs in network namespaces of its own, where every address is local: no packet goes to a real
host. veth + NAT wants root; slirp4netns and pasta are measured where they are installed (`bench/install-peers`).

    python bench/egress.py [--rounds 5] [--mb 512] [--connects 300] [--starts 100] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sandbox._linux import process
from tests.helpers.net_world import run_in_world

TARGET = "93.184.216.34"
NAME = "www.example.test"
LIFETIME_S = 900
PEER, GATE = "10.9.0.2", "10.9.0.1"
# The client measures itself and prints one line: microseconds of every connect, or seconds and own processor time.
CLIENT = r"""
import json, socket, sys, threading, time
host, what, count, size = socket.gethostbyname(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def connect():
    start = time.perf_counter()
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.connect((host, 7)); sock.send(b"x"); sock.recv(1)
        return (time.perf_counter() - start) * 1e6
def fetch(size):
    buffer = bytearray(1 << 20)
    with socket.create_connection((host, 80)) as sock:
        sock.sendall(b"%d\n" % size)
        while size > 0:
            got = sock.recv_into(buffer)
            if not got: raise SystemExit("cut short")
            size -= got
if what == "connect":
    for _ in range(20): connect()
    print(json.dumps([connect() for _ in range(count)]))
else:
    fetch(1 << 20)
    start, used = time.perf_counter(), time.process_time()
    threads = [threading.Thread(target=fetch, args=(size // count,)) for _ in range(count)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    print(json.dumps([time.perf_counter() - start, time.process_time() - used]))
"""


@dataclass(frozen=True)
class Way:
    """One way to the server. `run` starts the client there; `relay_pid` is the process that carries bytes, or 0."""

    name: str
    run: Callable[[list[str]], str]
    relay_pid: int = 0


class Unmeasured(Exception):
    """This way is not there: why."""


def serve() -> None:
    """Port 7 echoes; port 80 sends as many bytes as a line asks for."""
    process.die_with_parent()
    block = bytes(1 << 20)

    def echo(conn: socket.socket) -> None:
        conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := conn.recv(65536):
            conn.sendall(data)

    def send(conn: socket.socket) -> None:
        left = int(conn.recv(64))
        while left > 0:
            conn.sendall(memoryview(block)[: min(left, len(block))])
            left -= len(block)

    def accept(port: int, handle: Callable[[socket.socket], None]) -> None:
        server = socket.create_server((TARGET, port), backlog=512)
        while True:
            threading.Thread(target=closing, args=(handle, server.accept()[0]), daemon=True).start()

    def closing(handle: Callable[[socket.socket], None], conn: socket.socket) -> None:
        with conn:
            try:
                handle(conn)
            except OSError:
                return

    threading.Thread(target=accept, args=(7, echo), daemon=True).start()
    accept(80, send)


def cpu_s(pid: int) -> tuple[float, float]:
    """User and system time of a process, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


def gateway_pid() -> int:
    """The gateway of this world."""
    here = os.stat("/proc/self/ns/net").st_ino
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"sandbox.egress.gateway" in command and os.stat(f"/proc/{pid}/ns/net").st_ino == here:
                return int(pid)
        except OSError:
            continue
    # Another uid's process is not looked into by an ordinary user; then its time is not known.
    return 0


def output(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300).stdout


def direct(_stack: ExitStack) -> Way:
    return Way("direct loopback", lambda words: output([sys.executable, "-c", CLIENT, TARGET, *words]))


SETTINGS: dict[str, Any] = {"download_max": "unlimited", "cpus": 16.0, "wall_time": "300s", "memory": "1GiB"}


def gateway(stack: ExitStack) -> Way:
    from sandbox import Sandbox

    box = stack.enter_context(Sandbox("python", allow_hosts=[f"{NAME}:7", f"{NAME}:80"], **SETTINGS))
    box.run(["true"])

    def run(words: list[str]) -> str:
        outcome = box.run(["python3", "-c", CLIENT, NAME, *words])
        if not outcome.ok:
            raise Unmeasured(outcome.stderr.decode()[-300:])
        return outcome.text

    return Way("this gateway", run, gateway_pid())


@contextmanager
def other_namespace() -> Iterator[int]:
    """The pid of a process that sleeps in a user and network namespace of its own."""
    argv = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo ready; exec sleep 600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        try:
            yield child.pid
        finally:
            child.kill()


@contextmanager
def running(argv: list[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL, **options) as child:
        try:
            yield child
        finally:
            child.kill()


def entering(pid: int) -> list[str]:
    return ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]


def inside(pid: int) -> Callable[[list[str]], str]:
    return lambda words: output([*entering(pid), sys.executable, "-c", CLIENT, TARGET, *words])


def bare_relay(mode: str) -> Callable[[ExitStack], Way]:
    """A relay that does nothing but relay: what is left for any code of ours to cost is seen beside it."""

    def make(stack: ExitStack) -> Way:
        pid = stack.enter_context(other_namespace())
        argv = [sys.executable, str(Path(__file__).with_name("bare_relay.py")), mode, str(pid), TARGET]
        relay = stack.enter_context(running(argv, stdout=subprocess.PIPE))
        assert relay.stdout is not None
        if not relay.stdout.readline():
            raise Unmeasured("the bare relay did not start")
        return Way(f"bare {mode} relay", inside(pid), relay.pid)

    return make


def slirp4netns(stack: ExitStack) -> Way:
    pid = stack.enter_context(other_namespace())
    argv = ["slirp4netns", "--configure", "--mtu=65520", "--ready-fd=1", str(pid), "tap0"]
    relay = stack.enter_context(running(argv, stdout=subprocess.PIPE))
    assert relay.stdout is not None
    if not relay.stdout.read(1):
        raise Unmeasured("slirp4netns did not start")
    return Way("slirp4netns", inside(pid), relay.pid)


def pasta(stack: ExitStack) -> Way:
    """It copies an interface with a default route, so the world gets one that leads nowhere."""
    for line in (
        "link add out0 type veth peer name out1",
        "link set out0 up",
        "link set out1 up",
        "addr add 192.0.2.2/24 dev out0",
        "route add default via 192.0.2.1 dev out0",
    ):
        output(["ip", *line.split()])
    pid = stack.enter_context(other_namespace())
    as_root = ["--runas", "0:0"] if os.geteuid() == 0 else []
    ports = ["-t", "none", "-u", "none"]
    relay = stack.enter_context(running(["pasta", "-f", "-q", *as_root, "--config-net", *ports, str(pid)]))
    time.sleep(1)
    if relay.poll() is not None:
        raise Unmeasured(f"pasta ended with status {relay.returncode}")
    return Way("pasta", inside(pid), relay.pid)


def veth(stack: ExitStack) -> Way:
    """A pair of interfaces and a translated address, all in the kernel; nothing there judges anything."""
    pid = stack.enter_context(other_namespace())
    enter = entering(pid)
    for line in (f"link add v0 type veth peer name v1 netns {pid}", "link set v0 up", f"addr add {GATE}/24 dev v0"):
        output(["ip", *line.split()])
    for line in ("link set lo up", "link set v1 up", f"addr add {PEER}/24 dev v1", f"route add default via {GATE}"):
        output([*enter, "ip", *line.split()])
    for line in (
        "add table ip bench",
        "add chain ip bench input { type nat hook input priority 100 ; }",
        f"add rule ip bench input iifname v0 snat to {GATE}",
    ):
        output(["nft", *line.split()])
    return Way("veth + NAT", inside(pid))


MAKERS: dict[str, tuple[Callable[[ExitStack], Way], tuple[str, ...]]] = {
    "direct loopback": (direct, ()),
    "this gateway": (gateway, ()),
    "bare copy relay": (bare_relay("copy"), ("nsenter", "unshare")),
    "bare splice relay": (bare_relay("splice"), ("nsenter", "unshare")),
    "veth + NAT": (veth, ("ip", "nft", "nsenter", "unshare")),
    "pasta": (pasta, ("pasta", "ip", "nsenter", "unshare")),
    "slirp4netns": (slirp4netns, ("slirp4netns", "nsenter", "unshare")),
}


def make_ways(stack: ExitStack) -> tuple[list[Way], dict[str, str]]:
    """Those that are here, and why the others are not."""
    ways, missing = [], {}
    for name, (make, programs) in MAKERS.items():
        lacking = [program for program in programs if shutil.which(program) is None]
        if lacking:
            missing[name] = f"{', '.join(lacking)} not installed"
            continue
        try:
            ways.append(make(stack))
        except (OSError, subprocess.SubprocessError, Unmeasured) as error:
            missing[name] = str(error)[:200]
    return ways, missing


class Measured:
    """Everybody's numbers, a list of one value per round and kind."""

    def __init__(self, server_pid: int) -> None:
        self.rows: dict[str, dict[str, list[float]]] = {}
        self._server_pid = server_pid

    def round(self, way: Way, options: argparse.Namespace) -> None:
        row = self.rows.setdefault(way.name, {})

        def note(kind: str, value: float) -> None:
            row.setdefault(kind, []).append(value)

        spent, relay, _ = self._metered(way, ["connect", str(options.connects), "0"])
        note("connect_us", statistics.median(spent))
        if way.relay_pid:
            note("relay_us_per_connect", sum(relay) / len(spent) * 1e6)
        size = options.mb * 1_000_000
        for flows in (1, 16):
            (seconds, client_s), relay, server_s = self._metered(way, ["fetch", str(flows), str(size)])
            gb = size / 1e9
            note(f"mb_s_{flows}", size / seconds / 1e6)
            note("cpu_s_per_gb", (client_s + server_s + sum(relay)) / gb)
            if way.relay_pid:
                note("relay_s_per_gb", sum(relay) / gb)
                note("relay_kernel_s_per_gb", relay[1] / gb)

    def _metered(self, way: Way, words: list[str]) -> tuple[list[float], tuple[float, float], float]:
        """What the client says, the relay's user and system time, and the server's time."""
        relay = cpu_s(way.relay_pid) if way.relay_pid else (0.0, 0.0)
        server = sum(cpu_s(self._server_pid))
        said: list[float] = json.loads(way.run(words))
        after = cpu_s(way.relay_pid) if way.relay_pid else (0.0, 0.0)
        return said, (after[0] - relay[0], after[1] - relay[1]), sum(cpu_s(self._server_pid)) - server

    def summary(self) -> dict[str, Any]:
        """Medians, and medians of each round's ratio to direct loopback, which a busy moment leaves alone."""
        base = self.rows["direct loopback"]
        found: dict[str, Any] = {}
        for name, row in self.rows.items():
            found[name] = {kind: statistics.median(values) for kind, values in row.items()}
            for kind in ("connect_us", "mb_s_1", "mb_s_16"):
                ratios = [value / of for value, of in zip(row[kind], base[kind], strict=True)]
                found[name][f"{kind}_to_direct"] = statistics.median(ratios)
        return found


def start_costs(count: int) -> dict[str, float]:
    """Milliseconds of a trivial warm program without and with an allowlist, taken in turns, and what it adds."""
    from sandbox import Sandbox

    with Sandbox("python") as without, Sandbox("python", allow_hosts=[f"{NAME}:80"]) as allowing:
        spent: dict[str, list[float]] = {"without": [], "with": []}
        for turn in range(count + 20):
            for name, box in (("without", without), ("with", allowing)):
                time.sleep(0.05)  # until a standby is parked again
                started = time.perf_counter()
                box.run(["true"])
                if turn >= 20:
                    spent[name].append((time.perf_counter() - started) * 1e3)
    found = {name: statistics.median(values) for name, values in spent.items()}
    # On a busy machine the quickest tenth still tells what the work is, and the median what it waits for.
    quick = {name: statistics.quantiles(values, n=10)[0] for name, values in spent.items()}
    pairs = zip(spent["with"], spent["without"], strict=True)
    added = {"added": statistics.median([one - other for one, other in pairs])}
    return {**found, **added, "added_p10": quick["with"] - quick["without"], "without_p10": quick["without"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    server = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    server.start()
    time.sleep(0.5)
    assert server.pid is not None
    measured = Measured(server.pid)
    with ExitStack() as stack:
        ways, missing = make_ways(stack)
        for _ in range(options.rounds):
            for way in ways:
                measured.round(way, options)
    starts = start_costs(options.starts) if options.starts else {}
    server.kill()
    return {"ways": measured.summary(), "missing": missing, "start_ms": starts, "load": os.getloadavg()}


def show(found: dict[str, Any]) -> None:
    columns = ("connect + byte, us", "1 flow, MB/s", "16 flows, MB/s", "CPU s/GB", "relay s/GB", "of it kernel")
    print("Egress: medians of rounds in turns; in brackets, the median of each round's ratio to direct loopback")
    print(f"{'':18}" + "".join(f"{column:>20}" for column in columns))
    for name, row in found["ways"].items():
        cells = [f"{row['connect_us']:.0f} ({row['connect_us_to_direct']:.1f}x)"]
        cells += [f"{row[kind]:.0f} ({row[f'{kind}_to_direct']:.0%})" for kind in ("mb_s_1", "mb_s_16")]
        cells.append(f"{row['cpu_s_per_gb']:.2f}")
        for kind in ("relay_s_per_gb", "relay_kernel_s_per_gb"):
            cells.append(f"{row[kind]:.2f}" if kind in row else "-")
        print(f"{name:18}" + "".join(f"{cell:>20}" for cell in cells))
    for name, why in found["missing"].items():
        print(f"{name:18}  not measured: {why}")
    if found["start_ms"]:
        start = found["start_ms"]
        print(
            f"start of a warm program: {start['without']:.2f} ms, with an allowlist {start['with']:.2f} ms, "
            f"added {start['added']:+.2f} ms (quickest tenth: {start['added_p10']:+.2f} to {start['without_p10']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mb", type=int, default=512, help="bytes of each download, in MB")
    parser.add_argument("--connects", type=int, default=300, help="connections in each round")
    parser.add_argument("--starts", type=int, default=100, help="calls with and without an allowlist; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    options = parser.parse_args()
    found = run_in_world(lambda: measure(options), {NAME: TARGET}, LIFETIME_S)
    show(found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
