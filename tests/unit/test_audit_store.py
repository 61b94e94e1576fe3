"""Records are found again, and what a dead supervisor left open is closed exactly once."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sandbox.audit.chain import Chain
from sandbox.audit.record import RecoveryFacts
from sandbox.audit.recover import recover
from sandbox.audit.store import Store, find, iter_entries, latest, list_chains, new_chain_id, state_dir
from sandbox.audit.verify import verify_chain, verify_state
from sandbox.errors import AuditError
from tests.helpers.audit import die, no_chain_stays_open, pair, record_id, write_chain

__all__ = ["no_chain_stays_open"]  # a fixture for every test here

NOW = RecoveryFacts("2026-11-22T00:00:00.000000Z", "boot-1")


def abandoned(state: Path, *, open_records: int = 2, chain_id: str = "chain-1") -> Path:
    chain = write_chain(state, 3, chain_id=chain_id)
    for number in range(100, 100 + open_records):
        chain.append_opened(pair(number)[0])
    die(chain)
    return chain.path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("explicit", "variable", "xdg", "expected"),
    [
        ("/a", "/b", "/c", "/a"),
        (None, "/b", "/c", "/b"),
        (None, "", "/c", "/c/sandbox"),
        (None, "", "relative", "/home/me/.local/state/sandbox"),
        (None, "", "", "/home/me/.local/state/sandbox"),
        ("~/x", "", "", "/home/me/x"),
    ],
)
def test_the_state_directory_is_the_nearest_one_named(
    explicit: str | None, variable: str, xdg: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SANDBOX_STATE", variable)
    monkeypatch.setenv("XDG_STATE_HOME", xdg)
    assert state_dir(explicit) == Path(expected)


@pytest.mark.parametrize("name", ["supervisor", "../../etc", "Ünï", "", "a" * 300])
def test_chain_names_are_unique_plain_file_names(name: str) -> None:
    made = new_chain_id(name)
    assert made != new_chain_id(name)
    assert len(made) < 80
    assert set(made) <= set("0123456789abcdefghijklmnopqrstuvwxyzTZ-")


def test_a_place_that_cannot_hold_records_is_refused_before_the_first_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AuditError, match="SANDBOX_STATE"):
        Store(tmp_path / "file").open_chain()


def test_open_records_are_closed_as_lost_in_their_own_chain(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    (done,) = recover(tmp_path, NOW)
    assert done.lost == (record_id(100), record_id(101))
    report = verify_chain(path)
    assert (report.entries, report.records, report.open_records, report.is_clean) == (10, 5, (), True)
    lost = find(tmp_path, record_id(100))
    assert (lost["entry"], lost["ending"]["kind"], lost["ending"]["fault"]) == ("closed", "lost", "us")
    assert lost["time"]["time_end"] == NOW.now
    assert lost["context"]["why"] == "a test"


def test_recovering_twice_changes_nothing_more(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    recover(tmp_path, NOW)
    before = files(path)
    assert recover(tmp_path, NOW) == []
    assert files(path) == before


def test_a_living_supervisors_chain_is_left_alone(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    chain.append_opened(pair(7)[0])
    assert recover(tmp_path, NOW) == []
    chain.append_closed(pair(7)[1])
    chain.close()
    assert verify_chain(chain.path).is_clean


def test_many_starts_at_once_close_each_record_once(tmp_path: Path) -> None:
    for number in range(10):
        abandoned(tmp_path, chain_id=f"chain-{number}")
    with ThreadPoolExecutor(8) as pool:
        results = [item for batch in pool.map(lambda _: recover(tmp_path, NOW), range(8)) for item in batch]
    assert sorted(item.chain_id for item in results) == sorted(f"chain-{number}" for number in range(10))
    reports = verify_state(tmp_path)
    assert all(report.broken is None and report.is_clean and report.records == 5 for report in reports)


@pytest.mark.parametrize("kept", [1, 100, -1])
def test_a_torn_tail_is_kept_aside_and_told(kept: int, tmp_path: Path) -> None:
    path = abandoned(tmp_path, open_records=1)
    segment = path / "000001.jsonl"
    torn = segment.read_bytes().splitlines(keepends=True)[0][:kept]
    with segment.open("ab") as file:
        file.write(torn)
    (done,) = recover(tmp_path, NOW)
    assert (done.torn_bytes, done.error) == (len(torn), "")
    assert (path / "000001.jsonl.torn").read_bytes() == torn
    report = verify_chain(path)
    assert (report.records, report.open_records, len(report.torn)) == (4, (), 1)
    (notice,) = (entry for entry in iter_entries(path) if entry["entry"] == "notice")
    assert notice["notice"]["kept_as"] == "000001.jsonl.torn"


def test_a_chain_whose_only_entry_was_torn_starts_anew(tmp_path: Path) -> None:
    chain = Chain(tmp_path, "chain-1")
    chain.append_opened(pair()[0])
    die(chain)
    os.truncate(chain.path / "000001.jsonl", 50)
    assert recover(tmp_path, NOW)[0].torn_bytes == 50
    assert verify_chain(chain.path).is_clean


def test_recovery_goes_on_in_the_last_segment(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 6, segment_max_bytes=8000)
    chain.append_opened(pair(50)[0])
    die(chain)
    recover(tmp_path, NOW)
    report = verify_chain(chain.path)
    assert (report.records, report.open_records) == (7, ())


def test_a_damaged_chain_is_reported_once_and_not_touched(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    good = abandoned(tmp_path, chain_id="chain-2")
    segment = path / "000001.jsonl"
    segment.write_bytes(segment.read_bytes().replace(b'"seq":3', b'"seq":4', 1))
    before = files(path)
    first, second = recover(tmp_path, NOW)
    assert "entry 3" in first.error
    assert (second.error, len(second.lost)) == ("", 2)
    assert files(path) == before
    assert recover(tmp_path, NOW) == []
    assert verify_chain(good).is_clean
    assert [report.chain_id for report in verify_state(tmp_path) if report.broken] == ["chain-1"]


def test_a_removed_chain_does_not_stop_a_start(tmp_path: Path) -> None:
    path = abandoned(tmp_path)
    for item in path.iterdir():
        item.unlink()
    path.rmdir()
    assert recover(tmp_path, NOW) == []
    assert list((tmp_path / "live").iterdir()) == []


def test_a_state_that_is_not_there_is_nothing_to_recover(tmp_path: Path) -> None:
    assert recover(tmp_path / "none") == []
    assert latest(tmp_path / "none") == []
    assert list_chains(tmp_path / "none") == []


def test_finished_chains_are_not_read_at_a_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        write_chain(tmp_path, 1, chain_id=f"chain-{number}").close()
    opened: list[object] = []
    monkeypatch.setattr("sandbox.audit.recover._recover_chain", lambda *args: opened.append(args))
    assert recover(tmp_path, NOW) == []
    assert opened == []


# Finding


def test_a_record_is_found_by_id_by_prefix_and_as_the_last(tmp_path: Path) -> None:
    write_chain(tmp_path, 3, chain_id="chain-1").close()
    chain = write_chain(tmp_path, 0, chain_id="chain-2")
    chain.append_opened(pair(50)[0])
    assert find(tmp_path, record_id(1))["entry"] == "closed"
    assert find(tmp_path, record_id(1)[:-4] + record_id(1)[-4:-1])["record_id"] == record_id(1)
    assert find(tmp_path, "last")["record_id"] == record_id(50)
    assert find(tmp_path, "last")["entry"] == "opened"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("0000", "no record"), ("018bcfe", "fits 3 records"), ("*", "not a record id"), ("", "not a record id")],
)
def test_an_id_that_names_no_single_record_is_an_error(wanted: str, message: str, tmp_path: Path) -> None:
    write_chain(tmp_path, 3).close()
    with pytest.raises(AuditError, match=message):
        find(tmp_path, wanted)


def test_an_empty_state_has_no_last_record(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no records"):
        find(tmp_path, "last")


def test_content_cannot_pass_for_a_record_of_another_id(tmp_path: Path) -> None:
    opened, closed = pair(1)
    decoy = {"record_id": "decoy-1", "text": '"record_id":"decoy-1"'}
    with Chain(tmp_path, "chain-1") as chain:
        chain.append_opened({**opened, "aaa": decoy})
        chain.append_closed({**closed, "aaa": decoy})
    with pytest.raises(AuditError, match="no record"):
        find(tmp_path, "decoy-1")


def test_the_latest_records_come_newest_first(tmp_path: Path) -> None:
    one, two = write_chain(tmp_path, 0, chain_id="chain-1"), write_chain(tmp_path, 0, chain_id="chain-2")
    for number in range(20):
        opened, closed = pair(number)
        chain = (one, two)[number % 2]
        chain.append_opened(opened)
        if number != 18:
            chain.append_closed(closed)
    numbers = [int(entry["call_id"]) for entry in latest(tmp_path, 5)]
    assert numbers == [19, 18, 17, 16, 15]
    assert [int(entry["call_id"]) for entry in latest(tmp_path)] == list(range(19, -1, -1))
    odd = latest(tmp_path, 3, lambda entry: int(entry["call_id"]) % 4 == 1)
    assert [int(entry["call_id"]) for entry in odd] == [17, 13, 9]


def test_reading_passes_over_what_is_no_entry(tmp_path: Path) -> None:
    chain = write_chain(tmp_path, 1)
    chain.close()
    with (chain.path / "000001.jsonl").open("ab") as file:
        file.write(b'garbage\n[1]\n{"record_id": 7}\n{"record_id": "x", "time": 5}\n{"torn')
    entries: list[dict[str, Any]] = list(iter_entries(tmp_path))
    assert len(entries) == 4
    assert len(latest(tmp_path)) == 2
    json.dumps(entries)
