"""One nf_tables ruleset, as the bytes of a netlink batch: every TCP connection to one transparent listener.

`nft -f` would cost 2 ms and a program that not every host has; the batch costs a tenth of a millisecond. What it says:

    table inet sandbox {
        chain egress {
            type filter hook prerouting priority mangle; policy accept;
            meta nfproto ipv4 meta l4proto tcp ip daddr != 127.0.0.0/8 ip daddr != OWN tproxy ip to :PORT
            meta nfproto ipv6 meta l4proto tcp ip6 daddr != ::1 ip6 daddr != OWN tproxy ip6 to :PORT
        }
    }

TPROXY hands a SYN to the listener as it is: no translation, no conntrack entry, and the accepted socket's own name is
the original destination. Packets of connections that exist find their socket first. It needs no mark and no policy
route, since the packets leave by `lo` and come back by it. Source: net/netfilter/nft_tproxy.c,
include/uapi/linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import socket
import struct

from sandbox._linux import netlink

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
_EQUAL = 0
_NOT_EQUAL = 1

TABLE = b"sandbox\0"
CHAIN = b"egress\0"


def divert_tcp(port: int, own_v4: str, own_v6: str) -> None:
    """Install the ruleset in the current network namespace. Needs CAP_NET_ADMIN there.

    `own_v4`, `own_v6`: addresses of the namespace itself, at which its programs reach each other.

    Raises OSError: ENOENT or EOPNOTSUPP where the kernel has no nf_tables or no TPROXY.
    """
    with netlink.open_socket(netlink.NETLINK_NETFILTER) as sock:
        own = {_NFPROTO_IPV4: socket.inet_pton(socket.AF_INET, own_v4)}
        own[_NFPROTO_IPV6] = socket.inet_pton(socket.AF_INET6, own_v6)
        netlink.request(sock, _batch(port, own), 4, "nf_tables")


def _batch(port: int, own: dict[int, bytes]) -> bytes:
    table = netlink.attribute(1, TABLE)
    hook = _nested(4, _u32(1, _HOOK_PREROUTING) + _i32(2, _PRIORITY_MANGLE))
    chain = (
        netlink.attribute(1, TABLE)
        + netlink.attribute(3, CHAIN)
        + hook
        + _u32(5, _ACCEPT)
        + netlink.attribute(7, b"filter\0")
    )
    return (
        _control(_BATCH_BEGIN, 0)
        + _message(_NEWTABLE, netlink.NLM_F_CREATE, 1, table)
        + _message(_NEWCHAIN, netlink.NLM_F_CREATE, 2, chain)
        + _message(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND, 3, _rule(_NFPROTO_IPV4, port, own))
        + _message(_NEWRULE, netlink.NLM_F_CREATE | netlink.NLM_F_APPEND, 4, _rule(_NFPROTO_IPV6, port, own))
        + _control(_BATCH_END, 5)
    )


def _rule(family: int, port: int, own: dict[int, bytes]) -> bytes:
    """Only the first byte is looked at for IPv4: 127.0.0.0/8 is the tool's own loopback."""
    offset, loopback = (16, b"\x7f") if family == _NFPROTO_IPV4 else (24, bytes(15) + b"\x01")
    expressions = (
        _expression(b"meta", _u32(1, _REGISTER) + _u32(2, _META_NFPROTO))
        + _compare(_EQUAL, bytes((family,)))
        + _expression(b"meta", _u32(1, _REGISTER) + _u32(2, _META_L4PROTO))
        + _compare(_EQUAL, bytes((socket.IPPROTO_TCP,)))
        + _load_destination(offset, len(loopback))
        + _compare(_NOT_EQUAL, loopback)
        + _load_destination(offset, len(own[family]))
        + _compare(_NOT_EQUAL, own[family])
        + _expression(b"immediate", _u32(1, _REGISTER) + _nested(2, netlink.attribute(1, struct.pack(">H", port))))
        + _expression(b"tproxy", _u32(1, family) + _u32(3, _REGISTER))
    )
    return netlink.attribute(1, TABLE) + netlink.attribute(2, CHAIN) + _nested(4, expressions)


def _load_destination(offset: int, size: int) -> bytes:
    data = _u32(1, _REGISTER) + _u32(2, _NETWORK_HEADER) + _u32(3, offset) + _u32(4, size)
    return _expression(b"payload", data)


def _expression(name: bytes, data: bytes) -> bytes:
    return _nested(1, netlink.attribute(1, name + b"\0") + _nested(2, data))


def _compare(operation: int, value: bytes) -> bytes:
    data = _nested(3, netlink.attribute(1, value))
    return _expression(b"cmp", _u32(1, _REGISTER) + _u32(2, operation) + data)


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
