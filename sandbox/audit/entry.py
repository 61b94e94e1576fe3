"""The form of one entry in a chain: names, genesis, and how an entry is sealed to the one before it.

An entry is a record object with `entry` (opened, closed, notice) and `integrity`. Its hash is SHA-256 over the
canonical bytes of the whole entry without `integrity.hash`, so the sequence number, the chain's name and the previous
hash are all inside what is hashed. Pure; `docs/record.md` describes the format for other programs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from sandbox.audit.canonical import encode, unwritten
from sandbox.digests import sha256

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Literal

    EntryKind = Literal["opened", "closed", "notice"]

SCHEMA = "sandbox.audit/v1"
ALG = "sha256"
FIRST_SEQ = 1
ENTRY_MAX_BYTES = 16 * 1024 * 1024
SEGMENT_NAME = re.compile(r"([0-9]{6})\.jsonl")

ENTRY_KINDS = ("opened", "closed", "notice")


def genesis(chain_id: str) -> str:
    """The `prev_hash` of a chain's first entry: bound to the chain's name, so chains cannot stand in for each other."""
    return sha256(f"{SCHEMA} genesis {chain_id}\n".encode()).hexdigest()


def segment_name(number: int) -> str:
    return f"{number:06d}.jsonl"


def entry_hash(entry: Mapping[str, Any]) -> str:
    """SHA-256, as hex, over the canonical bytes of an entry without its own hash."""
    integrity = {key: value for key, value in entry["integrity"].items() if key != "hash"}
    return sha256(encode({**entry, "integrity": integrity})).hexdigest()


def seal(record: Mapping[str, Any], kind: EntryKind, chain_id: str, seq: int, prev_hash: str) -> tuple[bytes, str]:
    """One line (with its newline) and its hash, for `record` as entry `seq` of the chain."""
    # The data is walked and encoded once: with a stand-in for the hash, which is then cut out for hashing and replaced
    # for storing. One that nobody knows, because the record holds data of the tool's choosing.
    stand_in = f"{unwritten()}-hash".encode()
    integrity = {"alg": ALG, "chain": chain_id, "hash": stand_in.decode(), "prev_hash": prev_hash, "seq": seq}
    body = encode({**record, "schema": SCHEMA, "entry": kind, "integrity": integrity})
    head, tail = body.split(stand_in)
    content = head.removesuffix(b'"hash":"') + tail.removeprefix(b'",')
    value = sha256(content).hexdigest()
    return head + value.encode() + tail + b"\n", value
