"""One nf_tables ruleset, as the bytes of a netlink batch: TCP to one transparent listener, datagrams to a log.

`nft -f` would cost 2 ms and a program that not every host has; the batch costs a tenth of a millisecond. What it says,
the first two rules for each family:

    table inet sandbox {
        chain egress {
            type filter hook prerouting priority mangle; policy accept;
            ip daddr 127.0.0.0/8 accept
            ip daddr OWN accept
            ip protocol tcp tproxy ip to :PORT
            udp dport 53 accept
            ip protocol udp limit rate 20/second burst 50 packets log group 1 snaplen 128
        }
    }

TPROXY hands a SYN to the listener as it is: no translation, no conntrack entry, and the accepted socket's own name is
the original destination. Packets of connections that exist find their socket first. It needs no mark and no policy
route, since the packets leave by `lo` and come back by it. A logged datagram is only seen, and only so many a second;
what becomes of it is the namespace's own refusal, as nothing is bound at its port.
Source: net/netfilter/nft_tproxy.c, nft_log.c, nfnetlink_log.c, include/uapi/linux/netfilter/.
"""

from __future__ import annotations

import struct

from sandbox._linux import netlink
from sandbox._linux.bare import socket

_BATCH_BEGIN = 0x10
_BATCH_END = 0x11
_SUBSYSTEM = 10
_NEWTABLE = 0
_NEWCHAIN = 3
_NEWRULE = 6
_NFPROTO_INET = 1
_NFPROTO_IPV4 = 2
_NFPROTO_IPV6 = 10
_HOOK_PREROUTING = 0
_PRIORITY_MANGLE = -150
_ACCEPT = 1
_NESTED = 0x8000
_REGISTER = 1
_META_NFPROTO = 15
_META_L4PROTO = 16
_NETWORK_HEADER = 1
_TRANSPORT_HEADER = 2
_EQUAL = 0
_VERDICT_REGISTER = 0
LOG_GROUP = 1
LOG_BYTES = 128
_LOG_SUBSYSTEM = 4
_LOG_PACKET = _LOG_SUBSYSTEM << 8
_LOG_CONFIG = _LOG_SUBSYSTEM << 8 | 1
_NFULA_CFG_CMD = 1
_NFULA_CFG_MODE = 2
_NFULA_CFG_QTHRESH = 5
_NFULNL_CFG_CMD_BIND = 1
_NFULNL_COPY_PACKET = 2
_NFULA_PAYLOAD = 9

TABLE = b"sandbox\0"
CHAIN = b"egress\0"


def divert_tcp(port: int, own_v4: str, own_v6: str, *, log: bool = False) -> None:
    """Install the ruleset in the current network namespace, with or without the log. Needs CAP_NET_ADMIN there.

    `own_v4`, `own_v6`: addresses of the namespace itself, at which its programs reach each other.
    Raises OSError: ENOENT or EOPNOTSUPP where the kernel has no nf_tables, no TPROXY or no log.
    """
    v4, v6 = socket.inet_pton(socket.AF_INET, own_v4), socket.inet_pton(socket.AF_INET6, own_v6)
    rules = [
        *(_accept(_NFPROTO_IPV4, address) for address in (b"\x7f", v4)),
        *(_accept(_NFPROTO_IPV6, address) for address in (bytes(15) + b"\x01", v6)),
        *(_divert(family, port) for family in (_NFPROTO_IPV4, _NFPROTO_IPV6)),
    ]
    if log:
        rules.append(_match_protocol(socket.IPPROTO_UDP) + _load(_TRANSPORT_HEADER, 2, 2) + _DNS_PORT + _ACCEPTED)
        rules.append(_match_protocol(socket.IPPROTO_UDP) + _LIMIT + _LOG)
    with netlink.open_socket(netlink.NETLINK_NETFILTER) as sock:
        netlink.request(sock, _batch(rules), 2 + len(rules), "nf_tables")


def open_log() -> socket.socket:
    """A socket that gets what the log rule logs, in this network namespace for as long as it is open.

    Raises OSError where the kernel has no nfnetlink_log.
    """
    sock = netlink.open_socket(netlink.NETLINK_NETFILTER)
    try:
        group = struct.pack(">BBH", socket.AF_UNSPEC, 0, LOG_GROUP)
        bind = netlink.attribute(_NFULA_CFG_CMD, bytes((_NFULNL_CFG_CMD_BIND,)))
        mode = netlink.attribute(_NFULA_CFG_MODE, struct.pack(">IBB", LOG_BYTES, _NFULNL_COPY_PACKET, 0))
        at_once = netlink.attribute(_NFULA_CFG_QTHRESH, struct.pack(">I", 1))
        flags = netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
        batch = netlink.message(_LOG_CONFIG, flags, 1, group + bind)
        batch += netlink.message(_LOG_CONFIG, flags, 2, group + mode + at_once)
        netlink.request(sock, batch, 2, "nfnetlink_log")
    except OSError:
        sock.close()
        raise
    return sock


def logged_packets(data: bytes) -> list[bytes]:
    """The first bytes of each packet, from its IP header on, in what a log socket received."""
    found = []
    while len(data) >= 20:
        size, kind = struct.unpack_from("=IH", data)
        attributes = data[20:size] if kind == _LOG_PACKET else b""
        while len(attributes) >= 4:
            length, name = struct.unpack_from("=HH", attributes)
            if name & ~_NESTED == _NFULA_PAYLOAD:
                found.append(attributes[4:length])
            attributes = attributes[max(4, length + 3 & ~3) :]
        data = data[max(20, size + 3 & ~3) :]
    return found


def _batch(rules: list[bytes]) -> bytes:
    table = netlink.attribute(1, TABLE)
    hook = _nested(4, _u32(1, _HOOK_PREROUTING) + _i32(2, _PRIORITY_MANGLE))
    kind = _u32(5, _ACCEPT) + netlink.attribute(7, b"filter\0")
    chain = netlink.attribute(1, TABLE) + netlink.attribute(3, CHAIN) + hook + kind
    place = netlink.attribute(1, TABLE) + netlink.attribute(2, CHAIN)
    return (
        _control(_BATCH_BEGIN, 0)
        + _message(_NEWTABLE, netlink.NLM_F_CREATE, 1, table)
        + _message(_NEWCHAIN, netlink.NLM_F_CREATE, 2, chain)
        + b"".join(
            _message(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND, 3 + index, place + _nested(4, expressions))
            for index, expressions in enumerate(rules)
        )
        + _control(_BATCH_END, 3 + len(rules))
    )


def _accept(family: int, start_of_address: bytes) -> bytes:
    """Leave alone what goes to addresses that begin so."""
    offset = 16 if family == _NFPROTO_IPV4 else 24
    load = _load(_NETWORK_HEADER, offset, len(start_of_address))
    return _match_family(family) + load + _compare(start_of_address) + _ACCEPTED


def _divert(family: int, port: int) -> bytes:
    target = _expression(b"immediate", _u32(1, _REGISTER) + _nested(2, netlink.attribute(1, struct.pack(">H", port))))
    tproxy = _expression(b"tproxy", _u32(1, family) + _u32(3, _REGISTER))
    return _match_family(family) + _match_protocol(socket.IPPROTO_TCP) + target + tproxy


def _match_family(family: int) -> bytes:
    return _expression(b"meta", _u32(1, _REGISTER) + _u32(2, _META_NFPROTO)) + _compare(bytes((family,)))


def _match_protocol(protocol: int) -> bytes:
    return _expression(b"meta", _u32(1, _REGISTER) + _u32(2, _META_L4PROTO)) + _compare(bytes((protocol,)))


def _load(header: int, offset: int, size: int) -> bytes:
    return _expression(b"payload", _u32(1, _REGISTER) + _u32(2, header) + _u32(3, offset) + _u32(4, size))


def _expression(name: bytes, data: bytes) -> bytes:
    return _nested(1, netlink.attribute(1, name + b"\0") + _nested(2, data))


def _compare(value: bytes) -> bytes:
    data = _nested(3, netlink.attribute(1, value))
    return _expression(b"cmp", _u32(1, _REGISTER) + _u32(2, _EQUAL) + data)


def _u32(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, struct.pack(">I", value))


def _i32(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, struct.pack(">i", value))


def _nested(kind: int, payload: bytes) -> bytes:
    return netlink.attribute(kind | _NESTED, payload)


def _message(kind: int, flags: int, sequence: int, attributes: bytes) -> bytes:
    body = struct.pack(">BBH", _NFPROTO_INET, 0, 0) + attributes
    flags |= netlink.NLM_F_REQUEST | netlink.NLM_F_ACK
    return netlink.message(_SUBSYSTEM << 8 | kind, flags, sequence, body)


def _control(kind: int, sequence: int) -> bytes:
    body = struct.pack(">BBH", socket.AF_UNSPEC, 0, _SUBSYSTEM)
    return netlink.message(kind, netlink.NLM_F_REQUEST, sequence, body)


def _u64(kind: int, value: int) -> bytes:
    return netlink.attribute(kind, struct.pack(">Q", value))


_ACCEPTED = _expression(b"immediate", _u32(1, _VERDICT_REGISTER) + _nested(2, _nested(2, _u32(1, _ACCEPT))))
_DNS_PORT = _compare(struct.pack(">H", 53))
_LIMIT = _expression(b"limit", _u64(1, 20) + _u64(2, 1) + _u32(3, 50))
_LOG = _expression(b"log", netlink.attribute(1, struct.pack(">H", LOG_GROUP)) + _u32(3, LOG_BYTES))
