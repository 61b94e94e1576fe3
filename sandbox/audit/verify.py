"""Prove offline, from the files alone, that a chain's entries are whole, unchanged and in order.

The checks, in the order in which each entry meets them; the first that fails raises ChainBroken and names the entry:

     1 segments    the segment files are numbered from 1 without a gap
     2 parse       each line is one JSON object, ended by a newline
     3 schema      it has the fields of an entry of this version
     4 canonical   its bytes are the RFC 8785 bytes of what it says
     5 chain       it names this chain
     6 sequence    it carries the next number
     7 link        its prev_hash is the hash of the entry before, or the genesis value
     8 hash        its hash is the hash of its content
     9 pairing     a record is opened once and then closed once
    10 head        the chain ends where its `clean` marker says it ended

It needs no privilege, no key and, but for the error type and the names of the format, no other part of the package:
the bytes come from the rfc8785 library, not from the code that wrote them. What this does not prove is in
`docs/record.md`: chiefly, a cut at the end of a chain without marker, and a rewrite of all of it by whoever owns it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rfc8785

from sandbox.audit.canonical import visible
from sandbox.audit.entry import ALG, ENTRY_KINDS, ENTRY_MAX_BYTES, FIRST_SEQ, SCHEMA, genesis, segment_name
from sandbox.audit.segments import list_segments, parse, read_lines
from sandbox.errors import AuditError, ChainBroken

CHECKS = ("segments", "parse", "schema", "canonical", "chain", "sequence", "link", "hash", "pairing", "head")


@dataclass(frozen=True, slots=True)
class ChainReport:
    """What verification found. `open_records` have no closed entry: running, or not yet recovered.

    `torn` names what an interrupted write left: kept aside or, in a chain not yet recovered, still at its end.
    """

    chain_id: str
    path: str
    entries: int = 0
    records: int = 0
    head_seq: int = 0
    head_hash: str = ""
    open_records: tuple[str, ...] = ()
    torn: tuple[str, ...] = ()
    is_clean: bool = False
    broken: ChainBroken | None = None

    def to_json(self) -> dict[str, Any]:
        data = {name: getattr(self, name) for name in self.__slots__ if name != "broken"}
        broken = self.broken and {
            "message": self.broken.message,
            "index": self.broken.index,
            "expected": self.broken.expected,
            "found": self.broken.found,
        }
        return {**data, "ok": self.broken is None, "broken": broken}


def _broken(check: str, where: str, index: int, expected: str, found: str) -> ChainBroken:
    number = CHECKS.index(check) + 1
    message = f"entry {index} ({where}) fails check {number}, {check}: expected {expected}, found {found}"
    return ChainBroken(message, index=index, expected=expected, found=found)


@dataclass
class _Walk:
    """The state of one chain's verification: feed it the lines in order."""

    chain_id: str = ""
    seq: int = FIRST_SEQ - 1
    head: str = ""
    records: int = 0
    opened: dict[str, int] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)

    def feed(self, line: bytes, where: str) -> None:
        """Check one line. Raises ChainBroken with the number this entry should have had."""
        index = self.seq + 1
        entry = self._parse(line, where, index)
        integrity = entry["integrity"]
        if not self.chain_id:
            self.chain_id = integrity["chain"]
        prev_hash = self.head or genesis(self.chain_id)
        with_hash, without_hash = _canonical(entry, where, index)
        actual = hashlib.sha256(without_hash).hexdigest()
        pairs: tuple[tuple[str, str | bytes | int, str | bytes | int], ...] = (
            ("canonical", with_hash + b"\n", line),
            ("chain", self.chain_id, integrity["chain"]),
            ("sequence", index, integrity["seq"]),
            ("link", prev_hash, integrity["prev_hash"]),
            ("hash", actual, integrity["hash"]),
        )
        for check, expected, found in pairs:
            if expected != found:
                raise _broken(check, where, index, _short(expected), _short(found))
        self._pair(entry, where, index)
        self.seq, self.head = index, integrity["hash"]

    def _parse(self, line: bytes, where: str, index: int) -> dict[str, Any]:
        try:
            if not line.endswith(b"\n"):
                raise ValueError("no newline at the end")
            entry = parse(line)
        except ValueError as err:
            raise _broken("parse", where, index, "one JSON object on one line", str(err)) from err
        problem = schema_problem(entry)
        if problem:
            raise _broken("schema", where, index, problem[0], problem[1])
        return entry

    def _pair(self, entry: dict[str, Any], where: str, index: int) -> None:
        kind = entry["entry"]
        if kind == "notice":
            return
        record_id = entry["record_id"]
        if kind == "opened":
            if record_id in self.opened or record_id in self.closed:
                raise _broken("pairing", where, index, "a record not seen before", f"{record_id} opened again")
            self.opened[record_id] = index
            self.records += 1
        elif record_id in self.closed:
            raise _broken("pairing", where, index, "one closed entry per record", f"{record_id} closed again")
        elif record_id not in self.opened:
            raise _broken("pairing", where, index, "an opened entry before", f"{record_id} closed, never opened")
        else:
            del self.opened[record_id]
            self.closed.add(record_id)


def schema_problem(entry: dict[str, Any]) -> tuple[str, str] | None:
    """What is wrong with an entry's form: (expected, found), or None."""
    integrity = entry.get("integrity")
    if entry.get("schema") != SCHEMA:
        return f"schema {SCHEMA}", _short(entry.get("schema"))
    if entry.get("entry") not in ENTRY_KINDS:
        return f"entry one of {', '.join(ENTRY_KINDS)}", _short(entry.get("entry"))
    if not isinstance(integrity, dict) or integrity.get("alg") != ALG:
        return f"integrity with alg {ALG}", _short(integrity)
    for name, kind in (("chain", str), ("hash", str), ("prev_hash", str), ("seq", int)):
        if type(integrity.get(name)) is not kind:
            return f"integrity.{name} as {kind.__name__}", _short(integrity.get(name))
    if entry["entry"] == "notice":
        return None
    if not isinstance(entry.get("record_id"), str) or not entry["record_id"]:
        return "a record_id", _short(entry.get("record_id"))
    ending = entry.get("ending")
    if entry["entry"] == "closed" and not (isinstance(ending, dict) and {"kind", "fault"} <= set(ending)):
        return "an ending with kind and fault", _short(ending)
    return None


def _short(value: object) -> str:
    """A value for a message: never more than a line, and nothing in it that a terminal obeys."""
    text = visible(value) if isinstance(value, str) else ascii(value)
    return text if len(text) <= 100 else text[:99] + "…"


def _canonical(entry: dict[str, Any], where: str, index: int) -> tuple[bytes, bytes]:
    """The canonical bytes of the entry, and the same without `integrity.hash`; the big parts are written once."""
    integrity = entry["integrity"]
    bare = {key: value for key, value in integrity.items() if key != "hash"}
    before = {key: value for key, value in entry.items() if key < "integrity"}
    after = {key: value for key, value in entry.items() if key > "integrity"}
    try:
        # Both are never empty: `entry` sorts before `integrity`, `schema` after it.
        head = rfc8785.dumps(before)[:-1] + b',"integrity":'
        tail = b"," + rfc8785.dumps(after)[1:]
        return head + rfc8785.dumps(integrity) + tail, head + rfc8785.dumps(bare) + tail
    except (ValueError, RecursionError) as err:
        raise _broken("canonical", where, index, "data that RFC 8785 can write", str(err)) from err


def verify_chain(path: str | Path, *, chain_id: str = "") -> ChainReport:
    """Check a chain's directory. `chain_id`: the name it must have; by default the one its first entry gives.

    Raises ChainBroken for the first entry that fails, AuditError when the files cannot be read.
    """
    path = Path(path)
    walk = _Walk(chain_id)
    segments = list_segments(path)
    for number, segment in enumerate(segments, 1):
        if segment.name != segment_name(number):
            # What the missing segment held is unknown: the entry named is the first that could have stood in it.
            _feed_segments(walk, segments[: number - 1])
            raise _broken("segments", str(path), walk.seq + 1, segment_name(number), segment.name)
    torn = _feed_segments(walk, segments)
    torn += [f"{kept.name} ({kept.stat().st_size} bytes, kept aside)" for kept in sorted(path.glob("*.torn*"))]
    return _report(walk, path, torn, is_clean=_check_head(walk, path))


def _feed_segments(walk: _Walk, segments: list[Path]) -> list[str]:
    torn: list[str] = []
    for segment in segments:
        for line_nr, line in enumerate(read_lines(segment), 1):
            # A line over the bound comes out cut as well, but it is not the end of the file: that one fails to parse.
            if segment is segments[-1] and not line.endswith(b"\n") and len(line) <= ENTRY_MAX_BYTES:
                torn.append(f"{segment.name} line {line_nr} ({len(line)} bytes, not ended)")
                break
            walk.feed(line, f"{segment.name} line {line_nr}")
    return torn


def _check_head(walk: _Walk, path: Path) -> bool:
    """Compare the end with the marker written when the chain was finished; False when there is none."""
    marker = path / "clean"
    if not marker.exists():
        return False
    try:
        head = parse(next(iter(read_lines(marker)), b""))
    except ValueError as err:
        raise _broken("head", marker.name, walk.seq + 1, "a readable marker", str(err)) from err
    # A chain marked before its first entry gives no name of its own.
    value = walk.head or genesis(walk.chain_id or str(head.get("chain")))
    expected, found = f"{head.get('seq')} {head.get('hash')}", f"{walk.seq} {value}"
    if expected != found:
        raise _broken("head", marker.name, walk.seq + 1, f"the end at {expected}", found)
    return True


def _report(walk: _Walk, path: Path, torn: list[str], *, is_clean: bool) -> ChainReport:
    return ChainReport(
        chain_id=walk.chain_id or path.name,
        path=str(path),
        entries=walk.seq,
        records=walk.records,
        head_seq=walk.seq,
        head_hash=walk.head,
        open_records=tuple(walk.opened),
        torn=tuple(torn),
        is_clean=is_clean,
    )


def verify_file(path: str | Path) -> list[ChainReport]:
    """Check a file of entries, such as an export: each chain in it must be there from its first entry on."""
    path = Path(path)
    walks: dict[str, _Walk] = {}
    broken: dict[str, ChainBroken] = {}
    torn: dict[str, list[str]] = {}
    chain_id = path.name
    for line_nr, line in enumerate(read_lines(path), 1):
        chain_id = _named_chain(line) or chain_id
        walk = walks.setdefault(chain_id, _Walk(chain_id))
        where = f"{path.name} line {line_nr}"
        if not line.endswith(b"\n") and len(line) <= ENTRY_MAX_BYTES:
            torn.setdefault(chain_id, []).append(f"{where} ({len(line)} bytes, not ended)")
            break
        if chain_id in broken:
            continue
        try:
            walk.feed(line, where)
        except ChainBroken as err:
            broken[chain_id] = err
    return [
        replace(_report(walk, path, torn.get(name, []), is_clean=False), broken=broken.get(name))
        for name, walk in walks.items()
    ]


def _named_chain(line: bytes) -> str:
    """The chain that a line says it belongs to; nothing when it does not parse, which `feed` then reports."""
    try:
        entry = parse(line)
    except ValueError:
        return ""
    integrity = entry.get("integrity")
    chain = integrity.get("chain") if isinstance(integrity, dict) else None
    return chain if isinstance(chain, str) else ""


def verify_state(state: str | Path) -> list[ChainReport]:
    """Check every chain under a state directory; a broken one has `broken` set, the others are still checked."""
    chains = Path(state) / "chains"
    try:
        paths = sorted(path for path in chains.iterdir() if path.is_dir()) if chains.is_dir() else []
    except OSError as err:
        raise AuditError(f"cannot read {chains}: {err.strerror}") from err
    return [_checked(path, path.name) for path in paths]


def verify_paths(paths: Iterable[str | Path]) -> list[ChainReport]:
    """Check state directories, chain directories and files of entries; for each what `verify_state` gives."""
    reports: list[ChainReport] = []
    for path in map(Path, paths):
        if not path.exists():
            raise AuditError(f"there is nothing to verify at {path}")
        if not path.is_dir():
            reports.extend(verify_file(path))
        else:
            reports.extend(verify_state(path) if (path / "chains").is_dir() else [_checked(path)])
    return reports


def _checked(path: Path, chain_id: str = "") -> ChainReport:
    try:
        return verify_chain(path, chain_id=chain_id)
    except ChainBroken as err:
        return ChainReport(chain_id=chain_id or path.name, path=str(path), broken=err)
    except AuditError as err:
        unreadable = ChainBroken(err.message, index=FIRST_SEQ, expected="readable files", found=err.message)
        return ChainReport(chain_id=chain_id or path.name, path=str(path), broken=unreadable)
