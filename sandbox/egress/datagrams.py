"""Refused datagrams, read from the first bytes of their packets: where they were going and what they look like. Pure.

The kernel has made these headers itself, as nothing inside can open a raw socket; lengths are checked all the same.
"""

from __future__ import annotations

import ipaddress
import re
import struct
from typing import Final, NamedTuple

from sandbox.egress.addresses import Address

_UDP: Final = 17
_SHAPES: Final = (
    # A long header: fixed bit set, and a version that is one (RFC 9000, 17.2; RFC 9369).
    ("quic", re.compile(rb"[\xc0-\xff](?:\0\0\0\x01|\x6b\x33\x43\xcf|\xff\0\0)", re.DOTALL)),
    ("wireguard", re.compile(rb"\x01\0\0\0", re.DOTALL)),
    ("dtls", re.compile(rb"\x16\xfe[\xfd\xff]", re.DOTALL)),
    ("ntp", re.compile(rb"[\x1b\x23\xdb\xe3][\0-\xff]{46}", re.DOTALL)),
    ("stun", re.compile(rb"[\0\x01].{3}\x21\x12\xa4\x42", re.DOTALL)),
    ("dns", re.compile(rb"..[\x01\0][\0\x10\x20]\0\x01\0\0\0\0", re.DOTALL)),
)


class Datagram(NamedTuple):
    """One refused datagram."""

    address: Address
    port: int
    proto: str


def read_packet(packet: bytes) -> Datagram | None:
    """What an IPv4 or IPv6 packet of UDP was; None for anything else, and for what is too short."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        start, protocol, address = (packet[0] & 0xF) * 4, packet[9], packet[16:20]
    elif version == 6 and len(packet) >= 40:
        start, protocol, address = 40, packet[6], packet[24:40]
    else:
        return None
    if protocol != _UDP or len(packet) < start + 8:
        return None
    (port,) = struct.unpack_from(">H", packet, start + 2)
    payload = packet[start + 8 :]
    proto = next((name for name, shape in _SHAPES if shape.match(payload)), "")
    return Datagram(ipaddress.ip_address(address), port, proto)
