"""What the egress gateway costs: connect and first byte, throughput, CPU, beside direct loopback and other ways out.

All of it runs in network namespaces of its own, where every address is local: no packet goes to a real host. Run it as
root to see veth; slirp4netns and pasta are measured where they are installed (Debian: slirp4netns, passt).

    python bench/egress.py [--mb 1024] [--json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sandbox._linux import process
from tests.helpers.net_world import run_in_world

TARGET = "93.184.216.34"
NAME = "www.example.test"
CLIENT = r"""
import json, socket, sys, threading, time
host, size = socket.gethostbyname(sys.argv[1]), int(sys.argv[2])
buffer = [bytearray(1 << 20) for _ in range(16)]
def connect(count):
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.connect((host, 7)); sock.send(b"x"); sock.recv(1)
            spent.append(time.perf_counter() - start)
    spent.sort()
    return [spent[len(spent) // 2] * 1e6, spent[len(spent) // 10] * 1e6]
def fetch(index, size):
    with socket.create_connection((host, 80)) as sock:
        sock.sendall(b"%d\n" % size)
        while size > 0:
            got = sock.recv_into(buffer[index])
            if not got: raise SystemExit("cut short")
            size -= got
def rate(flows):
    start = time.perf_counter()
    threads = [threading.Thread(target=fetch, args=(index, size // flows)) for index in range(flows)]
    [thread.start() for thread in threads]; [thread.join() for thread in threads]
    return size / (time.perf_counter() - start) / 1e6
connect(50)
print(json.dumps({"connect_us": connect(500), "one_mb_s": rate(1), "sixteen_mb_s": rate(16)}))
"""


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


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def find_process(word: bytes) -> int:
    """A process of this world, which others on the host are not in."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            here = os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
            if here and word in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        except OSError:
            continue
    return -1


def measured(run: Callable[[], str], relay: Callable[[], int], size: int) -> dict[str, Any]:
    pid = relay()
    before = cpu_s(pid) if pid > 0 else 0.0
    found: dict[str, Any] = json.loads(run())
    if pid > 0:
        found["relay_cpu_s_per_gb"] = (cpu_s(pid) - before) / (2 * size / 1e9)
    return found


def direct(size: int) -> dict[str, Any]:
    argv = [sys.executable, "-c", CLIENT, TARGET, str(size)]
    return measured(lambda: output(argv), lambda: -1, size)


def output(argv: list[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300).stdout


def gateway(size: int) -> dict[str, Any]:
    from sandbox import Sandbox

    settings: dict[str, Any] = {"download_max": "unlimited", "cpus": 16.0, "wall_time": "300s", "memory": "1GiB"}
    with Sandbox("python", allow_hosts=[f"{NAME}:7", f"{NAME}:80"], **settings) as box:
        box.run(["true"])

        def run() -> str:
            outcome = box.run(["python3", "-c", CLIENT, NAME, str(size)])
            assert outcome.ok, outcome.stderr.decode()
            return outcome.text

        return measured(run, lambda: find_process(b"sandbox.egress.gateway"), size)


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


def inside(pid: int, size: int) -> list[str]:
    enter = ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]
    return [*enter, sys.executable, "-c", CLIENT, TARGET, str(size)]


def slirp4netns(size: int) -> dict[str, Any]:
    with other_namespace() as pid:
        argv = ["slirp4netns", "--configure", "--mtu=65520", "--ready-fd=1", str(pid), "tap0"]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as relay:
            assert relay.stdout is not None
            relay.stdout.read(1)
            try:
                return measured(lambda: output(inside(pid, size)), lambda: relay.pid, size)
            finally:
                relay.kill()


def pasta(size: int) -> dict[str, Any]:
    """It copies an interface with a default route, so the world gets one that leads nowhere."""
    for line in (
        "link add out0 type veth peer name out1",
        "link set out0 up",
        "link set out1 up",
        "addr add 192.0.2.2/24 dev out0",
        "route add default via 192.0.2.1 dev out0",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    with other_namespace() as pid:
        argv = [
            "pasta",
            "-f",
            "-q",
            *(["--runas", "0:0"] if os.geteuid() == 0 else []),
            "--config-net",
            "-t",
            "none",
            "-u",
            "none",
            str(pid),
        ]
        with subprocess.Popen(argv, stderr=subprocess.PIPE) as relay:
            time.sleep(1)
            assert relay.poll() is None, relay.stderr.read() if relay.stderr else ""
            try:
                return measured(lambda: output(inside(pid, size)), lambda: relay.pid, size)
            finally:
                relay.kill()


def veth(size: int) -> dict[str, Any]:
    """A pair of interfaces, routed by the kernel; what it takes to judge anything is not in it."""
    with other_namespace() as pid:
        enter = ["nsenter", "-t", str(pid), "-U", "-n", "--preserve-credentials"]
        for line in (
            f"link add v0 type veth peer name v1 netns {pid}",
            "link set v0 up",
            "addr add 10.9.0.1/24 dev v0",
        ):
            subprocess.run(["ip", *line.split()], check=True)
        for line in (
            "link set lo up",
            "link set v1 up",
            "addr add 10.9.0.2/24 dev v1",
            "route add default via 10.9.0.1",
        ):
            subprocess.run([*enter, "ip", *line.split()], check=True)
        return measured(lambda: output(inside(pid, size)), lambda: -1, size)


WAYS: dict[str, tuple[Callable[[int], dict[str, Any]], tuple[str, ...]]] = {
    "direct": (direct, ()),
    "gateway": (gateway, ()),
    "veth": (veth, ("ip", "nsenter", "unshare")),
    "pasta": (pasta, ("pasta", "ip", "nsenter", "unshare")),
    "slirp4netns": (slirp4netns, ("slirp4netns", "nsenter", "unshare")),
}


def measure_all(size: int) -> dict[str, Any]:
    server = multiprocessing.get_context("fork").Process(target=serve, daemon=True)
    server.start()
    time.sleep(0.5)
    found: dict[str, Any] = {}
    for name, (way, programs) in WAYS.items():
        missing = [program for program in programs if shutil.which(program) is None]
        if missing:
            found[name] = {"skipped": f"{', '.join(missing)} not installed"}
            continue
        try:
            found[name] = way(size)
        except (OSError, subprocess.SubprocessError, AssertionError) as error:
            found[name] = {"skipped": str(error)[:200]}
    server.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="bytes of each download, in MB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = run_in_world(lambda: measure_all(options.mb * 1_000_000), {NAME: TARGET})
    if options.json:
        print(json.dumps(found, indent=2))
        return
    print(
        f"{'way':12} {'connect + byte, us (p10)':>26} {'1 flow MB/s':>12} {'16 flows MB/s':>14} {'relay CPU s/GB':>15}"
    )
    for name, row in found.items():
        if "skipped" in row:
            print(f"{name:12} {row['skipped']}")
            continue
        connect = f"{row['connect_us'][0]:.0f} ({row['connect_us'][1]:.0f})"
        relay = f"{row['relay_cpu_s_per_gb']:.2f}" if "relay_cpu_s_per_gb" in row else "-"
        print(f"{name:12} {connect:>26} {row['one_mb_s']:12.0f} {row['sixteen_mb_s']:14.0f} {relay:>15}")


if __name__ == "__main__":
    main()
