"""Reaching anyone outside by a socket: services of the host, other jails, families that know no namespace."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.helpers.escape import Errno, Jail

pytestmark = [pytest.mark.needs("jail")]

REFUSED = Errno("ECONNREFUSED")
STREAM, DGRAM, RAW, SEQPACKET, PACKET = 1, 2, 3, 5, 10
CLOEXEC_NONBLOCK = 0o2004000
DIRTY = 0xDEAD_BEEF << 32
NO_FAMILY, NO_PROTOCOL = Errno("EAFNOSUPPORT"), Errno("EPROTONOSUPPORT")
# Number to the answer; names in <linux/socket.h>.
FAMILIES = {
    3: "AX25", 4: "IPX", 5: "APPLETALK", 9: "X25", 15: "KEY", 17: "PACKET", 21: "RDS", 23: "IRDA", 26: "LLC", 29: "CAN",
    30: "TIPC", 31: "BLUETOOTH", 33: "RXRPC", 35: "PHONET", 36: "IEEE802154", 37: "CAIF", 38: "ALG", 39: "NFC",
    40: "VSOCK", 41: "KCM", 42: "QIPCRTR", 43: "SMC", 44: "XDP", 45: "MCTP",
}  # fmt: skip


@contextmanager
def listening(family: socket.AddressFamily, address: object, kind: int = STREAM) -> Iterator[socket.socket]:
    """A service of the host's, and the proof that nobody spoke to it."""
    with socket.socket(family, kind) as server:
        server.bind(address)  # type: ignore[arg-type]
        if kind == STREAM:
            server.listen()
        server.setblocking(False)
        yield server
        with pytest.raises(BlockingIOError):
            server.accept() if kind == STREAM else server.recv(10)


@pytest.mark.parametrize(("family", "host"), [("inet", "127.0.0.1"), ("inet6", "::1"), ("inet", "127.0.0.53")])
def test_a_service_on_the_hosts_loopback_cannot_be_reached(jail: Jail, family: str, host: str) -> None:
    number = socket.AF_INET if family == "inet" else socket.AF_INET6
    with listening(number, (host, 0)) as server:
        port = server.getsockname()[1]
        found = jail.act(["connect", family, [host, port]], ["talk", family, [host, 0]])
    assert found == [REFUSED, "hello"]


def test_a_udp_service_on_the_hosts_loopback_cannot_be_reached(jail: Jail) -> None:
    with listening(socket.AF_INET, ("127.0.0.1", 0), DGRAM) as server:
        found = jail.one("connect", "inet", ["127.0.0.1", server.getsockname()[1]], "dgram")
    assert found == REFUSED


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "100.100.100.200", "10.0.0.1", "192.168.1.1", "172.17.0.1", "198.51.100.7", "0.0.0.1"],
)
def test_no_address_outside_has_a_route(jail: Jail, address: str) -> None:
    actions = [["connect", "inet", [address, 80]], ["connect", "inet", [address, 53], "dgram"]]
    assert jail.act(*actions) == [Errno("ENETUNREACH")] * 2


@pytest.mark.parametrize("address", ["fd00:ec2::254", "fe80::1%lo", "2001:db8::1", "::ffff:169.254.169.254"])
def test_no_address_outside_has_a_route_by_ipv6(jail: Jail, address: str) -> None:
    found = jail.one("connect", "inet6", [address, 80])
    assert found in (Errno("ENETUNREACH"), Errno("EADDRNOTAVAIL"), Errno("EINVAL")), found


def test_no_interface_but_loopback(jail: Jail) -> None:
    interfaces = jail.one("read", "/proc/net/dev").splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_names_do_not_resolve(jail: Jail) -> None:
    script = "import socket\ntry: print(socket.getaddrinfo('{}', 80))\nexcept OSError as e: print(type(e).__name__)"
    assert jail.run(["python3", "-S", "-c", script.format("example.org")]).text == "gaierror\n"
    assert "127.0.0.1" in jail.run(["python3", "-S", "-c", script.format("localhost")]).text


def test_an_abstract_socket_of_the_host_does_not_exist(jail: Jail) -> None:
    name = f"sandbox-test-{secrets.token_hex(6)}"
    with listening(socket.AF_UNIX, f"\0{name}"):
        found = jail.act(["connect", "unix", f"@{name}"], ["talk", "unix", f"@{name}"])
    assert found == [REFUSED, "hello"]


def test_an_abstract_socket_of_another_jail_does_not_exist(jail: Jail) -> None:
    name = f"sandbox-test-{secrets.token_hex(6)}"
    script = (
        "import socket, time\ns = socket.socket(socket.AF_UNIX)\n"
        f"s.bind('\\0{name}')\ns.listen()\ns.settimeout(20)\nprint('ready', flush=True)\n"
        "try: s.accept(); print('reached')\nexcept TimeoutError: print('quiet')"
    )
    heard: list[bytes] = []
    with jail.box.stream(["python3", "-S", "-c", script]) as stream:
        for _, data in stream:
            heard.append(data)
            break
        assert heard == [b"ready\n"]
        assert jail.one("connect", "unix", f"@{name}") == REFUSED
    assert jail.one("talk", "unix", f"@{name}") == "hello"


@pytest.mark.parametrize("family", FAMILIES, ids=FAMILIES.get)
@pytest.mark.parametrize("dirty", [0, DIRTY], ids=["clean", "dirty"])
def test_a_family_that_leads_out_does_not_exist(jail: Jail, family: int, dirty: int) -> None:
    """Bits above the 32 that the kernel looks at must not turn a refusal into a permission."""
    kinds = (STREAM, DGRAM, RAW, SEQPACKET)
    found = jail.act(*(["make_socket", family | dirty, kind | dirty] for kind in kinds), ["make_socket", 2, STREAM])
    assert found == [NO_FAMILY] * len(kinds) + [True]


@pytest.mark.parametrize("family", [2, 10], ids=["INET", "INET6"])
@pytest.mark.parametrize(
    ("kind", "protocol", "answer"),
    [
        (RAW, 1, "EPERM"),
        (RAW, 255, "EPERM"),
        (RAW | CLOEXEC_NONBLOCK, 6, "EPERM"),
        (RAW | DIRTY, 6 | DIRTY, "EPERM"),
        (PACKET, 0x300, "EPROTONOSUPPORT"),
        (DGRAM, 1, "EPROTONOSUPPORT"),
        (STREAM, 132, "EPROTONOSUPPORT"),
        (STREAM, 262, "EPROTONOSUPPORT"),
        (DGRAM, 136, "EPROTONOSUPPORT"),
    ],
    ids=["icmp", "ip", "flags", "dirty", "packet", "ping", "sctp", "mptcp", "udplite"],
)
def test_only_tcp_and_udp_are_spoken(jail: Jail, family: int, kind: int, protocol: int, answer: str) -> None:
    found = jail.act(
        ["make_socket", family, kind, protocol],
        ["make_socket", family, STREAM | CLOEXEC_NONBLOCK, 6],
        ["make_socket", family, DGRAM, 17],
    )
    assert found == [Errno(answer), True, True]


@pytest.mark.parametrize("protocol", [2, 4, 6, 7, 9, 10, 12, 15, 16, 20])
def test_netlink_answers_for_routes_alone(jail: Jail, protocol: int) -> None:
    found = jail.act(["make_socket", 16, RAW, protocol], ["make_socket", 16, RAW, 0])
    assert found == [NO_PROTOCOL, True]


def test_interfaces_and_routes_cannot_be_changed(jail: Jail) -> None:
    """NETLINK_ROUTE is open for questions; RTM_NEWADDR is answered by the kernel: no CAP_NET_ADMIN."""
    script = """
import socket, struct
s = socket.socket(16, socket.SOCK_RAW, 0)
address = struct.pack("=BBBBI", 2, 8, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes([10, 1, 2, 3]))
s.send(struct.pack("=IHHII", 16 + len(address), 20, 0x405, 1, 0) + address)
print(-struct.unpack_from("=i", s.recv(4096), 16)[0])
s.send(struct.pack("=IHHII", 17, 18, 0x301, 2, 0) + b"\\0")
print(struct.unpack_from("=IH", s.recv(65536))[1])
"""
    # EPERM for the change; RTM_NEWLINK (16) as the answer to the question.
    assert jail.run(["python3", "-S", "-c", script]).text == "1\n16\n"


def test_a_listener_inside_cannot_be_reached_from_the_host(jail: Jail) -> None:
    script = (
        "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 0))\ns.listen()\n"
        "print(s.getsockname()[1], flush=True)\ns.settimeout(20)\ns.accept()"
    )
    with jail.box.stream(["python3", "-S", "-c", script]) as stream:
        _, data = next(iter(stream))
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", int(data))) == 111


def test_ports_below_1024_and_own_servers_work(jail: Jail) -> None:
    assert jail.act(["talk", "inet", ["127.0.0.1", 0]], ["talk", "inet6", ["::1", 0]]) == ["hello"] * 2


def test_descriptors_cannot_be_passed_between_jails(jail: Jail) -> None:
    """SCM_RIGHTS needs a socket that both see; a path in a shared workspace is the only meeting point."""
    done = threading.Event()
    assert not done.is_set()
    actions = [["talk", "unix", "/tmp/one"], ["exists", "/tmp/one"]]
    assert jail.act(*actions) == ["hello", True]
    assert jail.act(["exists", "/tmp/one"], ["connect", "unix", "/tmp/one"]) == [False, Errno("ENOENT")]


def test_agents_and_daemons_of_the_caller_are_out_of_reach(jail: Jail) -> None:
    paths = ["/var/run/docker.sock", "/run/dbus/system_bus_socket", "/run/user/0/bus", "/tmp/.X11-unix/X0"]
    paths += [os.environ.get("SSH_AUTH_SOCK", "/tmp/ssh-agent")]
    assert jail.act(*(["connect", "unix", path] for path in paths)) == [Errno("ENOENT")] * len(paths)
