"""Names inside: DNS at any resolver's address, nothing that is forwarded, no tunnel, and names that change."""

from __future__ import annotations

import base64
import hashlib

import pytest

from tests.helpers.net_scenes import Scene, Seen, do, play
from tests.helpers.net_servers import Outside, http
from tests.helpers.net_world import WEB

pytestmark = pytest.mark.needs("userns")

HOSTS = {"www.example.test": WEB}
ENCODED = base64.b32encode(hashlib.sha256(b"stolen").digest()).decode().lower().rstrip("=")
OTHER_TYPES = (5, 10, 15, 16, 33, 64, 65)  # CNAME, NULL, MX, TXT, SRV, SVCB, HTTPS
GET = "GET / HTTP/1.1\r\n\r\n"


def furnish(outside: Outside) -> None:
    outside.serve("http", WEB, 80, http)
    outside.serve("private", "10.1.2.3", 80, http)
    # What /etc/hosts does not know goes to this resolver, which changes its mind after the first answer.
    outside.serve_names("127.0.0.54", answers)


def answers(name: str, times: int) -> list[str]:
    if name == "rebind.example.test":
        return [WEB] if times == 0 else ["10.1.2.3"]
    return [WEB] if name.endswith(".wild.example.test") and not name.startswith("gone.") else []


SCENES = {
    "dns": Scene(["www.example.test:80"], [
        do("dns", server="8.8.8.8", host="www.example.test"),
        do("dns", server="1.1.1.1", host="www.example.test", over="tcp"),
        do("dns", server="2001:4860:4860::8888", host="www.example.test", kind=28),
        do("dns", server="2606:4700::1111", host="www.example.test", over="tcp"),
        do("dns", server="198.18.0.2", host="www.example.test", kind=65),
        do("dns", server="8.8.8.8", host="evil.test"),
        do("dns", server="8.8.8.8", host="evil.test", over="tcp"),
        do("dns", server="8.8.8.8", host="www.example.test", kind=16),
        do("dns", server="127.0.0.1", host="www.example.test"),
    ]),
    "dns types": Scene(["typed.wild.example.test:80"], [
        *[do("dns", server="9.9.9.9", host="typed.wild.example.test", kind=kind) for kind in OTHER_TYPES],
        do("dns", server="9.9.9.9", host="typed.wild.example.test"),
    ]),
    "dns tunnel": Scene(["**.wild.example.test:80"], [
        do("lookup", host="a.wild.example.test"), do("lookup", host=f"{ENCODED[:40]}.wild.example.test"),
        do("tcp", host="a.wild.example.test", port=80, send=GET, once=True),
        do("tcp", host="gone.wild.example.test", port=80, send=GET, once=True),
    ]),
    "rebinding": Scene(["rebind.example.test:80"], [
        do("tcp", host="rebind.example.test", port=80, send=GET, once=True),
    ] * 2),
    "dns flood": Scene(["**.wild.example.test:80", "www.example.test:80"], [
        do("dns", server="9.9.9.9", host="www.example.test"),
        do("ask_many", server="9.9.9.9", pattern="n{}.evil.test", count=3000),
        do("dns", server="9.9.9.9", host="www.example.test"),
    ]),
    "many names": Scene(["**.wild.example.test:80", "www.example.test:80"], [
        do("ask_many", server="9.9.9.9", pattern="n{}.wild.example.test", count=300),
        do("dns", server="9.9.9.9", host="www.example.test"),
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def played() -> tuple[dict[str, Seen], list[str]]:
    return play(SCENES, HOSTS, furnish)


@pytest.fixture(scope="module")
def seen(played: tuple[dict[str, Seen], list[str]]) -> dict[str, Seen]:
    return played[0]


def test_dns_is_answered_at_any_address_and_from_there(seen: dict[str, Seen]) -> None:
    results = seen["dns"].results
    for result, server in zip(
        results[:4], ("8.8.8.8", "1.1.1.1", "2001:4860:4860::8888", "2606:4700::1111"), strict=True
    ):
        assert (result["code"], result["answers"], result["from"]) == (0, 1, server), result
    https, evil, evil_tcp, txt, local = results[4:]
    assert (https["code"], https["answers"]) == (0, 0)
    assert (evil["code"], evil_tcp["code"]) == (3, 3)
    assert (txt["code"], txt["answers"]) == (0, 0)
    assert (local["answers"], local["from"]) == (1, "127.0.0.1")
    assert seen["dns"].one(decision="deny")["host"] == "evil.test"
    assert seen["dns"].one(decision="deny")["count"] == 2


def test_other_types_of_records_are_empty_and_asked_nowhere(played: tuple[dict[str, Seen], list[str]]) -> None:
    scenes, queries = played
    *others, address = scenes["dns types"].results
    assert {(result["code"], result["answers"]) for result in others} == {(0, 0)}
    assert (address["code"], address["answers"]) == (0, 1)
    assert "typed.wild.example.test" not in queries, "nobody connected, so nobody outside was asked"


def test_no_refused_name_is_asked_outside(played: tuple[dict[str, Seen], list[str]]) -> None:
    scenes, queries = played
    assert scenes["dns tunnel"].results[0]["ok"]
    assert scenes["dns tunnel"].results[1]["error"].startswith("EAI")
    assert scenes["dns tunnel"].one(decision="deny")["reason"] == "dns_tunnel"
    assert scenes["dns tunnel"].results[2]["ok"]
    # A reset that comes while it still connects makes a client try the name's other address.
    gone = scenes["dns tunnel"].attempts(host="gone.wild.example.test", transport="tcp")
    assert {attempt["reason"] for attempt in gone} == {"resolve_failed"}
    assert "a.wild.example.test" in queries
    assert not [name for name in queries if "evil" in name or ENCODED[:10] in name]
    assert "gone.wild.example.test" in queries
    assert not [name for name in queries if "corp" in name], "the host's search list is put behind no name"


def test_a_name_that_changes_its_address_is_judged_each_time(seen: dict[str, Seen]) -> None:
    """The first answer may be used for some seconds; the private second one is never dialled."""
    scene = seen["rebinding"]
    assert {label for label, _ in scene.reached} <= {"http"}, "the private address has a server, which nobody reached"
    assert scene.attempts(transport="tcp")
    for attempt in scene.attempts(transport="tcp"):
        assert attempt["resolved_ip"] == WEB or attempt["reason"] == "closed_address"


def test_questions_are_rated_and_counted_and_known_names_go_on(seen: dict[str, Seen]) -> None:
    scene = seen["dns flood"]
    before, asked, after = scene.results
    assert (before["answers"], after["answers"]) == (1, 1), "a name that was given out is answered throughout"
    assert asked["5"] > 0, "refused"
    assert asked["3"] + asked["5"] == 3000, "every question got its answer"
    lookups = scene.attempts(transport="dns")
    assert sum(item.get("count", 1) for item in lookups) == scene.usage["network_lookups"] == 3002
    assert sum(item["count"] for item in lookups if item["reason"] == "dns_rate") == asked["5"]
    assert any("too many DNS queries" in line for line in scene.denials)
    assert scene.reached == []


def test_how_many_names_a_call_may_choose_is_bounded(played: tuple[dict[str, Seen], list[str]]) -> None:
    scenes, queries = played
    asked, after = scenes["many names"].results
    assert asked["0"] == 256, "as many as a call may choose"
    assert asked["0"] + asked["5"] == 300
    assert after["answers"] == 1
    assert not [name for name in queries if name.startswith("n")], "asking is not telling: nobody outside heard of them"
