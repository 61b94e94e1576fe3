"""Close what a supervisor that died left open: one `closed` entry with ending `lost` per record, in the same chain.

Safe with several supervisors starting at once: whoever gets a chain's lock does its work, the others pass it
over; a chain whose owner lives is locked by it. Nothing is said about what a lost call's tool did: nobody saw its end.
Never fatal: a chain that cannot be recovered is reported, left as it is, and moved from `live/` to `broken/`
if it is damaged, so that starts stay fast.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.audit.chain import LOCK, Chain, Position
from sandbox.audit.entry import ENTRY_MAX_BYTES, FIRST_SEQ, entry_hash, genesis, segment_name
from sandbox.audit.record import RecoveryFacts, lost_record, rfc3339, torn_notice
from sandbox.audit.segments import list_segments, parse, read_lines
from sandbox.digests import sha256
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was done to one chain: the records closed as lost, the bytes kept aside, or the error."""

    chain_id: str
    lost: tuple[str, ...] = ()
    torn_bytes: int = 0
    error: str = ""


@dataclass
class _Scan:
    """The end of a dead owner's chain and what is still open in it."""

    seq: int = FIRST_SEQ - 1
    head: str = ""
    segment_nr: int = 1
    size_bytes: int = 0
    opened: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    torn: bytes = b""


def current_facts() -> RecoveryFacts:
    """Now, and this boot of this host: a record opened in another boot was lost with the host, not by us."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return RecoveryFacts(rfc3339(time.time_ns()), boot_id.read_text().strip() if boot_id.exists() else "")


def recover(state: Path, facts: RecoveryFacts | None = None) -> list[Recovered]:
    """Bring every chain in `live/` whose owner is dead to its end. Returns only those on which there was work."""
    facts = facts or current_facts()
    live = state / "live"
    try:
        names = sorted(os.listdir(live))
    except FileNotFoundError:
        return []
    except OSError as err:
        return [Recovered("", error=f"cannot read {live}: {err.strerror}")]
    results = (_recover_chain(state, name, facts) for name in names)
    return [result for result in results if result.lost or result.torn_bytes or result.error]


def _recover_chain(state: Path, chain_id: str, facts: RecoveryFacts) -> Recovered:
    marker, path = state / "live" / chain_id, state / "chains" / chain_id
    if not path.is_dir():
        # The directory is made before the marker, so it was there once and somebody removed it.
        marker.unlink(missing_ok=True)
        return Recovered(chain_id)
    try:
        lock_fd = os.open(path / LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as err:
        return Recovered(chain_id, error=f"cannot open its lock: {err.strerror}")
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock_fd)
        return Recovered(chain_id)
    if not marker.exists():
        # Another start finished this chain between our listing and our lock.
        os.close(lock_fd)
        return Recovered(chain_id)
    try:
        return _close_lost(state, chain_id, lock_fd, facts)
    except _Damaged as err:
        os.close(lock_fd)
        (state / "broken").mkdir(mode=0o700, exist_ok=True)
        os.replace(marker, state / "broken" / chain_id)
        return Recovered(chain_id, error=f"{err.message}; left as it is, see `sandbox audit verify {path}`")
    except (OSError, AuditError) as err:
        os.close(lock_fd)
        return Recovered(chain_id, error=f"not recovered, the next start tries again: {err}")


class _Damaged(AuditError):
    """The chain's end cannot be trusted, so nothing may be linked to it."""


def _close_lost(state: Path, chain_id: str, lock_fd: int, facts: RecoveryFacts) -> Recovered:
    """Does the work under the lock and releases it; when it raises, `lock_fd` is still the caller's."""
    scan = _scan(state / "chains" / chain_id, chain_id)
    position = Position(scan.seq, scan.head, scan.segment_nr, scan.size_bytes, set(scan.opened))
    chain = Chain.resume(state, chain_id, position, lock_fd)
    try:
        if scan.torn:
            kept = _keep_aside(chain.path / segment_name(scan.segment_nr), scan)
            chain.append("notice", torn_notice(kept, len(scan.torn), sha256(scan.torn).hexdigest(), facts))
        chain.append_many([("closed", lost_record(entry, facts)) for entry in scan.opened.values()])
        chain.mark_clean()
    except (OSError, AuditError) as err:
        return Recovered(chain_id, error=f"not recovered, the next start tries again: {err}")
    finally:
        chain.close()
    return Recovered(chain_id, lost=tuple(scan.opened), torn_bytes=len(scan.torn))


def _keep_aside(segment: Path, scan: _Scan) -> str:
    """Copy the torn bytes beside their segment, then cut them off; in that order, so that a crash loses nothing."""
    for number in range(1000):
        kept = segment.with_name(f"{segment.name}.torn{f'.{number}' if number else ''}")
        try:
            fd = os.open(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            break
        except FileExistsError:
            continue
    else:
        raise AuditError(f"there are a thousand torn ends beside {segment} already")
    with os.fdopen(fd, "wb") as file:
        file.write(scan.torn)
        file.flush()
        os.fdatasync(file.fileno())
    os.truncate(segment, scan.size_bytes)
    return kept.name


def _scan(path: Path, chain_id: str) -> _Scan:
    """Find the true end. Checks only what appending relies on: order, links, and the last entry's hash."""
    scan = _Scan(head=genesis(chain_id))
    segments = list_segments(path)
    for number, segment in enumerate(segments, 1):
        if segment.name != segment_name(number):
            raise _Damaged(f"segment {segment_name(number)} is missing")
        scan.segment_nr, scan.size_bytes = number, 0
        for line in read_lines(segment):
            if segment is segments[-1] and not line.endswith(b"\n") and len(line) <= ENTRY_MAX_BYTES:
                scan.torn = line
                break
            _follow(scan, line, segment.name)
    if scan.last and entry_hash(scan.last) != scan.head:
        raise _Damaged(f"entry {scan.seq} does not have the hash it carries")
    return scan


def _follow(scan: _Scan, line: bytes, where: str) -> None:
    try:
        entry = parse(line)
        integrity: Mapping[str, Any] = entry["integrity"]
        if integrity["seq"] != scan.seq + 1 or integrity["prev_hash"] != scan.head:
            raise ValueError("it does not follow the entry before")
        scan.head = str(integrity["hash"])
        if entry["entry"] == "opened":
            scan.opened[entry["record_id"]] = entry
        elif entry["entry"] == "closed":
            scan.opened.pop(entry["record_id"], None)
    except (ValueError, KeyError, TypeError) as err:
        raise _Damaged(f"entry {scan.seq + 1} in {where} is broken ({err})") from err
    scan.seq += 1
    scan.size_bytes += len(line)
    scan.last = entry
