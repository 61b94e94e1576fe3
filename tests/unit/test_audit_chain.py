"""A chain shows every change that was made to it since, apart from a cut at its end that no marker names."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest
import rfc8785
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sandbox.audit.chain import Chain
from sandbox.audit.entry import ENTRY_MAX_BYTES, genesis
from sandbox.audit.verify import verify_chain, verify_file, verify_paths, verify_state
from sandbox.errors import AuditError, ChainBroken
from tests.helpers.audit import OK, die, no_chain_stays_open, pair, record_id, write_chain

__all__ = ["no_chain_stays_open"]  # a fixture for every test here

RECORDS = 6
HERE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


def small(number: int, **extra: object) -> dict[str, object]:
    return {"record_id": record_id(number), "n": number, **extra}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of twelve entries in several segments, never marked clean: its owner is gone."""
    state = tmp_path_factory.mktemp("state")
    chain = write_chain(state, RECORDS, segment_max_bytes=8000)
    die(chain)
    assert len(list(chain.path.glob("*.jsonl"))) > 3
    return chain.path


@pytest.fixture(scope="module")
def lines(original: Path) -> list[bytes]:
    return [line for path in sorted(original.glob("*.jsonl")) for line in path.read_bytes().splitlines(keepends=True)]


def one_file(folder: Path, lines: list[bytes]) -> Path:
    """The same entries in one segment; where they lie is not part of the chain."""
    chain = folder / "chain-1"
    shutil.rmtree(chain, ignore_errors=True)
    chain.mkdir()
    (chain / "000001.jsonl").write_bytes(b"".join(lines))
    return chain


def broken(path: Path) -> ChainBroken:
    with pytest.raises(ChainBroken) as caught:
        verify_chain(path)
    return caught.value


def test_an_untouched_chain_verifies(original: Path) -> None:
    report = verify_chain(original)
    assert (report.entries, report.records, report.open_records, report.torn) == (2 * RECORDS, RECORDS, (), ())


def test_the_format_can_be_checked_without_our_code(original: Path, lines: list[bytes]) -> None:
    previous = hashlib.sha256(b"sandbox.audit/v1 genesis chain-1\n").hexdigest()
    for seq, line in enumerate(lines, 1):
        entry = json.loads(line)
        claimed = entry["integrity"].pop("hash")
        assert entry["integrity"] == {"alg": "sha256", "chain": "chain-1", "prev_hash": previous, "seq": seq}
        assert hashlib.sha256(rfc8785.dumps(entry)).hexdigest() == claimed
        previous = claimed


@HERE
@given(data=st.data())
def test_any_changed_byte_is_found_and_its_entry_named(data: st.DataObject, tmp_path: Path, lines: list[bytes]) -> None:
    number = data.draw(st.integers(0, len(lines) - 1))
    line = bytearray(lines[number])
    # The newline that ends the chain is the one byte whose loss looks like an interrupted write.
    at = data.draw(st.integers(0, len(line) - 1 - (number == len(lines) - 1)))
    value = data.draw(st.integers(0, 255))
    assume(value != line[at])
    line[at] = value
    changed = one_file(tmp_path, [*lines[:number], bytes(line), *lines[number + 1 :]])
    assert broken(changed).index == number + 1


def test_every_single_changed_bit_of_a_small_chain_is_found(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "chain-1")
    chain.append_opened(small(1))
    chain.append_closed(small(1, ending=OK))
    segment = chain.path / "000001.jsonl"
    content = segment.read_bytes()
    for at in range(len(content) - 1):
        damaged = bytearray(content)
        damaged[at] ^= 1 << at % 8
        segment.write_bytes(damaged)
        broken(chain.path)
    segment.write_bytes(content)
    assert verify_chain(chain.path).entries == 2


@HERE
@given(data=st.data())
def test_a_missing_entry_is_named(data: st.DataObject, tmp_path: Path, lines: list[bytes]) -> None:
    number = data.draw(st.integers(0, len(lines) - 2))
    count = data.draw(st.integers(1, len(lines) - 1 - number))
    found = broken(one_file(tmp_path, lines[:number] + lines[number + count :]))
    assert (found.index, found.expected, found.found) == (number + 1, str(number + 1), str(number + count + 1))


@HERE
@given(order=st.permutations(range(2 * RECORDS)))
def test_reordered_entries_are_found_at_the_first(order: list[int], tmp_path: Path, lines: list[bytes]) -> None:
    first = next((n for n, where in enumerate(order) if n != where), None)
    assume(first is not None)
    assert broken(one_file(tmp_path, [lines[n] for n in order])).index == (first or 0) + 1


@HERE
@given(number=st.integers(0, 2 * RECORDS - 1), to=st.integers(0, 2 * RECORDS))
def test_a_repeated_entry_is_found(number: int, to: int, tmp_path: Path, lines: list[bytes]) -> None:
    changed = one_file(tmp_path, [*lines[:to], lines[number], *lines[to:]])
    # Doubled in place, the second of the two is the first wrong one.
    assert broken(changed).index == (to + 2 if to == number else to + 1)


def test_an_inserted_forgery_with_a_right_hash_of_its_own_is_found(tmp_path: Path, lines: list[bytes]) -> None:
    forged = json.loads(lines[3])
    forged["ending"]["kind"] = "denied"
    del forged["integrity"]["hash"]
    forged["integrity"]["hash"] = hashlib.sha256(rfc8785.dumps(forged)).hexdigest()
    changed = [*lines[:3], rfc8785.dumps(forged) + b"\n", *lines[4:]]
    assert broken(one_file(tmp_path, changed)).index == 5  # the next entry does not link to it


@pytest.mark.parametrize("gone", ["000001.jsonl", "000002.jsonl"])
def test_a_missing_segment_is_named(gone: str, original: Path, tmp_path: Path) -> None:
    chain = shutil.copytree(original, tmp_path / "chain-1")
    (chain / gone).unlink()
    assert broken(chain).expected == gone


def test_an_entry_of_another_chain_does_not_fit(tmp_path: Path, original: Path) -> None:
    chain = shutil.copytree(original, tmp_path / "chains" / "chain-2")
    (report,) = verify_state(tmp_path)
    assert report.broken is not None
    assert (report.broken.index, report.broken.expected, report.broken.found) == (1, "chain-2", "chain-1")
    assert verify_chain(chain).entries == 2 * RECORDS  # under its own name it still verifies


def test_a_cut_at_the_end_shows_only_against_a_marker(tmp_path: Path, lines: list[bytes]) -> None:
    cut = one_file(tmp_path, lines[:-2])
    assert verify_chain(cut).entries == len(lines) - 2
    last = json.loads(lines[-1])["integrity"]
    marker = {"chain": "chain-1", "seq": last["seq"], "hash": last["hash"]}
    (cut / "clean").write_bytes(rfc8785.dumps(marker) + b"\n")
    assert "head" in broken(cut).message
    assert verify_chain(_with(cut, lines)).is_clean


def _with(chain: Path, lines: list[bytes]) -> Path:
    (chain / "000001.jsonl").write_bytes(b"".join(lines))
    return chain


@HERE
@given(data=st.data())
def test_a_torn_last_line_is_reported_and_not_fatal(data: st.DataObject, tmp_path: Path, lines: list[bytes]) -> None:
    number = data.draw(st.integers(0, len(lines) - 1))
    kept = data.draw(st.integers(1, len(lines[number]) - 1))
    report = verify_chain(one_file(tmp_path, [*lines[:number], lines[number][:kept]]))
    assert (report.entries, len(report.torn)) == (number, 1)
    assert f"line {number + 1} ({kept} bytes" in report.torn[0]


@pytest.mark.parametrize(
    ("line", "check"),
    [
        (b"\n", "parse"),
        (b"[]\n", "parse"),
        (b"{}\n", "schema"),
        (b'{"a":NaN}\n', "parse"),
        (b"\xff\n", "parse"),
        (b"[" * 100_000 + b"\n", "parse"),
        (b'{"a":' + b"9" * 5000 + b"}\n", "parse"),
        (b"x" * (ENTRY_MAX_BYTES + 10), "parse"),
    ],
)
def test_hostile_lines_break_the_chain_and_nothing_else(
    line: bytes, check: str, tmp_path: Path, lines: list[bytes]
) -> None:
    found = broken(one_file(tmp_path, [*lines[:2], line]))
    assert (found.index, f", {check}:" in found.message) == (3, True)
    assert len(found.message) < 1000


def test_a_second_closed_entry_is_found_although_it_links(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "chain-1")
    chain.append_opened(small(1))
    chain.append_closed(small(1, ending=OK))
    chain._position.open_records.add(record_id(1))  # a writer with a bug
    chain.append_closed(small(1, ending=OK))
    assert "pairing" in broken(chain.path).message


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_link_in_place_of_a_segment_is_no_hang(make: Callable[[Path], None], tmp_path: Path) -> None:
    folder = tmp_path / "chains" / "chain-1"
    folder.mkdir(parents=True)
    make(folder / "000001.jsonl")
    (report,) = verify_state(tmp_path)
    assert report.broken is not None


def test_an_export_of_several_chains_is_checked_chain_by_chain(tmp_path: Path) -> None:
    content = b""
    for name in ("chain-1", "chain-2"):
        chain = write_chain(tmp_path, 2, chain_id=name)
        content += (chain.path / "000001.jsonl").read_bytes()
        chain.close()
    export = tmp_path / "export.jsonl"
    export.write_bytes(content)
    assert [(r.chain_id, r.entries, r.broken) for r in verify_file(export)] == [
        ("chain-1", 4, None),
        ("chain-2", 4, None),
    ]
    export.write_bytes(content.replace(b'"kind":"ok"', b'"kind":"no"', 1))
    first, second = verify_paths([export])
    assert first.broken is not None
    assert (first.broken.index, second.broken) == (2, None)


def test_verification_loads_only_the_format_and_the_errors() -> None:
    code = (
        "import sys, sandbox.audit.verify;"
        "print(sorted(m for m in sys.modules if m.startswith('sandbox') or m in ('pydantic', 'typer', 'rich')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    audit = ("", ".canonical", ".entry", ".segments", ".verify")
    parts = ("", *(f".audit{part}" for part in audit), ".digests", ".errors")
    assert done.stdout.strip() == str(["sandbox" + part for part in parts])


# The writing end


def test_a_supervisor_without_calls_leaves_nothing(tmp_path: Path) -> None:
    with Chain(tmp_path, "chain-1"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        write_chain(tmp_path / "state", 1).close()
    finally:
        os.umask(old)
    state = tmp_path / "state"
    modes = {path.relative_to(state).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in state.rglob("*")}
    assert modes == {
        "chains": 0o700, "live": 0o700, "chains/chain-1": 0o700, "chains/chain-1/lock": 0o600,
        "chains/chain-1/000001.jsonl": 0o600, "chains/chain-1/clean": 0o600,
    }  # fmt: skip


def test_a_place_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chains").mkdir()
    (tmp_path / "chains").chmod(0o777)
    with pytest.raises(AuditError, match="only its owner"):
        Chain(tmp_path, "chain-1").append_opened(pair()[0])


def test_a_planted_link_is_not_written_through(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    chain.close()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("lock", "000001.jsonl"):
        other = Chain(tmp_path, f"chain-{name}")
        other.path.mkdir()
        (other.path / name).symlink_to(victim)
        with pytest.raises(AuditError, match="symbolic link"):
            other.append_opened(pair()[0])
    assert victim.read_text() == "precious"


def test_each_record_is_opened_once_and_closed_once(tmp_path: Path) -> None:
    opened, closed = pair()
    with Chain(tmp_path, "chain-1") as chain:
        with pytest.raises(AuditError, match="not open"):
            chain.append_closed(closed)
        chain.append_opened(opened)
        with pytest.raises(AuditError, match="already open"):
            chain.append_opened(opened)
        chain.append_closed(closed)
        with pytest.raises(AuditError, match="not open"):
            chain.append_closed(closed)
    assert verify_chain(chain.path).entries == 2


def test_several_entries_are_one_write_all_or_none(tmp_path: Path) -> None:
    opened, closed = pair()
    with Chain(tmp_path, "chain-1") as chain:
        with pytest.raises(AuditError):
            chain.append_many([("opened", opened), ("closed", closed), ("closed", closed)])
        assert chain.seq == 0
        done = chain.append_many([("opened", opened), ("closed", closed)], durability="fsync")
        assert [entry.seq for entry in done] == [1, 2]
        assert chain.head == done[-1].hash
        assert (chain.path / "000001.jsonl").read_bytes() == b"".join(entry.line for entry in done)


def test_an_oversized_entry_is_refused_and_the_chain_goes_on(tmp_path: Path) -> None:
    huge = {str(n): "x" * 60_000 for n in range(300)}
    with Chain(tmp_path, "chain-1") as chain:
        with pytest.raises(AuditError, match="over the limit"):
            chain.append("notice", huge)
        chain.append("notice", {"notice": {"kind": "test"}})
    assert verify_chain(chain.path).entries == 1


def test_content_cannot_imitate_the_integrity_of_its_entry(tmp_path: Path) -> None:
    opened, closed = pair()
    fake = {"alg": "sha256", "chain": "chain-1", "hash": "0" * 64, "prev_hash": genesis("chain-1"), "seq": 1}
    with Chain(tmp_path, "chain-1") as chain:
        chain.append_opened({**opened, "integrity": fake, "entry": "closed", "aaa": {"integrity": fake}})
        chain.append_closed({**closed, "zzz": {"integrity": fake, "hash": '"hash":"'}})
    assert verify_chain(chain.path).entries == 2


def test_threads_share_one_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "chain-1", segment_max_bytes=20_000)

    def work(base: int) -> None:
        for number in range(base, base + 20):
            opened, closed = pair(number)
            chain.append_opened(opened)
            chain.append_closed(closed, durability="fsync")

    threads = [Thread(target=work, args=(base,)) for base in (0, 100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chain.close()
    report = verify_chain(chain.path)
    assert (report.entries, report.records, report.is_clean) == (160, 80, True)


def test_a_closed_chain_takes_no_more(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    chain.close()
    chain.close()
    with pytest.raises(AuditError, match="closed"):
        chain.append("notice", {})


# Failing disks


class Disk:
    """Stands in for os.write, os.ftruncate and os.fdatasync; fails where told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 1 << 40
        self.truncates = self.syncs = True
        self.synced = 0
        self._write, self._ftruncate = os.write, os.ftruncate
        for name in ("write", "ftruncate", "fdatasync"):
            monkeypatch.setattr(f"sandbox.audit.chain.os.{name}", getattr(self, name))

    def write(self, fd: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(fd, bytes(data[: self.room]))
        self.room -= written
        return written

    def ftruncate(self, fd: int, length: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, "Input/output error")
        self._ftruncate(fd, length)

    def fdatasync(self, fd: int) -> None:
        if not self.syncs:
            raise OSError(errno.EIO, "Input/output error")
        self.synced += 1


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("room", [0, 1, 700])
def test_a_full_disk_is_told_and_leaves_what_was_there(room: int, disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 2)
    before = (chain.path / "000001.jsonl").read_bytes()
    disk.room = room
    opened, closed = pair(7)
    with pytest.raises(AuditError) as caught:
        chain.append_opened(opened)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert "SANDBOX_STATE" in caught.value.hint
    assert (chain.path / "000001.jsonl").read_bytes() == before
    assert chain.open_records == frozenset()
    disk.room = 1 << 40
    chain.append_opened(opened)
    chain.append_closed(closed)
    chain.close()
    assert verify_chain(chain.path).records == 3


@pytest.mark.parametrize("how", ["next call", "again", "close"])
def test_an_end_that_the_disk_refused_is_written_when_there_is_room(how: str, disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    opened, closed = pair(7)
    chain.append_opened(opened)
    disk.room = 50
    for _ in range(2):
        with pytest.raises(AuditError):
            chain.append_closed(closed)
    with pytest.raises(AuditError):
        chain.append_opened(pair(8)[0])
    disk.room = 1 << 40
    if how == "next call":
        done = chain.append_many([("opened", pair(8)[0]), ("closed", pair(8)[1])])
        assert [entry.seq for entry in done] == [5, 6]
    elif how == "again":
        assert chain.append_closed(closed).seq == 4
    chain.close()
    report = verify_chain(chain.path)
    assert (report.entries, report.open_records, report.is_clean) == (6 if how == "next call" else 4, (), True)


def test_remains_that_cannot_be_cut_off_stop_the_chain_until_they_can(disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 2)
    disk.room, disk.truncates = 100, False
    for room in (100, 1 << 40):
        disk.room = room
        with pytest.raises(AuditError):
            chain.append_opened(pair(7)[0])
    assert len(verify_chain(chain.path).torn) == 1
    disk.truncates = True
    chain.append_opened(pair(7)[0])
    report = verify_chain(chain.path)
    assert (report.entries, report.torn) == (5, ())


def test_a_failed_sync_is_told(disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    disk.syncs = False
    with pytest.raises(AuditError, match="synced"):
        chain.append_opened(pair(7)[0], durability="fsync")
    disk.syncs = True
    chain.append_closed(pair(7)[1], durability="fsync")
    assert verify_chain(chain.path).records == 2


def test_entries_waiting_for_the_disk_share_one_sync(disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 0)
    chain.append_many([("opened", pair(number)[0]) for number in range(10)])
    chain.sync()
    chain.sync()
    assert disk.synced == 1


def test_a_chain_that_fails_before_its_first_entry_can_start_later(disk: Disk, tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 0)
    disk.room = 10
    with pytest.raises(AuditError):
        chain.append_opened(pair()[0])
    disk.room = 1 << 40
    chain.append_many([("opened", pair()[0]), ("closed", pair()[1])])
    chain.close()
    assert verify_chain(chain.path).is_clean
