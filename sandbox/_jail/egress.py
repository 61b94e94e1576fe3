"""The jail's step `egress`: every address becomes local, every TCP connect and DNS query ends at a socket of ours.

The network namespace holds `lo` alone. One local default route per family makes all addresses local (AnyIP), and an
nf_tables rule takes every TCP connection to one listener. The sockets are made in here, belong to this namespace for
ever, and are handed out to the gateway, which lives outside: whatever it does not carry has no way out.

On kernels without nf_tables in user namespaces there is one listener for each port that the rules name; any other
port is refused by the kernel itself, and nobody sees the attempt.
"""

from __future__ import annotations

import errno

from sandbox._linux import netfilter, netlink, wire
from sandbox._linux.bare import socket, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

BACKLOG = 1024
# Well above the usual 64 KiB, as nothing but memory is crossed: a third less processor time for a gigabyte.
SEGMENT_BYTES = 400_000
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_IPV6_FREEBIND = 78
_IP_PKTINFO = 8
_NO_V6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EOPNOTSUPP, errno.EACCES, errno.EINVAL)


def egress(launch: Launch, args: dict[str, Any]) -> None:
    """Route everything to `lo`, open the listeners, hand them out. `lo` is up already."""
    families = [socket.AF_INET]
    with netlink.open_socket(netlink.NETLINK_ROUTE) as sock:
        with suppress(OSError):
            # Before Linux 5.19 there is no such size, and all goes in smaller pieces.
            netlink.request(sock, netlink.set_largest_segment(SEGMENT_BYTES), 1, "link")
        _route(sock, args["source_v4"])
        try:
            _route(sock, args["source_v6"])
            families.append(socket.AF_INET6)
        except OSError as error:
            if error.errno not in _NO_V6:
                raise
            launch.notes.append("egress: no IPv6 here")
    log: list[tuple[socket.socket, str]] = []
    if args["ports"]:
        opened = [(_listener(family, port), f"tcp{port}") for family in families for port in args["ports"]]
        launch.notes.append("egress: no nf_tables here; only the ports that rules name are seen, others are refused")
    else:
        log = _divert(launch, args)
        opened = [(_listener(family, args["port"], transparent=True), "tcp") for family in families]
    opened += [*((_dns_socket(family), "dns") for family in families), *log]
    names = [f"egress:{kind}:{index}" for index, (_, kind) in enumerate(opened)]
    wire.send(launch.status, {"ev": "egress", "fds": names}, [sock.fileno() for sock, _ in opened])
    for opened_socket, _ in opened:
        opened_socket.close()


def _divert(launch: Launch, args: dict[str, Any]) -> list[tuple[socket.socket, str]]:
    """Install the ruleset; returns the socket that sees refused datagrams, where the kernel has such a log."""
    ruleset = (args["port"], args["source_v4"], args["source_v6"])
    try:
        log = netfilter.open_log()
    except OSError as error:
        netfilter.divert_tcp(*ruleset)
        launch.notes.append(f"egress: refused datagrams are not seen here ({error})")
        return []
    try:
        netfilter.divert_tcp(*ruleset, log=True)
    except OSError as error:
        # A batch is taken as a whole or not at all, so nothing of it is installed.
        log.close()
        netfilter.divert_tcp(*ruleset)
        launch.notes.append(f"egress: refused datagrams are not seen here ({error})")
        return []
    return [(log, "log")]


def _route(sock: socket.socket, source: str) -> None:
    batch = netlink.add_local_address(source, 1) + netlink.add_local_default_route(source, 2)
    netlink.request(sock, batch, 2, "rtnetlink")


def _listener(family: int, port: int, *, transparent: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    _set_transparent(sock, family, transparent=transparent)
    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104 - of a namespace with lo alone
    sock.listen(BACKLOG)
    return sock


def _set_transparent(sock: socket.socket, family: int, *, transparent: bool) -> None:
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if transparent:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    elif transparent:
        sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)


def _dns_socket(family: int) -> socket.socket:
    """For queries to any address; the destination comes with each packet, so that the answer comes from there."""
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    _set_transparent(sock, family, transparent=False)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        # Without it an answer may come only from an address that an interface has, which a local route is not.
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 53))  # noqa: S104 - of a namespace with lo alone
    return sock
