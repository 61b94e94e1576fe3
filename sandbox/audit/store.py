"""Where records live on this host: the state directory, its chains, finding one record, and closing what was lost.

    <state>/chains/<chain_id>/{lock, 000001.jsonl, ..., clean}   one directory per supervisor that recorded anything
    <state>/live/<chain_id>                                      empty: a chain without `clean` marker

`live/` is the index that keeps a start fast: only the chains in it are looked at, however many there are.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sandbox.audit.chain import SEGMENT_MAX_BYTES, Chain, make_private_dirs
from sandbox.audit.entry import ENTRY_MAX_BYTES
from sandbox.audit.segments import list_segments, open_segment, parse, read_lines
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

_ID_START = b'"record_id":"'
_ID_SHAPE = re.compile(r"[0-9a-zA-Z_.-]{1,64}")


def state_dir(explicit: str | Path | None = None) -> Path:
    """The state directory: `explicit`, else `$SANDBOX_STATE`, else `$XDG_STATE_HOME/sandbox`, else under the home."""
    chosen = explicit or os.environ.get("SANDBOX_STATE")
    return Path(chosen).expanduser().absolute() if chosen else usual_state_dir()


def usual_state_dir() -> Path:
    """Where records go when nobody says otherwise."""
    base = os.environ.get("XDG_STATE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "sandbox"


class Store:
    """A state directory as the supervisor uses it: recover first, then open one chain."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def open_chain(self, name: str = "supervisor", *, segment_max_bytes: int = SEGMENT_MAX_BYTES) -> Chain:
        """A chain of this process's own. Nothing but the state directory itself is made before its first entry.

        Raises AuditError when records could not be kept there: better before the first call than after it.
        """
        try:
            make_private_dirs(self.state)
        except OSError as err:
            hint = "name a place you can write with SANDBOX_STATE or --state"
            raise AuditError(f"cannot keep records in {self.state}: {err.strerror}", hint=hint) from err
        return Chain(self.state, new_chain_id(name), segment_max_bytes=segment_max_bytes)


def new_chain_id(name: str) -> str:
    """Start time, the supervisor's name and random digits: unique, sortable, a plain file name."""
    plain = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:32] or "supervisor"
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{plain}-{os.urandom(4).hex()}"


def has_open_chains(state: Path) -> bool:
    """Whether any supervisor runs, or died without closing its chain; also where that cannot be found out."""
    try:
        with os.scandir(state / "live") as entries:
            return any(True for _ in entries)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def list_chains(state: Path) -> list[Path]:
    """The directories of all chains, those written to last first."""
    folder = state / "chains"
    if not folder.is_dir():
        return []
    try:
        paths = [Path(item.path) for item in os.scandir(folder) if item.is_dir(follow_symlinks=False)]
        return sorted(paths, key=last_written, reverse=True)
    except OSError as err:
        raise AuditError(f"cannot read {folder}: {err.strerror}") from err


def last_written(chain_path: Path) -> float:
    """When the chain's last segment changed, in seconds of the epoch; 0 without segments."""
    segments = list_segments(chain_path)
    return segments[-1].stat().st_mtime if segments else 0.0


def iter_entries(path: Path) -> Iterator[dict[str, Any]]:
    """Every readable entry of a state directory or of one chain, in the order of its chain.

    Reads what is there and proves nothing: a line that is no JSON object is passed over, `verify` reports it.
    """
    chains = list_chains(path) if (path / "chains").is_dir() else [path]
    for chain in chains:
        for segment in list_segments(chain):
            for line in read_lines(segment):
                try:
                    yield parse(line)
                except ValueError:
                    continue


def entry_lines(state: Path) -> Iterator[bytes]:
    """The bytes of every entry that ends in a newline, chain after chain, oldest chain first."""
    for chain in sorted(list_chains(state)):
        for segment in list_segments(chain):
            yield from (line for line in read_lines(segment) if line.endswith(b"\n"))


def latest(state: Path, limit: int = 0, keep: Callable[[dict[str, Any]], bool] | None = None) -> list[dict[str, Any]]:
    """The `limit` records (0: all) that started last, newest first: each as its last entry.

    That is the closed entry, which holds the whole record, or the opened one while the call runs. `keep` chooses.
    Chains that were last written to before the oldest of the found records started are not read.
    """
    best: list[dict[str, Any]] = []
    for chain in list_chains(state):
        if limit and len(best) >= limit and last_written(chain) < _epoch(best[-1]):
            break
        best = sorted([*best, *_chain_records(chain, limit, keep)], key=start_time, reverse=True)[: limit or None]
    return best


def _chain_records(chain: Path, limit: int, keep: Callable[[dict[str, Any]], bool] | None) -> Iterator[dict[str, Any]]:
    """The chain's records that `keep` wants; of those already closed no more than the last `limit` are held."""
    running: dict[str, dict[str, Any]] = {}
    closed: dict[str, dict[str, Any]] = {}
    for entry in iter_entries(chain):
        record_id = entry.get("record_id")
        if not isinstance(record_id, str):
            continue
        if entry.get("entry") == "opened":
            running[record_id] = entry
            continue
        running.pop(record_id, None)
        if keep is None or keep(entry):
            closed[record_id] = entry
        if limit and len(closed) > limit + len(running):
            # Records start in about the order in which they close; the slack covers the calls in flight.
            del closed[min(closed, key=lambda name: start_time(closed[name]))]
    yield from closed.values()
    yield from (entry for entry in running.values() if keep is None or keep(entry))


def start_time(entry: dict[str, Any]) -> str:
    """An entry's start as RFC 3339 text, which sorts like the time it names; empty when it has none."""
    times = entry.get("time")
    return str(times.get("time_start") or "") if isinstance(times, dict) else ""


def _epoch(entry: dict[str, Any]) -> float:
    from datetime import datetime

    try:
        return datetime.fromisoformat(start_time(entry)).timestamp()
    except ValueError:
        return 0.0


def find(state: Path, record_id: str) -> dict[str, Any]:
    """The record of that id, of the one id that starts so, or `last`: the one that started last.

    Its closed entry, or its opened one while the call runs. Raises AuditError: none, several, or no id at all.
    """
    if record_id == "last":
        newest = latest(state, 1)
        if not newest:
            raise AuditError(f"there are no records in {state}")
        return newest[0]
    if not _ID_SHAPE.fullmatch(record_id):
        raise AuditError(f"{record_id!r} is not a record id", hint="sandbox audit list shows the ids")
    found: dict[str, dict[str, Any]] = {}
    for chain in list_chains(state):
        for entry in _entries_with(chain, record_id):
            found[entry["record_id"]] = entry
        if record_id in found:
            return found[record_id]
    if not found:
        raise AuditError(f"no record {record_id} in {state}", hint="sandbox audit list shows the ids")
    if len(found) > 1:
        some = ", ".join(sorted(found)[:4])
        raise AuditError(f"{record_id} fits {len(found)} records: {some}", hint="give more of the id")
    return next(iter(found.values()))


def _entries_with(chain: Path, prefix: str) -> Iterator[dict[str, Any]]:
    # Inside a JSON string every quote is escaped, so only a real member of that name matches; the parse
    # then tells the record's own id from a member deeper down.
    wanted = _ID_START + prefix.encode()
    for segment in list_segments(chain):
        with open_segment(segment) as file:
            while line := file.readline(ENTRY_MAX_BYTES + 1):
                if wanted not in line:
                    continue
                try:
                    entry = parse(line)
                except ValueError:
                    continue
                if str(entry.get("record_id", "")).startswith(prefix):
                    yield entry
