"""Ways out that are not: each attempt of the probe inside is refused promptly and on record; its permitted twin works.

One world for all scenes: every address is a stand-in's or nobody's, and no interface leads anywhere.
"""

from __future__ import annotations

import pytest

from tests.helpers.net_scenes import Scene, Seen, do, play
from tests.helpers.net_servers import Certificates, Outside, echo, greet, http, redirect
from tests.helpers.net_world import OTHER, WEB, WEB_V6

pytestmark = pytest.mark.needs("userns")

REDIRECTS = "93.184.216.35"
GET = "GET /x HTTP/1.1\r\nhost: h\r\n\r\n"
HOSTS = {
    "www.example.test": f"{WEB} {WEB_V6}",
    "v6.example.test": WEB_V6,
    "internal.example.test": "10.1.2.3",
    "mixed.example.test": f"10.1.2.3 {WEB}",
    "loop.example.test": "127.0.0.1",
    "meta.example.test": "169.254.169.254",
    "mapped.example.test": "::ffff:10.1.2.3",
    "nat64.example.test": "64:ff9b::a01:203",
    "sixtofour.example.test": "2002:a01:203::1",
    "synthetic.example.test": "198.18.5.5",
    "evil.test": OTHER,
    "inner.example.test": "10.1.2.3",
    "redirect.example.test": REDIRECTS,
}
TLS_GET = {"send": GET}


def furnish(outside: Outside) -> None:
    certificates = Certificates()
    for address in (WEB, WEB_V6):
        outside.serve("web", address, 80, http)
        outside.serve("tls", address, 443, certificates.tls(http, "www.example.test"))
        outside.serve("ssh", address, 22, greet)
        outside.serve("high", address, 8050, echo)
    outside.serve("redirects", REDIRECTS, 80, redirect)
    outside.serve("evil", OTHER, 80, http)
    outside.serve("evil", OTHER, 443, certificates.tls(http, "evil.test"))
    outside.serve("metadata", "169.254.169.254", 80, http)
    outside.serve("internal", "10.1.2.3", 80, http)
    outside.serve("loopback", "127.0.0.1", 80, http)
    outside.serve("loopback", "::1", 80, http)
    outside.serve("synthetic", "198.18.5.5", 80, http)
    for address in ("64:ff9b::a01:203", "2002:a01:203::1"):
        outside.serve("translated", address, 80, http)


# How IPv6 is written, how IPv4 is written as IPv6, and what leads somewhere near.
SPELLINGS = {
    "own name's address": WEB_V6,
    "written out": "2606:2800:0220:0001:0248:1893:25C8:1946",
    "with dots at its end": "2606:2800:220:1:248:1893:37.200.25.70",
    "mapped": f"::ffff:{WEB}",
    "mapped, in hex": "::ffff:5db8:d822",
    "mapped, written out": "0:0:0:0:0:FFFF:5DB8:D822",
    "mapped private": "::ffff:10.1.2.3",
    "mapped metadata": "::ffff:a9fe:a9fe",
    "mapped loopback": "::ffff:127.0.0.2",
    "compatible": "::10.1.2.3",
    "translated": "::ffff:0:10.1.2.3",
    "nat64": "64:ff9b::10.1.2.3",
    "nat64, local": "64:ff9b:1::10.1.2.3",
    "6to4": "2002:a01:203::1",
    "teredo": "2001:0:5db8:d822:0:0:f5fe:fdfc",
    "isatap": "2001:db8::200:5efe:10.1.2.3",
    "unique local": "fd00::1",
    "metadata": "fd00:ec2::254",
    "site local": "fec0::1",
    "documentation": "2001:db8::1",
}


def get(host: str, port: int = 80) -> dict[str, object]:
    return do("tcp", host=host, port=port, send=GET, once=True)


SCENES = {
    "allowed": Scene(["www.example.test:80"], [get("www.example.test")]),
    "allowed v6": Scene(["v6.example.test:80"], [get("v6.example.test")]),
    "no rule": Scene(["www.example.test:80"], [get("evil.test"), get("sub.www.example.test"), get("example.test")]),
    "other port": Scene(["www.example.test:80"], [get("www.example.test", 22)]),
    "port range": Scene(["www.example.test:8000-8100"], [
        do("tcp", host="www.example.test", port=8050, send="hi", once=True),
        do("tcp", host="www.example.test", port=8101, send="hi", once=True),
    ]),
    "literals": Scene(["www.example.test:80"], [
        get(WEB), get(WEB_V6), get(f"::ffff:{WEB}"), get(OTHER), get("10.1.2.3"), get("169.254.169.254"),
        get("100.100.100.200"), get("fd00:ec2::254"), get("198.18.200.200"), get("2001:2::ffff"),
    ]),
    "spelled": Scene(["www.example.test:80"], [get(text) for text in SPELLINGS.values()]),
    "spelled and named": Scene([f"[{SPELLINGS['written out']}]:80", "[::ffff:5db8:d822]:80"], [
        get(WEB_V6), get(SPELLINGS["written out"]), get(SPELLINGS["with dots at its end"]), get(WEB),
        get(SPELLINGS["mapped, in hex"]), get(SPELLINGS["mapped, written out"]), get(OTHER),
    ]),
    "redirected": Scene(["www.example.test:80", "inner.example.test:80", "redirect.example.test:80"], [
        do("follow", url=f"http://redirect.example.test/{where}")
        for where in ("http://169.254.169.254/", "http://10.1.2.3/x", "http://inner.example.test/", "http://[::1]/",
                      "http://www.example.test/there")
    ]),
    "named literals": Scene([f"{WEB}:80", f"[{WEB_V6}]:80"], [get(WEB), get(f"::ffff:{WEB}"), get(WEB_V6), get(OTHER)]),
    "private behind a name": Scene(["internal.example.test:80"], [get("internal.example.test")]),
    "private opened": Scene(["internal.example.test:80", "10.0.0.0/8:80"],
                            [get("internal.example.test"), get("10.1.2.3")]),
    "mixed": Scene(["mixed.example.test:80"], [get("mixed.example.test")]),
    "loopback behind a name": Scene(["loop.example.test:80"], [get("loop.example.test")]),
    "loopback opened": Scene(["loop.example.test:80", "127.0.0.1:80"], [get("loop.example.test"), get("127.0.0.1")]),
    "metadata behind a name": Scene(["meta.example.test:80", "169.254.0.0/16:80"], [get("meta.example.test")]),
    "metadata singly": Scene(["meta.example.test:80", "169.254.169.254:80"], [get("meta.example.test")]),
    "disguised": Scene(
        ["mapped.example.test:80", "nat64.example.test:80", "sixtofour.example.test:80", "synthetic.example.test:80"],
        [get(f"{name}.example.test") for name in ("mapped", "nat64", "sixtofour", "synthetic")],
    ),
    "denied wins": Scene(["**.example.test:80"], [get("evil.example.test"), get("www.example.test")],
                         {"deny_hosts": ["evil.example.test"]}),
    "denied address": Scene(["www.example.test:80"], [get("www.example.test")], {"deny_hosts": [WEB, f"[{WEB_V6}]"]}),
    "tls": Scene(["www.example.test:443"], [
        do("tls", host="www.example.test", port=443, sni="www.example.test", **TLS_GET),
        do("tls", host="www.example.test", port=443, sni="WWW.Example.TEST", **TLS_GET),
        do("tls", host="www.example.test", port=443, sni="www.example.test", pieces=7, **TLS_GET),
        do("tls", host="www.example.test", port=443, sni="evil.test", **TLS_GET),
        do("tls", host="www.example.test", port=443, sni=None, **TLS_GET),
        get("www.example.test", 443),
        do("tcp", host="www.example.test", port=443, send="SSH-2.0-OpenSSH_9.2\r\n", once=True),
        do("tls", host="www.example.test", address=WEB, port=443, sni="www.example.test", **TLS_GET),
    ]),
    "tls not asked for": Scene(["www.example.test:443/tcp"], [
        do("tls", host="www.example.test", port=443, sni="evil.test", **TLS_GET),
    ]),
    "tls asked for": Scene(["www.example.test:22/tls"], [
        do("tcp", host="www.example.test", port=22, send="SSH-2.0-x\r\n", once=True),
    ]),
    "ssh": Scene(["www.example.test:22"], [do("tcp", host="www.example.test", port=22, once=True)]),
    "own servers": Scene(["www.example.test:80"], [
        do("own_server", address="127.0.0.1", port=8080), do("own_server", address="::1", port=8080),
        do("own_server", address="198.18.0.1", port=8080), do("tcp", host="127.0.0.1", port=81),
        do("tcp", host="127.0.0.1", port=1), do("tcp", host="198.18.0.1", port=1), do("tcp", host="0.0.0.0", port=80),
        do("tcp", host="::1", port=1),
    ]),
    "datagrams": Scene(["www.example.test:443", "www.example.test:53"], [
        do("udp", host="www.example.test", port=443), do("udp", host="www.example.test", port=123),
        do("udp", host=WEB, port=443), do("udp", host=WEB_V6, port=123),
        do("udp", host="127.0.0.1", port=443), do("dns", server="8.8.8.8", host="www.example.test"),
        *[do("udp", host=OTHER, port=5000 + n, send="\xc0\x00\x00\x00\x01quic") for n in range(300)],
    ]),
    "other sockets": Scene(["www.example.test:80"], [
        do("make", family="AF_INET", kind="SOCK_STREAM"),
        do("make", family="AF_INET", kind="SOCK_RAW", protocol=1),
        do("make", family="AF_INET", kind="SOCK_DGRAM", protocol=1),
        do("make", family="AF_INET", kind="SOCK_STREAM", protocol=132),
        do("make", family="AF_INET6", kind="SOCK_RAW", protocol=58),
        do("make", family="AF_PACKET", kind="SOCK_RAW"),
        do("make", family="AF_VSOCK", kind="SOCK_STREAM"),
        do("make", family="AF_NETLINK", kind="SOCK_RAW", protocol=12),
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def seen() -> dict[str, Seen]:
    return play(SCENES, HOSTS, furnish)[0]


def assert_refused(result: dict[str, object]) -> None:
    """A reset, soon: not a hang, not an answer."""
    assert result["ok"] is False, result
    assert result["error"] in ("ECONNRESET", "ECONNREFUSED", "EPIPE"), result
    assert float(str(result["seconds"])) < 9, "the probe itself gives up after 10"


def test_an_allowed_name_is_reached_and_on_record(seen: dict[str, Seen]) -> None:
    scene = seen["allowed"]
    assert "you asked for /x" in scene.result["text"]
    attempt = scene.one(proto="http")
    assert (attempt["decision"], attempt["host"], attempt["port"]) == ("allow", "www.example.test", 80)
    assert attempt["rule"] == "www.example.test:80"
    assert attempt["resolved_ip"] in (WEB, WEB_V6)
    assert attempt["bytes_out"] == len(GET)
    assert attempt["bytes_in"] > 20
    assert scene.denials == []
    assert scene.ending["kind"] == "ok"
    assert scene.notes == []


def test_an_allowed_name_with_ipv6_only_is_reached(seen: dict[str, Seen]) -> None:
    assert seen["allowed v6"].result["ok"]
    assert seen["allowed v6"].one(proto="http")["resolved_ip"] == WEB_V6


def test_a_name_that_no_rule_names_does_not_exist(seen: dict[str, Seen]) -> None:
    scene = seen["no rule"]
    assert [result["error"] for result in scene.results] == ["EAI_NONAME"] * 3
    assert {item["host"] for item in scene.attempts(decision="deny")} == {
        "evil.test", "sub.www.example.test", "example.test"
    }  # fmt: skip
    assert scene.reached == []
    assert any("evil.test is not permitted" in line for line in scene.denials)


def test_an_allowed_name_at_another_port_is_refused(seen: dict[str, Seen]) -> None:
    scene = seen["other port"]
    assert_refused(scene.result)
    assert scene.one(port=22)["reason"] == "port_not_named"
    assert scene.reached == []
    assert "only at port 80" in scene.denials[0]


def test_a_port_range_holds_at_its_ends(seen: dict[str, Seen]) -> None:
    inside, outside = seen["port range"].results
    assert inside["text"] == "hi"
    assert_refused(outside)


def test_literal_addresses_are_refused_also_of_an_allowed_host(seen: dict[str, Seen]) -> None:
    scene = seen["literals"]
    for result in scene.results:
        assert_refused(result)
    assert scene.reached == []
    refused = scene.attempts(transport="tcp")
    assert {item["decision"] for item in refused} == {"deny"}
    assert len(refused) == len(scene.results)
    assert scene.one(host="169.254.169.254")["detail"] == "a metadata service"
    assert scene.one(host="198.18.200.200")["reason"] == "unknown_synthetic"


def test_no_spelling_of_an_address_is_a_way(seen: dict[str, Seen]) -> None:
    scene = seen["spelled"]
    for name, result in zip(SPELLINGS, scene.results, strict=True):
        assert result["ok"] is False, name
        assert result["error"] in ("ECONNRESET", "ECONNREFUSED", "EPIPE"), (name, result)
        assert result["seconds"] < 2, name
    assert scene.reached == []
    assert {item["decision"] for item in scene.attempts(transport="tcp")} == {"deny"}
    # To ::ffff:127.0.0.2 the jail's own loopback answers, which nobody sees.
    assert sum(item.get("count", 1) for item in scene.attempts(transport="tcp")) >= len(SPELLINGS) - 1


def test_an_address_that_is_named_may_be_spelled_as_one_likes(seen: dict[str, Seen]) -> None:
    results = seen["spelled and named"].results
    assert [result["ok"] for result in results] == [True] * 6 + [False]


def test_a_redirect_leads_to_no_other_place(seen: dict[str, Seen]) -> None:
    scene = seen["redirected"]
    metadata, private, inner, loopback, permitted = scene.results
    for result in (metadata, private, inner, loopback):
        assert result["error"] in ("ECONNRESET", "ECONNREFUSED"), result
    assert "you asked for /there" in permitted["text"]
    assert {label for label, _ in scene.reached} == {"redirects", "web"}
    assert scene.one(host="169.254.169.254")["reason"] == "address_not_named"
    assert scene.one(host="inner.example.test", transport="tcp")["reason"] == "closed_address"


def test_literal_addresses_work_when_they_are_named(seen: dict[str, Seen]) -> None:
    scene = seen["named literals"]
    assert [result["ok"] for result in scene.results] == [True, True, True, False]
    assert_refused(scene.results[3])


def test_a_private_address_behind_an_allowed_name_is_not_dialled(seen: dict[str, Seen]) -> None:
    scene = seen["private behind a name"]
    assert_refused(scene.result)
    attempt = scene.one(host="internal.example.test", transport="tcp")
    assert attempt["reason"] == "closed_address"
    assert attempt["resolved_ip"] == "10.1.2.3"
    assert scene.reached == []


def test_a_private_address_is_opened_by_a_network_rule(seen: dict[str, Seen]) -> None:
    assert all(result["ok"] for result in seen["private opened"].results)


def test_of_several_addresses_only_the_open_ones_are_dialled(seen: dict[str, Seen]) -> None:
    scene = seen["mixed"]
    assert scene.result["ok"]
    assert scene.one(proto="http")["resolved_ip"] == WEB
    assert [label for label, _ in scene.reached] == ["web"]


def test_the_hosts_own_loopback_is_not_reachable_through_a_name(seen: dict[str, Seen]) -> None:
    scene = seen["loopback behind a name"]
    assert_refused(scene.result)
    assert scene.reached == []


def test_the_hosts_own_loopback_is_opened_by_its_address_and_only_by_name_from_inside(seen: dict[str, Seen]) -> None:
    by_name, by_address = seen["loopback opened"].results
    assert by_name["ok"]
    assert_refused(by_address)


def test_a_metadata_service_behind_a_name_stays_closed_under_a_wide_rule(seen: dict[str, Seen]) -> None:
    scene = seen["metadata behind a name"]
    assert_refused(scene.result)
    assert "metadata service" in scene.one(host="meta.example.test", transport="tcp")["detail"]
    assert scene.reached == []
    assert seen["metadata singly"].result["ok"]


def test_ipv4_in_ipv6_disguise_is_not_dialled(seen: dict[str, Seen]) -> None:
    scene = seen["disguised"]
    for result in scene.results:
        assert_refused(result)
    assert scene.reached == []
    assert {item["reason"] for item in scene.attempts(transport="tcp")} == {"closed_address"}


def test_a_denial_wins_over_a_wildcard(seen: dict[str, Seen]) -> None:
    denied, allowed = seen["denied wins"].results
    assert denied["error"] == "EAI_NONAME"
    assert allowed["ok"]


def test_a_denied_address_wins_over_an_allowed_name(seen: dict[str, Seen]) -> None:
    scene = seen["denied address"]
    assert_refused(scene.result)
    assert scene.one(transport="tcp")["reason"] == "denied_by_rule"


def test_tls_passes_for_its_own_name_and_nothing_else_does(seen: dict[str, Seen]) -> None:
    scene = seen["tls"]
    good, upper, pieces, other, none, plain, ssh, literal = scene.results
    for result in (good, upper, pieces):
        assert "you asked for /x" in result["text"], result
    for result in (other, none, plain, ssh, literal):
        assert_refused(result) if not str(result.get("error", "")).startswith("ssl") else None
        assert result["ok"] is False
    reasons = [item["reason"] for item in scene.attempts(transport="tcp", decision="deny")]
    assert reasons == ["sni_mismatch", "sni_missing", "not_tls", "not_tls", "address_not_named"]
    assert scene.one(reason="sni_mismatch")["sni"] == "evil.test"
    assert [item["proto"] for item in scene.attempts(reason="not_tls")] == ["http", "ssh"]
    assert len(scene.reached) == 3, "nothing of a refused flow reached the server"


def test_a_rule_may_do_without_tls_or_ask_for_it_elsewhere(seen: dict[str, Seen]) -> None:
    assert seen["tls not asked for"].result["ok"]
    scene = seen["tls asked for"]
    assert_refused(scene.result)
    assert scene.reached == []
    assert seen["ssh"].result["text"].startswith("SSH-2.0")
    assert seen["ssh"].one(transport="tcp")["proto"] == "ssh"


def test_the_tools_own_servers_work_and_hide_nothing(seen: dict[str, Seen]) -> None:
    own_v4, own_v6, own_address, closed_port, gateway, gateway_own, unspecified, gateway_v6 = seen[
        "own servers"
    ].results
    for result in (own_v4, own_v6, own_address):
        assert result.get("text") == "mine", result
    for result in (closed_port, gateway, gateway_own, unspecified, gateway_v6):
        assert_refused(result)


def test_datagrams_reach_nothing_and_fail_at_once(seen: dict[str, Seen]) -> None:
    scene = seen["datagrams"]
    dns = scene.results.pop(5)
    assert dns["answers"] == 1
    for result in scene.results:
        assert (result["ok"], result["error"]) == (False, "ECONNREFUSED")
        assert result["seconds"] < 2


def test_datagrams_are_on_record_by_name_but_not_without_end(seen: dict[str, Seen]) -> None:
    scene = seen["datagrams"]
    refused = scene.attempts(transport="udp")
    first = [(item["host"], item["port"], item["reason"]) for item in refused[:4]]
    assert first[0] == ("www.example.test", 443, "not_tcp")
    assert first[2:] == [(WEB, 443, "not_tcp"), (WEB_V6, 123, "not_tcp")]
    assert {item["proto"] for item in refused if item["host"] == OTHER} == {"quic"}
    assert 40 <= sum(item.get("count", 1) for item in refused) <= 300
    assert not [item for item in refused if item["host"] == "127.0.0.1"]
    assert any("datagrams to www.example.test:443 is not permitted" in line for line in scene.denials)


def test_other_kinds_of_sockets_are_not_there(seen: dict[str, Seen]) -> None:
    stream, *others = seen["other sockets"].results
    assert stream["ok"]
    assert [result["error"] for result in others] == [
        "EPERM", "EPROTONOSUPPORT", "EPROTONOSUPPORT", "EPERM", "EAFNOSUPPORT", "EAFNOSUPPORT", "EPROTONOSUPPORT"
    ]  # fmt: skip
