"""rtnetlink(7): addresses and routes of the current network namespace, by messages of our own.

One socket, one sendmsg for a whole batch, one acknowledgement a message. Only what a jail needs is here.
"""

from __future__ import annotations

import os
import struct

from sandbox._linux.bare import Socket, socket

NLM_F_REQUEST = 0x001
NLM_F_ACK = 0x004
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLMSG_ERROR = 2
NLMSG_DONE = 3
NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

_RTM_NEWLINK = 16
_RTM_NEWADDR = 20
_RTM_GETADDR = 22
_RTM_NEWROUTE = 24
_IFA_ADDRESS = 1
_IFA_LOCAL = 2
_IFA_F_NODAD = 0x02
_IFLA_GSO_MAX_SIZE = 41
_IFLA_GSO_IPV4_MAX_SIZE = 63
_RTA_OIF = 4
_RTA_PREFSRC = 7
_RT_TABLE_LOCAL = 255
_RTPROT_STATIC = 4
_RT_SCOPE_HOST = 254
_RTN_LOCAL = 2
_LO_INDEX = 1
_HEADER = struct.Struct("=IHHII")
_RECEIVE_BYTES = 1 << 16


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def add_local_address(address: str, sequence: int = 1) -> bytes:
    """A request that gives `lo` one more address."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    flags = _IFA_F_NODAD if family == socket.AF_INET6 else 0
    body = struct.pack("=BBBBI", family, 8 * len(packed), flags, 0, _LO_INDEX)
    body += attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)
    return message(_RTM_NEWADDR, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, sequence, body)


def add_local_default_route(source: str, sequence: int = 1) -> bytes:
    """A request that makes every address of the family of `source` local, reached from `source`."""
    family, scope = (socket.AF_INET6, 0) if ":" in source else (socket.AF_INET, _RT_SCOPE_HOST)
    packed = socket.inet_pton(family, source)
    body = struct.pack("=8BI", family, 0, 0, 0, _RT_TABLE_LOCAL, _RTPROT_STATIC, scope, _RTN_LOCAL, 0)
    body += attribute(_RTA_OIF, struct.pack("=I", _LO_INDEX)) + attribute(_RTA_PREFSRC, packed)
    return message(_RTM_NEWROUTE, NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, sequence, body)


def set_largest_segment(size_bytes: int, sequence: int = 1) -> bytes:
    """A request that lets TCP over `lo` go in pieces of up to `size_bytes`, instead of 64 KiB ("BIG TCP").

    IPv6 since Linux 5.19, IPv4 since 6.3, which is also when the attribute for it is known: others leave it unread.
    """
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, _LO_INDEX, 0, 0)
    for kind in (_IFLA_GSO_MAX_SIZE, _IFLA_GSO_IPV4_MAX_SIZE):
        body += attribute(kind, struct.pack("=I", size_bytes))
    return message(_RTM_NEWLINK, NLM_F_REQUEST | NLM_F_ACK, sequence, body)


def request(sock: socket.socket, batch: bytes, answers: int, what: str) -> None:
    """Send requests and read one acknowledgement each. Raises OSError with the kernel's answer to the first refused."""
    sock.sendto(batch, (0, 0))
    refusal = 0
    while answers > 0:
        data = sock.recv(_RECEIVE_BYTES)
        while data:
            size, kind, _, _, _ = _HEADER.unpack_from(data)
            if kind == NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", data, _HEADER.size)
                refusal = refusal or -code
                answers -= 1
            data = data[(size + 3) & ~3 :]
    if refusal:
        raise OSError(refusal, f"{what}: {os.strerror(refusal)}")


def open_socket(protocol: int) -> Socket:
    """A bound netlink socket that gives up waiting after some seconds: the kernel answers at once or never."""
    sock = Socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    sock.settimeout(10.0)
    sock.bind((0, 0))
    return sock


def interface_addresses() -> set[str]:
    """Every address of every interface in the current network namespace, as text."""
    found: set[str] = set()
    body = struct.pack("=BBBBI", socket.AF_UNSPEC, 0, 0, 0, 0)
    with open_socket(NETLINK_ROUTE) as sock:
        sock.sendto(message(_RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, body), (0, 0))
        while True:
            data = sock.recv(_RECEIVE_BYTES)
            while data:
                size, kind, _, _, _ = _HEADER.unpack_from(data)
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    (code,) = struct.unpack_from("=i", data, _HEADER.size)
                    raise OSError(-code, f"rtnetlink RTM_GETADDR: {os.strerror(-code)}")
                if kind == _RTM_NEWADDR:
                    found.update(_addresses(data[_HEADER.size + 8 : size]))
                data = data[(size + 3) & ~3 :]


def _addresses(attributes: bytes) -> list[str]:
    found = []
    while len(attributes) >= 4:
        size, kind = struct.unpack_from("=HH", attributes)
        if kind in (_IFA_ADDRESS, _IFA_LOCAL) and size in (8, 20):
            family = socket.AF_INET if size == 8 else socket.AF_INET6
            found.append(socket.inet_ntop(family, attributes[4:size]))
        attributes = attributes[(max(size, 4) + 3) & ~3 :]
    return found
