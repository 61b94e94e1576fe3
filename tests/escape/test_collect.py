"""A tool that plants traps for whoever collects its files. Each trap beside the same thing done honestly."""

from __future__ import annotations

import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sandbox._linux import files
from sandbox.workspace import collect, collect_into
from tests.helpers.workspaces import held, opened, plant


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    return plant(tmp_path / "outside", {"secret.json": "SECRET"})


@pytest.fixture
def work(tmp_path: Path) -> Path:
    return plant(tmp_path / "work", {"out/honest.json": "honest"})


def collected(work: Path, *patterns: str) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    with opened(work) as fd:
        result = collect(fd, patterns)
    return result.files, result.skipped


def test_a_link_to_a_secret_is_not_followed(work: Path, secret: Path) -> None:
    (work / "out/evil.json").symlink_to(secret / "secret.json")
    (work / "out/loop.json").symlink_to("loop.json")
    found, skipped = collected(work, "out/*.json")
    assert found == {"out/honest.json": b"honest"}
    assert sorted(skipped) == [("out/evil.json", "link"), ("out/loop.json", "link")]


def test_a_link_in_place_of_a_directory_is_not_followed(work: Path, secret: Path) -> None:
    (work / "more").symlink_to(secret)
    (work / "abs").symlink_to("/etc")
    found, skipped = collected(work, "more/*.json", "abs/passwd", "**/*.json")
    assert found == {"out/honest.json": b"honest"}
    assert sorted(skipped) == [("abs", "link"), ("more", "link")]


def test_a_link_within_the_workspace_is_not_followed_either(work: Path) -> None:
    (work / "out/same.json").symlink_to("honest.json")
    found, skipped = collected(work, "out/*.json")
    assert (set(found), skipped) == ({"out/honest.json"}, [("out/same.json", "link")])


def test_opening_says_which_wall_it_met(work: Path, secret: Path) -> None:
    (work / "link").symlink_to(secret)
    with opened(work) as fd:
        for path, code in (("link/secret.json", 40), ("../outside/secret.json", 18), ("/etc/passwd", 18)):
            with pytest.raises(OSError, match="openat2") as caught:
                files.open_regular(fd, path)
            assert caught.value.errno == code  # ELOOP, EXDEV
        os.close(files.open_regular(fd, "out/honest.json"))


def test_a_fifo_does_not_hold_up_the_collector(work: Path) -> None:
    os.mkfifo(work / "out/fifo.json")
    started = time.monotonic()
    found, skipped = collected(work, "out/*.json")
    assert time.monotonic() - started < 30
    assert set(found) == {"out/honest.json"}
    assert skipped == [("out/fifo.json", "special")]


def test_a_socket_is_no_file(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("out/sock.json")
        assert collected(work, "out/*.json")[1] == [("out/sock.json", "special")]


@pytest.mark.needs("root")
def test_a_device_is_never_opened(work: Path) -> None:
    os.mknod(work / "out/zero.json", stat.S_IFCHR | 0o666, os.makedev(1, 5))
    found, skipped = collected(work, "out/*.json")
    assert set(found) == {"out/honest.json"}
    assert skipped == [("out/zero.json", "special")]


def test_a_sparse_giant_is_not_read(work: Path) -> None:
    with open(work / "out/giant.json", "wb") as file:
        file.truncate(1 << 42)
    found, skipped = collected(work, "out/*.json")
    assert set(found) == {"out/honest.json"}
    assert skipped == [("out/giant.json", "too-large")]


def test_names_that_would_act_on_a_terminal_come_out_as_names(work: Path) -> None:
    for name in (b"a\x1b]0;pwned\x07.json", b"line\nbreak.json", b"\xff\xfe.json", b"--rf.json"):
        Path(os.fsdecode(os.fsencode(work / "out") + b"/" + name)).write_bytes(b"x")
    found, skipped = collected(work, "out/*.json")
    assert len(found) == 5
    assert skipped == []


def test_a_tree_without_end_is_left_at_a_bounded_depth(work: Path) -> None:
    fd = os.open(work, os.O_RDONLY)
    for _ in range(600):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("deep.json", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=fd))
    os.close(fd)
    found, skipped = collected(work, "**/*.json")
    assert set(found) == {"out/honest.json"}
    assert [reason for _, reason in skipped] == ["too-deep"]


@contextmanager
def racing(one: Path, other: Path) -> Iterator[None]:
    """Another process that swaps the two names as fast as it can."""
    pid = os.fork()
    if pid == 0:
        try:
            ends = time.monotonic() + 60
            while time.monotonic() < ends:
                files.rename_exchange(-100, str(one), -100, str(other))
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def raced(work: Path, pattern: str) -> set[bytes]:
    """What came out while the race was on: until both outcomes have been seen often, so that there was a race."""
    seen: set[bytes] = set()
    taken = refused = 0
    ends = time.monotonic() + 30
    with opened(work) as fd:
        while min(taken, refused) < 200 and time.monotonic() < ends:
            result = collect(fd, [pattern])
            seen |= set(result.files.values())
            taken += bool(result.files)
            refused += bool(result.skipped)
    assert min(taken, refused) >= 200
    return seen


def test_a_file_swapped_for_a_link_while_collecting_never_leaks(work: Path, secret: Path) -> None:
    (work / "swap").symlink_to(secret / "secret.json")
    with racing(work / "out/honest.json", work / "swap"):
        assert raced(work, "out/honest.json") == {b"honest"}


def test_a_directory_swapped_for_a_link_while_collecting_never_leaks(work: Path, secret: Path) -> None:
    plant(work, {"out/secret.json": "not secret"})
    (work / "swap").symlink_to(secret)
    with racing(work / "out", work / "swap"):
        assert raced(work, "out/secret.json") == {b"not secret"}


# The destination may be hostile as well: a directory that an earlier call could write.


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return plant(tmp_path / "into", {})


def delivered(work: Path, into: Path) -> tuple[list[str], list[tuple[str, str]]]:
    with opened(work) as fd, opened(into) as into_fd:
        result = collect_into(fd, ["out/*.json"], into_fd)
    return result.written, result.skipped


def test_a_link_planted_where_the_copy_goes_is_not_written_through(work: Path, into: Path, secret: Path) -> None:
    plant(into, {"out/honest.json": ("link", str(secret / "secret.json"))})
    assert delivered(work, into) == ([], [("out/honest.json", "link")])
    assert (secret / "secret.json").read_text() == "SECRET"
    (into / "out/honest.json").unlink()
    assert delivered(work, into) == (["out/honest.json"], [])


def test_a_link_planted_in_place_of_the_directory_is_not_entered(work: Path, into: Path, secret: Path) -> None:
    (into / "out").symlink_to(secret)
    assert delivered(work, into) == ([], [("out/honest.json", "link")])
    assert held(secret) == {"secret.json": "SECRET"}
    (into / "out").unlink()
    assert delivered(work, into) == (["out/honest.json"], [])


def test_a_directory_in_a_files_place_is_left_alone(work: Path, into: Path) -> None:
    plant(into, {"out/honest.json/precious": "p"})
    assert delivered(work, into) == ([], [("out/honest.json", "EEXIST")])
    assert (into / "out/honest.json/precious").read_text() == "p"


def test_the_destination_swapped_for_a_link_while_copying_is_never_followed(
    work: Path, into: Path, secret: Path
) -> None:
    plant(into, {"out": None, "swap": ("link", str(secret))})
    written = refused = 0
    ends = time.monotonic() + 30
    with racing(into / "out", into / "swap"):
        while min(written, refused) < 100 and time.monotonic() < ends:
            copied, skipped = delivered(work, into)
            written += len(copied)
            refused += len(skipped)
    assert min(written, refused) >= 100
    assert held(secret) == {"secret.json": "SECRET"}
    assert [name for name in held(into) if ".collecting" in name] == []
