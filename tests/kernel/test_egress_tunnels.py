"""Tunnels that people really use, from the distribution: they work in the world, and lead nowhere from a jail in it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.net_scenes import PROBE, do
from tests.helpers.net_servers import Outside, greet
from tests.helpers.net_world import OTHER, WEB, run_in_world
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.needs("root", "userns")

ZONE = "tunnel.example.test"
HOSTS = {"www.example.test": WEB}
# Both ends want a tun device, and stop before they have said a word where there is none. They get a socket instead,
# inside and outside alike, so that it is the network that decides.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int), pair[2];
    va_end(rest);
    if (strncmp(path, "/dev/net/tun", 12) == 0) return socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) ? -1 : pair[0];
    return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open"))(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return open(path, flags, mode);
}
int ioctl(int fd, unsigned long request, ...) { return 0; }
int system(const char *command) { return 0; }
uid_t getuid(void) { return 0; }
uid_t geteuid(void) { return 0; }
"""
IODINE = ["timeout", "8", "iodine", "-f", "-r", "-P", "pw", OTHER, ZONE]
UP = "Connection setup complete"


@contextmanager
def running(argv: list[str], **options: Any) -> Iterator[None]:
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(argv, **quiet, **options) as child:
        try:
            yield
        finally:
            child.kill()


def environment(**more: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", **more}


def plainly(argv: list[str], env: dict[str, str]) -> str:
    """In the world, without a jail."""
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout + done.stderr


def iodine() -> dict[str, Any]:
    from sandbox import Sandbox

    place = Path(os.environ["SANDBOX_STATE"]).parent / "shim"
    place.mkdir(mode=0o755)
    (place / "shim.c").write_text(SHIM)
    library = str(place / "shim.so")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, str(place / "shim.c"), "-ldl"], check=True)
    env = environment(LD_PRELOAD=library)
    outside = Outside()
    outside.serve_names("127.0.0.54", lambda name, times: [WEB])
    told: dict[str, Any] = {}
    server = ["iodined", "-f", "-c", "-P", "pw", "-l", OTHER, "10.77.0.1", ZONE]
    with running(server, env=env), Sandbox("shell", wall_time="60s", read=[str(place)]) as box:
        assert eventually(lambda: UP in plainly(IODINE, env), 30), "the tunnel does not even work without a jail"
        for name, allow in (("named", ["www.example.test:80"]), ("zone", [f"**.{ZONE}:443", f"{OTHER}:53"])):
            started = time.monotonic()
            outcome = box.run(IODINE, env=env, allow_hosts=allow)
            told[name] = {
                "text": (outcome.stdout + outcome.stderr).decode(),
                "seconds": time.monotonic() - started,
                "network": outcome.record.to_json()["network"],
            }
        lookup = do("dns", server=OTHER, host="www.example.test")
        twin = box.run(["python3", "-c", PROBE, json.dumps([lookup])], allow_hosts=["www.example.test:80"])
        told["twin"] = json.loads(twin.stdout)
    return {**told, "queries": outside.queries}


@pytest.mark.needs("iodine", "gcc")
def test_iodine_gets_no_tunnel_through_dns() -> None:
    """Neither to a zone that nobody named, nor to one below which every name is allowed."""
    told = run_in_world(iodine, HOSTS)
    for name in ("named", "zone"):
        assert "Sending DNS queries" in told[name]["text"], "it began"
        assert UP not in told[name]["text"]
        assert "user #" not in told[name]["text"], "the server never heard of it"
    assert told["queries"] == [], "no question is ever passed on"
    refused = [item for item in told["named"]["network"] if item["decision"] == "deny"]
    assert {item["transport"] for item in refused} == {"dns"}
    assert all(item["host"].endswith(ZONE) for item in refused)
    assert told["twin"][0]["answers"] == 1, "the very resolver that it asked answers what is allowed"


# A client that forwards a port of its own, and what comes through that port.
PTUNNEL = """
ptunnel-ng {more} -o/dev/stdout -p {proxy} -l 8000 -r{to} -R22 >/dev/null 2>&1 &
client=$!
python3 - <<'PY'
import socket, time
time.sleep(1)
try:
    with socket.create_connection(("127.0.0.1", 8000), 3) as sock:
        sock.settimeout(3)
        print("came:", sock.recv(100).decode())
except OSError as error:
    print("nothing:", error)
PY
kill $client
"""


def ptunnel(more: str) -> dict[str, Any]:
    from sandbox import Sandbox

    outside = Outside()
    outside.serve("ssh", WEB, 22, greet)
    script = ["sh", "-c", PTUNNEL.format(more=more, proxy=OTHER, to=WEB)]
    with ExitStack() as stack:
        stack.enter_context(running(["ptunnel-ng", *more.split()], env=environment()))
        control = ""
        for _ in range(5):  # until the proxy is up
            control = plainly(script, environment())
            if "came: SSH" in control:
                break
        box = stack.enter_context(Sandbox("shell", wall_time="30s", allow_hosts=["www.example.test:22"]))
        outside.take_reached()
        outcome = box.run(script, env=environment())
        reached = [arrival.label for arrival in outside.take_reached()]
        twin = do("tcp", host="www.example.test", port=22, once=True)
        allowed = json.loads(box.run(["python3", "-c", PROBE, json.dumps([twin])]).stdout)
    return {
        "control": control,
        "inside": outcome.text,
        "reached": reached,
        "network": outcome.record.to_json()["network"],
        "twin": allowed[0],
    }


@pytest.mark.needs("ptunnel-ng")
@pytest.mark.parametrize("more", ["", "--udp"])
def test_ptunnel_gets_no_tunnel_through_icmp_nor_udp(more: str) -> None:
    told = run_in_world(lambda: ptunnel(more), HOSTS)
    assert "came: SSH-2.0" in told["control"], told
    assert "came: SSH" not in told["inside"], told
    assert told["reached"] == []
    assert [item for item in told["network"] if item["decision"] == "allow"] == []
    assert told["twin"]["text"].startswith("SSH-2.0")
