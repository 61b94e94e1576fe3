"""What the gateway carries: large, many, slow and half-closed flows, and budgets to the byte."""

from __future__ import annotations

import hashlib

import pytest

from tests.helpers.net_scenes import Scene, Seen, do, play
from tests.helpers.net_servers import (
    Certificates,
    Outside,
    answer_after_end,
    echo,
    http,
    pattern_digest,
    reset_at_once,
    silent,
    slow_sink,
    tell_ends,
)
from tests.helpers.net_world import OTHER, WEB, WEB_V6

pytestmark = [pytest.mark.needs("userns"), pytest.mark.once]

MIB = 1 << 20
GIB = 1 << 30
HOSTS = {
    "www.example.test": WEB,
    "v6.example.test": WEB_V6,
    "two.example.test": OTHER,
    "dead.example.test": "192.88.98.1",
}
PORTS = {"http": 80, "echo": 7, "after": 9, "reset": 10, "slow": 11, "silent": 12, "ends": 13}


def furnish(outside: Outside) -> None:
    handlers = {"http": http, "echo": echo, "after": answer_after_end, "reset": reset_at_once, "slow": slow_sink}
    for address in (WEB, WEB_V6, OTHER):
        for name, handler in {**handlers, "silent": silent, "ends": tell_ends}.items():
            outside.serve(name, address, PORTS[name], handler)
    outside.serve("private", "10.1.2.3", 80, http)
    outside.serve("tls", WEB, 443, Certificates().tls(http, "www.example.test"))


def fetch(size: int, **more: object) -> dict[str, object]:
    request = f"GET /bytes/{size} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
    return do("tcp", host="www.example.test", port=80, send=request, half_close=True, **more)


def to(what: str, host: str = "www.example.test", **more: object) -> dict[str, object]:
    return do("tcp", host=host, port=PORTS[what], **more)


BYTES_20 = f"GET /bytes/{20 * MIB} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
BYTES_2 = f"GET /bytes/{2 * MIB} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
LARGE = {"size": 20 * MIB, "half_close": True}
ALL = ["www.example.test:1-65535"]
BOTH = ["www.example.test:*", "two.example.test:*"]
SHORT = {"send": "y", "half_close": True}
FREE = {"upload_max": "unlimited", "download_max": "unlimited", "wall_time": "120s"}
SCENES = {
    "v6": Scene(["v6.example.test:*"], [
        do("tcp", host="v6.example.test", port=80, send=BYTES_20, half_close=True),
        to("after", "v6.example.test", **LARGE),
    ], FREE),
    "v6 inside": Scene(["www.example.test:*"], [
        do("tcp", host="www.example.test", port=80, send=BYTES_20, half_close=True, family=6),
        to("after", family=6, **LARGE),
        do("tcp", host="www.example.test", port=80, send=BYTES_20, half_close=True, family=4),
    ], FREE),
    "upload": Scene(ALL, [to("after", size=20 * MIB, half_close=True)], FREE),
    "many": Scene(ALL, [do("flood", host="www.example.test", port=80, count=1000, send="GET / HTTP/1.1\r\n\r\n")]),
    "at once": Scene(ALL, [do("flood", host="www.example.test", port=7, count=200, hold=True, send="x")]),
    "half-close": Scene(ALL, [to("after", send="abc", half_close=True)]),
    "reset": Scene(ALL, [to("reset", send="x")]),
    "reset from inside": Scene(ALL, [
        do("abort", host="www.example.test", port=PORTS["ends"]), to("ends", send="?"),
        to("ends", send="x", half_close=True), to("ends", send="?"),
    ]),
    "sips": Scene(ALL, [do("sip", host="www.example.test", port=80, send=BYTES_2)]),
    "slow reader": Scene(ALL, [to("slow", send="x" * 20000, read=False)]),
    "pieces": Scene(ALL, [to("echo", chunks=["a", "b", "c"], pause=0.05, half_close=True)]),
    "nothing said": Scene(ALL, [to("echo", send="", half_close=True)]),
    "dead host": Scene(["dead.example.test:80"], [do("tcp", host="dead.example.test", port=80, send="x")]),
    "download budget": Scene(ALL, [fetch(3 * MIB), fetch(3 * MIB)], {"download_max": "4MiB"}),
    "upload budget": Scene(ALL, [to("after", size=MIB, half_close=True)] * 2, {"upload_max": "1MiB"}),
    "host budget": Scene(["www.example.test:*", "two.example.test:*"],
                         [fetch(MIB), to("after", host="two.example.test", send="y", half_close=True)],
                         {"network.host_download_max": "100KiB"}),
    "host upload_max": Scene(BOTH, [to("after", size=MIB, half_close=True), to("after", "two.example.test", **SHORT)],
                         {"network.host_upload_max": "100KiB"}),
    "host connections_max": Scene(BOTH, [
        do("flood", host="www.example.test", port=7, count=6, send="x"), to("echo", "two.example.test", **SHORT),
    ], {"network.host_connections_max": 3}),
    "host connections_at_once": Scene(BOTH, [
        do("flood", host="www.example.test", port=7, count=6, hold=True, send="x"),
        do("flood", host="two.example.test", port=7, count=2, hold=True, send="x"),
    ], {"network.host_connections_at_once": 2}),
    "host rate": Scene(BOTH, [fetch(MIB)], {"network.host_rate": "1MiB/s"}),
    "host kill": Scene(BOTH, [do("flood", host="www.example.test", port=7, count=1000, send="x")],
                       {"network.host_connections_max": 3, "on_breach": "kill"}),
    "kill": Scene(ALL, [fetch(3 * MIB), do("flood", host="www.example.test", port=7, count=10_000)],
                  {"download_max": "1MiB", "on_breach": "kill"}),
    "rate": Scene(ALL, [fetch(MIB)], {"network_rate": "1MiB/s"}),
    "connections": Scene(ALL, [do("flood", host="www.example.test", port=7, count=20, send="x"), to("echo", send="x")],
                         {"connections_max": 5}),
    "connections at once": Scene(ALL, [do("flood", host="www.example.test", port=7, count=20, hold=True, send="x")],
                                 {"connections_at_once": 5}),
    "idle": Scene(ALL, [to("silent", send="x")], {"idle_time": "1s"}),
    "flow time": Scene(ALL, [to("echo", chunks=["x"] * 40, pause=0.1)], {"flow_time": "1s"}),
    "flood": Scene(["www.example.test:80"], [
        do("flood", host="www.example.test", port=81, count=9500), do("flood", host="10.0.0.1", port=22, count=500),
        to("http", send="GET /after HTTP/1.1\r\n\r\n", once=True),
    ]),
    "said and gone": Scene(ALL, [do("leave", host="www.example.test", port=9, size=500_000)]),
    "tried and gone": Scene(["www.example.test:80"], [do("leave", host="www.example.test", port=25, count=300)]),
    "named and gone": Scene(ALL, [do("leave", host="www.example.test", port=7, count=300)]),
    "half-open hellos": Scene(["www.example.test:443"], [
        do("flood", host="www.example.test", port=443, count=300, hold=True, send="\x16\x03\x01"),
    ], {"connections_at_once": 100}),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return play(SCENES, HOSTS, furnish)[0]


def test_a_gigabyte_arrives_whole() -> None:
    scene = play({"big": Scene(ALL, [fetch(GIB, timeout=120)], FREE)}, HOSTS, furnish)[0]["big"]
    head = len(scene.result["text"].partition("\r\n\r\n")[0]) + 4
    assert scene.result["bytes"] == GIB + head
    assert scene.result["sha256"] == pattern_digest(GIB, scene.result["text"][:head].encode("latin-1"))
    assert scene.one(proto="http")["bytes_in"] == GIB + head


@pytest.mark.parametrize("name", ["v6", "v6 inside"])
def test_large_pieces_pass_by_either_family(seen: dict[str, Seen], name: str) -> None:
    down, up, *more = seen[name].results
    for result in (down, *more):
        head = len(result["text"].partition("\r\n\r\n")[0]) + 4
        assert result["sha256"] == pattern_digest(20 * MIB, result["text"][:head].encode("latin-1"))
    assert up["text"] == f"{20 * MIB} {hashlib.sha256(b'x' * 20 * MIB).hexdigest()}"


def test_a_large_upload_arrives_whole_and_is_answered_after_its_end(seen: dict[str, Seen]) -> None:
    size = 20 * MIB
    assert seen["upload"].result["text"] == f"{size} {hashlib.sha256(b'x' * size).hexdigest()}"
    assert seen["upload"].one(transport="tcp")["bytes_out"] == size


def test_a_thousand_short_connections_all_work(seen: dict[str, Seen]) -> None:
    scene = seen["many"]
    assert {name: count for name, count in scene.result.items() if name not in ("ok", "seconds")} == {"data": 1000}
    assert sum(item.get("count", 1) for item in scene.attempts(proto="http")) == 1000
    assert len(scene.network or []) < 300


def test_two_hundred_connections_at_once_all_work(seen: dict[str, Seen]) -> None:
    assert seen["at once"].result["held data"] == 200


def test_a_half_close_is_passed_on(seen: dict[str, Seen]) -> None:
    assert seen["half-close"].result["text"] == f"3 {hashlib.sha256(b'abc').hexdigest()}"


def test_a_reset_is_passed_on(seen: dict[str, Seen]) -> None:
    assert seen["reset"].result["error"] == "ECONNRESET"
    attempt = seen["reset"].one(transport="tcp")
    assert (attempt["decision"], attempt["reason"]) == ("allow", "reset")


def test_a_reset_from_inside_is_one_outside_and_an_end_is_an_end(seen: dict[str, Seen]) -> None:
    _, after_reset, _, after_end = seen["reset from inside"].results
    assert (after_reset["text"], after_end["text"]) == ("reset", "end")
    assert [item["reason"] for item in seen["reset from inside"].attempts(transport="tcp")] == ["reset", *[None] * 3]


def test_a_reader_inside_may_take_its_time(seen: dict[str, Seen]) -> None:
    result, head = seen["sips"].result, f"HTTP/1.1 200 OK\r\ncontent-length: {2 * MIB}\r\n\r\n".encode()
    assert result["bytes"] == 2 * MIB + len(head)
    assert result["sha256"] == pattern_digest(2 * MIB, head)


def test_a_slow_reader_gets_everything_in_its_own_time(seen: dict[str, Seen]) -> None:
    assert seen["slow reader"].result["ok"]


def test_pieces_stay_pieces_and_nothing_is_nothing(seen: dict[str, Seen]) -> None:
    assert seen["pieces"].result["text"] == "abc"
    assert (seen["nothing said"].result["ok"], seen["nothing said"].result["bytes"]) == (True, 0)


def test_a_host_that_does_not_accept_is_a_reset_and_no_denial(seen: dict[str, Seen]) -> None:
    scene = seen["dead host"]
    assert scene.result["error"] in ("ECONNRESET", "EPIPE")
    # A reset that is there before the connect returns makes the client try the host's other address as well.
    for attempt in scene.attempts(transport="tcp"):
        assert (attempt["decision"], attempt["reason"]) == ("allow", "connect_failed")
    assert scene.denials == []


def test_the_download_budget_holds_to_the_byte_over_all_flows(seen: dict[str, Seen]) -> None:
    scene = seen["download budget"]
    assert scene.usage["network_bytes_in"] == 4 * MIB
    assert scene.attempts(reason="budget")[0]["detail"] == "download_max"
    assert "budget download_max" in scene.denials[0]


def test_the_upload_budget_holds_to_the_byte(seen: dict[str, Seen]) -> None:
    scene = seen["upload budget"]
    whole, cut = scene.results
    assert whole["text"].startswith(str(MIB))
    assert cut["ok"] is False
    assert scene.usage["network_bytes_out"] == MIB
    assert scene.attempts(reason="budget")[0]["detail"] == "upload_max"


def test_a_hosts_budget_leaves_other_hosts_alone(seen: dict[str, Seen]) -> None:
    first, second = seen["host budget"].results
    assert first["ok"] is False
    assert second["text"].startswith("1 ")
    assert seen["host budget"].attempts(reason="budget")[0]["bytes_in"] == 100 * 1024


@pytest.mark.parametrize("budget", ["upload_max", "connections_max", "connections_at_once"])
def test_each_budget_of_a_host_leaves_other_hosts_alone(seen: dict[str, Seen], budget: str) -> None:
    name, budget = f"host {budget}", f"host_{budget}"
    attempts = seen[name].attempts(reason="budget", transport="tcp")
    assert {(item["host"], item["detail"]) for item in attempts} == {("www.example.test", budget)}
    passed = seen[name].attempts(host="two.example.test", transport="tcp")
    assert {item["decision"] for item in passed} == {"allow"}


def test_what_a_host_may_have_is_counted_exactly(seen: dict[str, Seen]) -> None:
    assert seen["host upload_max"].attempts(reason="budget")[0]["bytes_out"] == 100 * 1024
    assert seen["host connections_max"].result["data"] == 3
    assert len([1 for label, _ in seen["host connections_max"].reached if label == "echo"]) == 4
    assert [result["held data"] for result in seen["host connections_at_once"].results] == [2, 2]


def test_the_rate_of_a_host_holds(seen: dict[str, Seen]) -> None:
    assert seen["host rate"].result["ok"]
    assert seen["host rate"].result["seconds"] > 0.5


def test_a_breach_ends_the_call_when_the_manifest_says_so(seen: dict[str, Seen]) -> None:
    for name in ("kill", "host kill"):
        assert (seen[name].ending["kind"], seen[name].ending["fault"]) == ("limit:network", "tool")
        assert seen[name].results == []
    scene = seen["kill"]
    assert scene.usage["network_bytes_in"] == MIB


def test_the_rate_holds(seen: dict[str, Seen]) -> None:
    scene = seen["rate"]
    assert scene.result["ok"]
    assert scene.result["seconds"] > 0.5


def test_connections_are_bounded_in_all_and_then_refused_by_the_kernel(seen: dict[str, Seen]) -> None:
    flood, after = seen["connections"].results
    assert sum(count for name, count in flood.items() if name not in ("ok", "seconds", "ECONNREFUSED")) <= 7
    assert flood["ECONNREFUSED"] >= 13
    assert after["error"] == "ECONNREFUSED"
    assert len(seen["connections"].reached) == 5


def test_connections_are_bounded_at_once(seen: dict[str, Seen]) -> None:
    scene = seen["connections at once"]
    assert scene.result["held data"] == 5
    assert len(scene.reached) == 5
    assert scene.attempts(reason="budget")[0]["detail"] == "connections_at_once"


def test_an_idle_flow_is_cut(seen: dict[str, Seen]) -> None:
    assert seen["idle"].result["error"] == "ECONNRESET"
    assert seen["idle"].result["seconds"] > 0.9
    assert seen["idle"].one(transport="tcp")["detail"] == "idle_time"


def test_a_flow_that_lasts_too_long_is_cut(seen: dict[str, Seen]) -> None:
    assert seen["flow time"].result["error"] in ("ECONNRESET", "EPIPE")
    assert seen["flow time"].one(transport="tcp")["detail"] == "flow_time"


def test_a_flood_is_refused_counted_and_harms_nobody(seen: dict[str, Seen]) -> None:
    scene = seen["flood"]
    ports, scan, after = scene.results
    assert ports.get("ECONNRESET", 0) + ports.get("ECONNREFUSED", 0) == 9500
    assert scan.get("ECONNRESET", 0) + scan.get("ECONNREFUSED", 0) == 500
    assert after["ok"]
    assert sum(item.get("count", 1) for item in scene.attempts(decision="deny", transport="tcp")) >= 10_000
    assert len(scene.network or []) <= 410


def test_what_was_said_before_the_end_still_arrives(seen: dict[str, Seen]) -> None:
    scene = seen["said and gone"]
    assert scene.ending["kind"] == "ok"
    assert scene.one(transport="tcp")["bytes_out"] == 500_000


def test_what_was_tried_right_before_the_end_is_on_record(seen: dict[str, Seen]) -> None:
    """Also what nobody had looked at yet: it waited in the backlog when the call ended."""
    for name, decision in (("tried and gone", "deny"), ("named and gone", "allow")):
        attempts = seen[name].attempts(transport="tcp")
        assert {item["decision"] for item in attempts} == {decision}
        assert sum(item.get("count", 1) for item in attempts) == 300


def test_half_open_hellos_are_bounded(seen: dict[str, Seen]) -> None:
    scene = seen["half-open hellos"]
    assert scene.usage["network_bytes_out"] == 0
    assert scene.result["held ECONNRESET"] + scene.result.get("ECONNRESET", 0) == 300
    assert sum(item.get("count", 1) for item in scene.attempts(reason="hello_timeout")) == 100
    assert scene.reached == []
