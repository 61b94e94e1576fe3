"""The gateway itself: it fails closed, calls on it know nothing of each other, and it needs no privilege."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.net_scenes import PROBE, do
from tests.helpers.net_servers import Outside, echo, http
from tests.helpers.net_world import OTHER, WEB, run_in_world
from tests.helpers.waiting import eventually

pytestmark = pytest.mark.needs("userns")

HOSTS = {"www.example.test": WEB, "two.example.test": OTHER, **{f"h{n}.example.test": WEB for n in range(64)}}
GET = "GET /x HTTP/1.1\r\nhost: h\r\n\r\n"


def gateways() -> list[int]:
    """The gateway processes of this world: those in our network namespace, as far as can be seen.

    Where it may not be seen, those that descend from this process, or from none any more.
    """
    ours = os.readlink("/proc/self/ns/net")
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"sandbox.egress.gateway" in command and _namespace(pid) in (ours, ""):
                found.append(int(pid))
        except OSError:
            continue
    return found


def _namespace(pid: str) -> str:
    """Empty when it may not be read and it may be ours: the gateway is not dumpable, and we are no root."""
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except PermissionError:
        above = _ancestors(pid)
        return "" if os.getpid() in above or above[:1] == [1] else "other"


def _ancestors(pid: str) -> list[int]:
    """Its parent, that one's parent, and so on, up to the first process of all."""
    found = []
    parent = int(pid)
    while parent > 1:
        parent = int(Path(f"/proc/{parent}/stat").read_text().rsplit(")", 1)[1].split()[1])
        found.append(parent)
    return found


def probe(*actions: Any) -> list[str]:
    return ["python3", "-c", PROBE, json.dumps(actions)]


def furnish() -> Outside:
    outside = Outside()
    for address in (WEB, OTHER):
        outside.serve(f"http {address}", address, 80, http)
        outside.serve(f"echo {address}", address, 7, echo)
    return outside


def get(host: str) -> dict[str, Any]:
    return do("tcp", host=host, port=80, send=GET, once=True)


def lose_the_gateway(signal_number: int) -> dict[str, Any]:
    """Start a call that keeps connecting, signal the gateway in its midst; then another call."""
    from sandbox import Sandbox
    from sandbox.egress import client

    outside = furnish()
    with Sandbox("python", allow_hosts=["www.example.test:*"], wall_time="60s") as box:
        told: dict[str, Any] = {"before": box.run(probe(get("www.example.test"))).ok}
        (pid,) = gateways()
        flood = do("flood", host="www.example.test", port=7, count=1_000_000, send="x")
        outcomes: list[Any] = []
        caller = threading.Thread(target=lambda: outcomes.append(box.run(probe(flood))))
        caller.start()
        assert eventually(lambda: outside.count(f"echo {WEB}") > 20)
        started = time.monotonic()
        os.kill(pid, signal_number)
        caller.join(client.HANG_S + 30)
        told["seconds"] = time.monotonic() - started
        told["ending"] = outcomes[0].ending.to_json()
        told["network"] = outcomes[0].record.to_json()["network"]
        outside.take_reached()
        time.sleep(0.3)
        told["still reached"] = len(outside.take_reached())
        told["after"] = box.run(probe(get("www.example.test"))).ok
        told["new gateway"] = gateways() not in ([], [pid])
    told["left"] = eventually(lambda: gateways() == [])
    return told


def test_a_call_that_loses_the_gateway_ends_and_nothing_passes_any_more() -> None:
    told = run_in_world(lambda: lose_the_gateway(signal.SIGKILL), HOSTS)
    assert told["before"]
    assert (told["ending"]["kind"], told["ending"]["fault"]) == ("lost", "us")
    assert told["seconds"] < 15, "sooner than a gateway that hangs is taken for lost"
    assert told["network"] is None, "nobody knows what passed, and the record says so"
    assert told["still reached"] == 0
    assert told["after"], "the next call gets a new gateway"
    assert told["new gateway"]
    assert told["left"], "and the gateway ends with its supervisor"


def test_a_gateway_that_hangs_is_taken_for_lost() -> None:
    told = run_in_world(lambda: lose_the_gateway(signal.SIGSTOP), HOSTS)
    assert (told["ending"]["kind"], told["ending"]["fault"]) == ("lost", "us")
    assert told["still reached"] == 0
    assert told["after"]


def before_it_is_ready() -> dict[str, Any]:
    """The gateway takes no orders yet when the call already connects."""
    from sandbox import Sandbox

    outside = furnish()
    with Sandbox("python", allow_hosts=["www.example.test:80"], wall_time="60s") as box:
        box.run(["true"])
        (pid,) = gateways()
        os.kill(pid, signal.SIGSTOP)
        outcomes: list[Any] = []
        actions = [do("tcp", host=WEB, port=80, send=GET, once=True), get("www.example.test")]
        caller = threading.Thread(target=lambda: outcomes.append(box.run(probe(*actions))))
        caller.start()
        time.sleep(1)
        early = [arrival.label for arrival in outside.take_reached()]
        os.kill(pid, signal.SIGCONT)
        caller.join()
    record = outcomes[0].record.to_json()
    return {"early": early, "results": json.loads(outcomes[0].stdout), "network": record["network"]}


def test_what_connects_before_the_gateway_is_ready_waits_and_is_judged() -> None:
    told = run_in_world(before_it_is_ready, HOSTS)
    denied, allowed = told["results"]
    assert told["early"] == []
    assert denied["error"] == "ECONNRESET"
    assert denied["seconds"] > 0.5, "it had to wait"
    assert "you asked for /x" in allowed["text"]
    decisions = [(item["host"], item["decision"]) for item in told["network"] if item["transport"] == "tcp"]
    assert decisions == [(WEB, "deny"), ("www.example.test", "allow")]


def fifty_calls() -> list[dict[str, Any]]:
    from sandbox import Sandbox

    furnish()
    told: list[dict[str, Any]] = [{} for _ in range(50)]
    with Sandbox("python", wall_time="60s") as box:

        def one(index: int) -> None:
            own, others = f"h{index}.example.test", f"h{(index + 1) % 50}.example.test"
            outcome = box.run(probe(get(own), get(others), get(WEB)), allow_hosts=[f"{own}:80"])
            record = outcome.record.to_json()
            told[index] = {
                "results": json.loads(outcome.stdout or b"[]"),
                "hosts": sorted({item["host"] for item in record["network"] or []}),
                "allowed": [item["host"] for item in record["network"] or [] if item["proto"] == "http"],
                "ending": outcome.ending.to_json(),
            }

        threads = [threading.Thread(target=one, args=(index,)) for index in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return told


def test_fifty_calls_at_once_are_judged_each_by_its_own_manifest() -> None:
    for index, told in enumerate(run_in_world(fifty_calls, HOSTS)):
        own, others = f"h{index}.example.test", f"h{(index + 1) % 50}.example.test"
        assert told["ending"]["kind"] == "ok", told
        allowed, other, literal = told["results"]
        assert "you asked for /x" in allowed.get("text", ""), told
        assert other["error"] == "EAI_NONAME"
        assert literal["error"] == "ECONNRESET"
        assert told["hosts"] == sorted([own, others, WEB])
        assert told["allowed"][:1] == [own]


def privileges() -> dict[str, Any]:
    from sandbox import Sandbox

    furnish()
    with Sandbox("python", allow_hosts=["www.example.test:80"]) as box:
        ok = box.run(probe(get("www.example.test"))).ok
        (pid,) = gateways()
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
        )
        environment = b""
        if os.geteuid() == 0:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
    return {"ok": ok, "status": status, "environment": environment.decode()}


def test_the_gateway_has_no_privilege_and_no_environment() -> None:
    told = run_in_world(privileges, HOSTS)
    assert told["ok"]
    status = told["status"]
    assert status["NoNewPrivs"] == "1"
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == int(status["CapInh"], 16) == 0
    if os.geteuid() == 0:
        uids = set(status["Uid"].split())
        assert len(uids) == 1
        assert int(uids.pop()) >= 1 << 16
        assert status["Groups"].strip() == ""
        names = {item.partition("=")[0] for item in told["environment"].split("\0") if item}
        assert names <= {"LOCALDOMAIN", "RES_OPTIONS", "LC_CTYPE"}


def no_gateway_without_need() -> dict[str, Any]:
    from sandbox import Sandbox

    furnish()
    with Sandbox("python") as box:
        outcome = box.run(probe(do("lookup", host="www.example.test"), get(WEB)))
        return {
            "results": json.loads(outcome.stdout),
            "gateways": len(gateways()),
            "network": outcome.record.to_json()["network"],
        }


def test_without_an_allowlist_there_is_no_gateway_and_no_route() -> None:
    told = run_in_world(no_gateway_without_need, HOSTS)
    lookup, connect = told["results"]
    assert lookup["error"].startswith("EAI")
    assert connect["error"] == "ENETUNREACH"
    assert told["gateways"] == 0
    assert told["network"] is None


def functions() -> dict[str, Any]:
    from sandbox import Sandbox, sandboxed

    furnish()

    @sandboxed("python", allow_hosts=["www.example.test:80"])
    def fetch(path: str) -> str:
        import urllib.request

        with urllib.request.urlopen(f"http://www.example.test{path}", timeout=10) as reply:
            text: str = reply.read().decode()
        return text

    with Sandbox("python") as _box:
        warm = [fetch(f"/{n}") for n in range(5)]
        outcome = fetch.call("/again")
    return {"warm": warm, "network": outcome.record.to_json()["network"]}


def test_a_decorated_function_fetches_from_the_host_that_it_names() -> None:
    told = run_in_world(functions, HOSTS)
    assert told["warm"] == [f"you asked for /{n}" for n in range(5)]
    assert [item["host"] for item in told["network"] if item["proto"] == "http"] == ["www.example.test"]


def beside_a_flood() -> dict[str, Any]:
    """One call hammers the gateway; another fetches meanwhile, and a third is ended by its wall time at full speed."""
    from sandbox import Sandbox

    outside = furnish()
    settings: dict[str, Any] = {"connections_max": "unlimited", "download_max": "unlimited"}
    with Sandbox("python", allow_hosts=["www.example.test:*"], **settings) as box:
        box.run(["true"])
        flood = do("flood", host="www.example.test", port=7, count=1_000_000, send="x")
        refused = do("flood", host="10.1.2.3", port=7, count=1_000_000)
        hammers = [
            threading.Thread(target=lambda action=action: box.run(probe(action), wall_time="8s"))
            for action in (flood, refused)
        ]
        for hammer in hammers:
            hammer.start()
        assert eventually(lambda: outside.count(f"echo {WEB}") > 50)
        started = time.monotonic()
        fetched = [box.run(probe(get("www.example.test"))) for _ in range(5)]
        fetch_s = (time.monotonic() - started) / 5
        endless = do("tcp", host="www.example.test", port=80, send=f"GET /bytes/{1 << 40} HTTP/1.1\r\n\r\n", timeout=60)
        started = time.monotonic()
        ended = box.run(probe(endless), wall_time="2s")
        ended_s = time.monotonic() - started
        for hammer in hammers:
            hammer.join()
    return {
        "fetched": [outcome.ok and b"you asked for" in outcome.stdout for outcome in fetched],
        "fetch_s": fetch_s,
        "ended": ended.ending.to_json(),
        "ended_s": ended_s,
        "moved": ended.record.to_json()["usage"]["network_bytes_in"],
    }


def test_a_flood_delays_neither_other_calls_nor_their_ends() -> None:
    told = run_in_world(beside_a_flood, HOSTS)
    assert told["fetched"] == [True] * 5
    assert told["fetch_s"] < 15
    assert told["ended"]["kind"] == "limit:wall_time"
    assert 1.9 < told["ended_s"] < 20, "2 s, and the start of a jail on a busy machine"
    assert told["moved"] > 1 << 20


def few_descriptors() -> dict[str, Any]:
    import resource

    from sandbox import Sandbox

    furnish()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), min(512, hard)))
    with Sandbox("python", allow_hosts=["www.example.test:*"]) as box:
        held = do("flood", host="www.example.test", port=7, count=250, hold=True, send="x")
        outcome = box.run(probe(held, get("www.example.test")))
    return {"results": json.loads(outcome.stdout), "network": outcome.record.to_json()["network"]}


def test_a_gateway_that_is_full_refuses_and_goes_on() -> None:
    told = run_in_world(few_descriptors, HOSTS)
    held, after = told["results"]
    assert held["held data"] == (512 - 256) // 2
    assert {item["reason"] for item in told["network"] if item["decision"] == "deny"} == {"gateway_busy"}
    assert after["ok"]


def on_the_command_line() -> dict[str, Any]:
    furnish()
    tries = [get("evil.test"), get("www.example.test"), get(OTHER), get(OTHER), get("evil.test"), get(OTHER)]
    argv = [
        sys.executable,
        "-m",
        "sandbox.cli.main",
        "run",
        "--profile",
        "python",
        "--allow-host",
        "www.example.test:80",
        "--",
    ]
    done = subprocess.run([*argv, *probe(*tries)], capture_output=True, text=True, timeout=60)
    return {"exit": done.returncode, "out": done.stdout, "err": done.stderr}


def test_the_command_line_says_each_denial_once() -> None:
    told = run_in_world(on_the_command_line, {**HOSTS, "evil.test": OTHER})
    assert told["exit"] == 0, told
    assert "you asked for /x" in json.loads(told["out"])[1]["text"]
    lines = [line for line in told["err"].splitlines() if "not permitted" in line]
    assert len(lines) == 2, lines
    for line, what in zip(sorted(lines), (f"connecting to {OTHER}:80", "looking up evil.test"), strict=True):
        assert what in line
        assert "www.example.test:80" in line, "what is permitted"
        assert line.endswith("Retrying will not help.")
