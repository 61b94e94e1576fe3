"""The gateway that reads HTTP: a process of its own, which calls share without learning of each other, and the only
place where secrets are."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.net_http import Site
from tests.helpers.net_servers import Certificates, Outside
from tests.helpers.net_world import WEB, run_in_world
from tests.helpers.waiting import eventually
from tests.kernel.test_egress_gateway import gateways

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

NAME = "www.example.test"
HOSTS = {NAME: WEB}
VALUE = "v3ry-s3cret-value-0123456789"
RULE = f"GET {NAME} /ok/** inspect"


def furnish() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The servers; the requests that they got, and what a sandbox needs for them."""
    outside, requests, certificates = Outside(), [], Certificates()  # type: tuple[Outside, list[Any], Certificates]
    site = Site("www", requests)
    outside.serve("www", WEB, 80, site)
    outside.serve("www", WEB, 443, certificates.tls(site, NAME))
    settings = {"allow_hosts": [f"{NAME}:443", f"{NAME}:80"], "extra_roots": [certificates.ca_path]}
    return requests, {"wall_time": "60s", **settings}


def told(body: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    answer: dict[str, Any] = run_in_world(body, HOSTS)
    return answer


def fetch(path: str) -> list[str]:
    return ["curl", "-sS", "--max-time", "30", f"https://{NAME}{path}"]


def separate() -> dict[str, Any]:
    from sandbox import Sandbox

    _, settings = furnish()
    counts = []
    with Sandbox("shell", **settings) as box:
        box.run(["curl", "-sS", f"http://{NAME}/ok/x"])
        counts.append(len(gateways()))
        box.run(["curl", "-sS", f"http://{NAME}/ok/x"], http=[RULE])
        counts.append(len(gateways()))
        modules = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[7] for pid in gateways()]
    return {"counts": counts, "modes": sorted(mode.decode() for mode in modules)}


def test_calls_without_rules_go_through_a_gateway_that_reads_nothing() -> None:
    found = told(separate)
    assert found["counts"] == [1, 2]
    assert found["modes"] == ["", "http"]


def lost() -> dict[str, Any]:
    from sandbox import Sandbox

    _, settings = furnish()
    look = "sha256sum /run/sandbox/tls/authority.pem | cut -c1-64; " + " ".join(fetch("/ok/x"))
    with Sandbox("shell", http=[RULE], **settings) as box:
        before = box.run(["sh", "-c", look])
        (pid,) = gateways()
        outcomes: list[Any] = []
        hang = threading.Thread(target=lambda: outcomes.append(box.run(["sleep", "30"])))
        hang.start()
        time.sleep(1.0)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        hang.join(30)
        took = time.monotonic() - started
        after = box.run(["sh", "-c", look])
    return {
        "before": before.stdout.decode().split("\n"),
        "after": after.stdout.decode().split("\n"),
        "ending": outcomes[0].ending.to_json(),
        "seconds": took,
        "left": eventually(lambda: gateways() == []),
    }


def test_a_call_that_loses_it_ends_and_the_next_gets_a_new_one_with_a_new_authority() -> None:
    found = told(lost)
    assert (found["ending"]["kind"], found["ending"]["fault"]) == ("lost", "us")
    assert found["seconds"] < 5
    assert found["before"][1] == found["after"][1] == "GET /ok/x at www, 0 bytes"
    assert found["before"][0] != found["after"][0]
    assert found["left"]


def many() -> dict[str, Any]:
    from sandbox import Sandbox

    requests, settings = furnish()

    def one(index: int) -> tuple[int, str, str]:
        secret = {"T": {"host": NAME, "header": "X-Key", "plain": True}}
        values = {"T": f"value-of-{index}-only"}
        rule = f"GET {NAME} /{index}/** inspect"
        with Sandbox("shell", http=[rule], secrets=secret, secret_values=values, **settings) as box:
            other = (index + 1) % CALLS
            urls = [f"{scheme}://{NAME}/{n}/x" for scheme in ("https", "http") for n in (index, other)]
            outcome = box.run(["curl", "-sS", "--max-time", "50", *urls])
        return index, outcome.stdout.decode(), json.dumps(outcome.record.to_json()["network"])

    with Sandbox("shell", **settings), ThreadPoolExecutor(10) as pool:
        results = list(pool.map(one, range(CALLS)))
    seen = [(r["target"], dict(map(tuple, r["headers"]))["x-key"]) for r in requests]
    return {"results": results, "seen": seen}


CALLS = 30


def test_many_calls_at_once_are_judged_each_by_its_own_rules_and_have_each_its_own_secret() -> None:
    found = told(many)
    for index, text, network in found["results"]:
        assert text.count(f"GET /{index}/x at www") == 2, text
        assert text.count('"reason": "http_path"') == 2, text
        assert "value-of" not in text + network
    assert sorted(map(tuple, found["seen"])) == sorted(
        (f"/{n}/x", f"value-of-{n}-only") for n in range(CALLS) for _ in "12"
    )


def traces() -> dict[str, Any]:
    from sandbox import Sandbox

    requests, settings = furnish()
    secret = {"TOKEN": {"host": NAME, "format": "Bearer {}"}}
    values = {"secret_values": {"TOKEN": lambda: VALUE}}
    state = Path(os.environ["SANDBOX_STATE"])
    capture = {"capture": ["args", "output", "result"]}
    with Sandbox("shell", http=[RULE], secrets=secret, **values, **capture, **settings) as box:
        with box.stream(["sh", "-c", f"{' '.join(fetch('/ok/x'))}; echo ready; sleep 20"]) as stream:
            for _, data in stream:
                if b"ready" in data:
                    break
            found = processes_with(VALUE.encode())
        box.run(fetch("/ok/y"))
    files = [str(path) for path in state.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]
    # The searches find what is there: one process and one file are planted.
    (state / "planted").write_text(VALUE)
    planted = [path.name for path in state.rglob("*") if path.is_file() and VALUE.encode() in path.read_bytes()]
    os.environ["PLANTED"] = VALUE
    child = os.spawnve(os.P_NOWAIT, "/bin/sleep", ["sleep", "20"], dict(os.environ))
    eventually(lambda: str(child) in processes_with(VALUE.encode()))
    control = str(child) in processes_with(VALUE.encode())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    headers = [dict(map(tuple, request["headers"]))["authorization"] for request in requests]
    return {"processes": found, "files": files, "planted": planted, "control": control, "headers": headers}


def processes_with(data: bytes) -> list[str]:
    """Those whose command line or environment holds it, as far as we may look; not ourselves."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            try:
                if int(pid) != os.getpid() and data in Path(f"/proc/{pid}/{name}").read_bytes():
                    found.append(pid)
            except OSError:
                continue
    return found


def test_a_secret_is_in_no_file_of_ours_and_on_no_command_line_nor_in_any_environment() -> None:
    found = told(traces)
    assert found["headers"] == [f"Bearer {VALUE}"] * 2
    assert found["processes"] == []
    assert found["files"] == []
    assert found["planted"] == ["planted"]
    assert found["control"]


def functions() -> dict[str, Any]:
    from sandbox import ManifestError, sandboxed

    requests, settings = furnish()
    secret = {"TOKEN": {"host": NAME, "header": "X-Api-Key"}}

    # What the function refers to travels into the jail with it: a secret must not.
    @sandboxed("python", http=[RULE], secrets=secret, secret_values={"TOKEN": lambda: VALUE}, **settings)
    def ask(path: str) -> list[str]:
        import os
        import urllib.request

        with urllib.request.urlopen(f"https://www.example.test{path}") as answer:
            return [answer.read().decode(), os.environ["TOKEN"]]

    @sandboxed("python", http=[RULE], secrets=secret, **settings)
    def without() -> None:
        return None

    try:
        without()
        refused = ""
    except ManifestError as error:
        refused = str(error)
    value = ask("/ok/f")
    return {"value": value, "headers": requests[0]["headers"], "refused": refused, "placeholder": ask.manifest.name}


def test_a_decorated_function_uses_a_secret_that_it_never_sees() -> None:
    found = told(functions)
    assert found["value"] == ["GET /ok/f at www, 0 bytes\n", "placeholder-for-TOKEN"]
    assert ["x-api-key", VALUE] in found["headers"]
    assert "secrets.TOKEN: it has no source" in found["refused"]
