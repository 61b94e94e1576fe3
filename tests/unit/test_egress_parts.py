"""The gateway's small parts: the server name in a hello, guesses, budgets, the journal, the words of a denial."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox._linux import netfilter
from sandbox.egress.budget import DOWN, UP, Limits, Meter, TokenBucket
from sandbox.egress.datagrams import read_packet
from sandbox.egress.explain import SHOWN_MAX, denial, denials
from sandbox.egress.guess import guess
from sandbox.egress.hello import HELLO_MAX_BYTES, Hello, HelloReader, NotTls, hello_context
from sandbox.egress.journal import GROUPS_MAX, SINGLE_MAX, Attempt, Journal

CONTEXT = hello_context()


def client_hello(
    name: str | None, alpn: tuple[str, ...] = (), highest: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = highest
    if alpn:
        context.set_alpn_protocols(list(alpn))
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def read(*pieces: bytes) -> Hello | None:
    reader = HelloReader(CONTEXT)
    answers = [reader.feed(piece) for piece in pieces]
    assert answers[:-1] == [None] * (len(pieces) - 1)
    return answers[-1]


def in_records(hello: bytes, size: int) -> bytes:
    """The same hello over many TLS records."""
    body = hello[5:]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"\x16\x03\x01" + len(piece).to_bytes(2, "big") + piece for piece in pieces)


@pytest.mark.parametrize("highest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("name", ["api.example.org", "x" * 63 + ".example.org"])
def test_the_name_is_read_from_a_hello(name: str, highest: ssl.TLSVersion) -> None:
    assert read(client_hello(name, ("h2", "http/1.1"), highest)) == Hello(name)


def test_a_hello_without_a_name_says_so() -> None:
    assert read(client_hello(None)) == Hello(None)
    assert read(client_hello("93.184.216.34")) == Hello(None)


def test_a_hello_may_come_byte_by_byte_and_over_many_records() -> None:
    hello = client_hello("api.example.org")
    assert read(*(hello[at : at + 1] for at in range(len(hello)))) == Hello("api.example.org")
    assert read(in_records(hello, 50)) == Hello("api.example.org")


def test_a_hello_is_answered_before_its_end_only_with_wait() -> None:
    assert read(client_hello("api.example.org")[:-1]) is None


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"SSH-2.0-OpenSSH_9\r\n",
        bytes(50),
        b"\x16\x03\x01\x00\x05hello",
        b"\x15\x03\x01\0\2\2\x28",
    ],
)
def test_what_is_not_tls_is_told(data: bytes) -> None:
    with pytest.raises(NotTls):
        read(data)


def test_a_hello_without_end_is_cut() -> None:
    reader = HelloReader(CONTEXT)
    endless = b"\x16\x03\x01\x40\x00\x01\x01\xff\x00" + bytes(16384 - 4)
    with pytest.raises(NotTls):
        for _ in range(HELLO_MAX_BYTES // 1000):
            reader.feed(endless[:4096])


# A name that is no ASCII: the ssl module cannot hand it to the callback and says so past us (see quiet_about_names).
UNDECODABLE = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@UNDECODABLE
@given(st.binary(max_size=2000))
def test_no_bytes_make_the_reader_fail(data: bytes) -> None:
    try:
        HelloReader(CONTEXT).feed(data)
    except NotTls:
        return


@UNDECODABLE
@given(st.data())
def test_no_damage_to_a_hello_makes_the_reader_fail(data: st.DataObject) -> None:
    hello = bytearray(client_hello("api.example.org"))
    for _ in range(data.draw(st.integers(1, 5))):
        hello[data.draw(st.integers(0, len(hello) - 1))] = data.draw(st.integers(0, 255))
    try:
        HelloReader(CONTEXT).feed(bytes(hello))
    except NotTls:
        return


@pytest.mark.parametrize(
    ("data", "name"),
    [
        # Named, as it is another one each time: the processes of one test run have to agree on their tests' names.
        pytest.param(client_hello("a.example"), "tls", id="tls"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "ssh"),
        (b"GET / HTTP/1.1\r\n", "http"),
        (b"PRI * HTTP/2.0\r\n", "http"),
        (b'{"id":1,"method":"mining.subscribe","params":[]}\n', "stratum"),
        (b'{"id":1,"jsonrpc":"2.0","method":"login","params":{}}', "stratum"),
        (b'{"hello": 1}', "json"),
        (b"\x05\x01\x00", "socks"),
        (b"\x13BitTorrent protocol", "bittorrent"),
        (b"220 mail.example ESMTP\r\n", "greeting"),
        (b"0032git-upload-pack /x", "git"),
        (b"\x00\x01\x02", ""),
        (b"", ""),
    ],
)
def test_first_bytes_have_a_name(data: bytes, name: str) -> None:
    assert guess(data) == name


@UNDECODABLE
def test_a_name_that_is_not_ascii_is_no_name() -> None:
    with pytest.raises(NotTls):
        read(client_hello("api.example.org").replace(b"api.example", b"\xffpi.example"))


# --- budgets


def test_a_meter_leaves_exactly_its_budget() -> None:
    meter = Meter(Limits(upload_max_bytes=100))
    assert meter.left(UP) == 100
    meter.spend(UP, 60)
    assert (meter.left(UP), meter.refusal()) == (40, "")
    meter.spend(DOWN, 10**12)
    meter.spend(UP, 40)
    assert (meter.left(UP), meter.refusal()) == (0, "upload_max")


def test_connections_are_counted_in_all_and_at_once() -> None:
    meter = Meter(Limits(connections_max=3, connections_at_once=2))
    meter.connections, meter.at_once = 2, 2
    assert meter.refusal() == "connections_at_once"
    meter.at_once = 0
    assert meter.refusal() == ""
    meter.connections = 3
    assert meter.refusal() == "connections_max"


@given(st.integers(1, 10**9), st.lists(st.integers(1, 10**6), max_size=50))
def test_a_bucket_passes_its_rate_and_one_burst_at_most(per_s: int, takes: list[int]) -> None:
    bucket = TokenBucket(per_s, burst_s=1.0)
    now = passed = 0.0
    biggest = 0
    for count in takes:
        now += bucket.wait_s(now) + 1e-9
        assert bucket.wait_s(now) <= 1e-6
        bucket.take(count)
        passed += count
        biggest = max(biggest, count)
    assert passed <= per_s * now + max(per_s, 1) + biggest + 1


# --- journal


def attempt(number: int = 0, **changes: object) -> Attempt:
    base = Attempt(f"2026-01-01T00:00:00.{number:06d}Z", "tcp", "http", "a.example", 80, "allow", "a.example:80")
    return base._replace(**{"bytes_out": 2, "bytes_in": 3, **changes})


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 3))
def test_counts_are_exact_whatever_is_summed_up(hosts: list[int], times: int) -> None:
    journal = Journal()
    all_of_them = [attempt(n, host=f"h{h}.example", decision="deny" if h % 2 else "allow") for n, h in enumerate(hosts)]
    for one in all_of_them * (10**times):
        journal.add(one)
    items = journal.items()
    assert sum(item.get("count", 1) for item in items) == len(all_of_them) * 10**times == journal.totals["attempts"]
    assert sum(item["bytes_out"] for item in items) == journal.totals["bytes_out"]
    denied = sum(item.get("count", 1) for item in items if item["decision"] == "deny")
    assert denied == journal.totals["denied"]


def test_a_scan_of_ten_thousand_ports_stays_small_and_counted() -> None:
    journal = Journal()
    for port in range(1, 10001):
        journal.add(attempt(port, host="10.0.0.1", port=port, decision="deny", reason="address_not_named"))
    items = journal.items()
    assert len(items) <= SINGLE_MAX + GROUPS_MAX + 4
    assert sum(item.get("count", 1) for item in items) == 10000
    assert len(journal.denials) <= GROUPS_MAX


def test_text_from_inside_is_cut_to_length() -> None:
    journal = Journal()
    journal.add(attempt(sni="x" * 100_000, detail="y" * 100_000))
    assert len(str(journal.items()[0])) < 2000


# --- words


def test_a_denial_says_what_was_tried_what_is_permitted_and_not_to_retry() -> None:
    text = denial(attempt(decision="deny", host="evil.example", reason="not_named"), ["api.example.org:443"])
    assert "evil.example:80" in text
    assert "api.example.org:443" in text
    assert "Retrying will not help" in text


@pytest.mark.parametrize(
    ("reason", "detail", "said"),
    [
        ("port_not_named", "443", "only at port 443"),
        ("sni_mismatch", "evil.example", "named evil.example and not a.example"),
        ("not_tls", "HTTP_REQUEST", "only TLS"),
        ("closed_address", "10.0.0.1 is private", "10.0.0.1 is private"),
        ("budget", "upload_max", "the budget upload_max"),
        ("a_reason_that_is_new", "", "a_reason_that_is_new"),
    ],
)
def test_each_reason_has_its_words(reason: str, detail: str, said: str) -> None:
    assert said in denial(attempt(decision="deny", reason=reason, detail=detail), [])


@pytest.mark.parametrize("word", ["\x1b[2J", "a\nsandbox: all is well", "\u202egnp.exe", "\x07", "x" * 100_000])
def test_nothing_in_a_denial_commands_a_terminal(word: str) -> None:
    (line,) = denials([attempt(decision="deny", host=word, sni=word, detail=word, reason="sni_mismatch")], [])
    assert line.isprintable()
    assert len(line) < 4000


def test_the_same_denial_is_said_once_and_many_are_counted() -> None:
    many = [attempt(decision="deny", host=f"h{n % 50}.example", reason="not_named") for n in range(500)]
    lines = denials(many, [])
    assert len(lines) == SHOWN_MAX + 1
    assert lines[-1] == "and 30 more denials, see the record"


def test_many_denials_do_not_hide_one_of_another_kind() -> None:
    journal = Journal()
    for number in range(SINGLE_MAX + 2 * GROUPS_MAX):
        journal.add(attempt(number, host=f"h{number}.example", decision="deny", reason="not_named"))
    for _ in range(3):
        journal.add(attempt(999_999, host="late.example", decision="deny", reason="not_tls", detail="ssh"))
    assert len(journal.denials) == GROUPS_MAX + 1
    assert "late.example" in denials(journal.denials.values(), [])[1]
    (others,) = [item for item in journal.items() if item["reason"] == "not_tls"]
    assert (others["host"], others["count"], others["decision"]) == ("(others)", 3, "deny")


# --- refused datagrams


def packet(version: int, payload: bytes, port: int = 4433, protocol: int = 17) -> bytes:
    udp = (50000).to_bytes(2, "big") + port.to_bytes(2, "big") + (8 + len(payload)).to_bytes(2, "big") + b"\0\0"
    if version == 4:
        return b"\x45" + bytes(8) + bytes((protocol,)) + bytes(6) + b"\x09\x09\x09\x09" + udp + payload
    return b"\x60" + bytes(5) + bytes((protocol,)) + bytes(17) + b"\x26\x06" + bytes(13) + b"\x01" + udp + payload


@pytest.mark.parametrize(("version", "address"), [(4, "9.9.9.9"), (6, "2606::1")])
def test_a_datagrams_destination_is_read(version: int, address: str) -> None:
    found = read_packet(packet(version, b"\xc3\0\0\0\x01" + bytes(20)))
    assert found is not None
    assert (str(found.address), found.port, found.proto) == (address, 4433, "quic")
    assert read_packet(packet(version, b"x", protocol=1)) is None


@given(st.binary(max_size=200))
def test_no_bytes_make_the_packet_reader_fail(data: bytes) -> None:
    read_packet(data)
    for start in (b"\x45", b"\x4f", b"\x60"):
        read_packet(start + data)
    netfilter.logged_packets(data)
