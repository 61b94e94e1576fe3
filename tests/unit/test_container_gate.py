"""The gate of a container: what its shell is told, and how streams pass into named pipes."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
from pathlib import Path

import pytest

from sandbox.launchers import gate
from sandbox.launchers.feed import Feed
from sandbox.launchers.gate import Gate, call_script

STREAMS = {"stdin": "/dev/null"}


@pytest.fixture
def at(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gate outside of any container: its scripts name this place in place of the one inside."""
    place = short_path / "gate"
    monkeypatch.setattr(gate, "AT", str(place))
    Gate.make(place, {"hostname": "sandbox\n"}, [("/usr/bin", f"{place}/lib/bin"), (__file__, f"{place}/lib/one.py")])
    return place


def run(
    at: Path, argv: list[str], env: dict[str, str], cwd: str = "/", open_files: int | None = None
) -> tuple[int, bytes, bytes, bytes]:
    """(exit status, output, errors, what the gate said)."""
    made = Gate(at)
    ends = {name: made.open_reading(name) for name in ("stdout", "stderr")} | {"status": made.open_both("status")}
    made.write("call", call_script(argv, env, cwd, STREAMS, open_files))
    try:
        status = subprocess.run(["/bin/sh", str(at / "call")], timeout=20, check=False).returncode
        return status, *(_read(ends[name]) for name in ("stdout", "stderr", "status"))
    finally:
        for fd in ends.values():
            os.close(fd)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return b""


@pytest.mark.parametrize(
    "word", ["plain", "two words", "'quoted'", '"$HOME"', "$(id)", "`id`", "a\nb", "*", "-n", "\\", "ü", ""]
)
def test_arguments_and_variables_arrive_as_they_are(at: Path, word: str) -> None:
    program = 'printf "%s|%s" "$1" "$WORD"'
    status, out, err, said = run(at, ["sh", "-c", program, "sh", word], {"PATH": "/usr/bin:/bin", "WORD": word})
    assert (status, err, said) == (0, b"", b"opened\n")
    assert out.decode() == f"{word}|{word}"


def test_nothing_but_the_calls_own_variables_is_there(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "by the image")
    _, out, _, _ = run(at, ["env"], {"PATH": "/usr/bin:/bin", "A": "1"})
    assert sorted(out.decode().splitlines()) == ["A=1", "PATH=/usr/bin:/bin"]


def test_a_program_whose_name_holds_an_equals_sign_is_a_program(at: Path, short_path: Path) -> None:
    program = short_path / "a=b"
    program.write_text("#!/bin/sh\necho ran $1\n")
    program.chmod(0o755)
    assert run(at, [str(program), "x"], {"PATH": "/usr/bin:/bin"})[:2] == (0, b"ran x\n")


@pytest.mark.parametrize(
    ("argv", "env", "cwd", "status", "says"),
    [
        (["no-such-program"], {"PATH": "/usr/bin:/bin"}, "/", 127, b"missing\n"),
        (["true"], {"PATH": "/usr/bin:/bin"}, "/no/such/place", 126, b"cwd\n"),
        (["true"], {"PATH": "/no/such/place"}, "/", 125, b"noenv\n"),
    ],
)
def test_what_cannot_be_started_is_told_apart_from_what_ran(
    at: Path, argv: list[str], env: dict[str, str], cwd: str, status: int, says: bytes
) -> None:
    assert run(at, argv, env, cwd)[::3] == (status, says)


def test_a_limit_of_open_files_that_the_engine_could_not_take_is_the_tools(at: Path) -> None:
    script = "ulimit -n; ulimit -Hn"
    status, out, _, said = run(at, ["sh", "-c", script], {"PATH": "/usr/bin:/bin"}, open_files=16)
    assert (status, out, said) == (0, b"16\n16\n", b"opened\n")
    # Nobody raises it: with more than the hard limit asked for, the tool is not started.
    assert run(at, ["true"], {"PATH": "/usr/bin:/bin"}, open_files=1 << 40)[::3] == (125, b"nolimit\n")


def test_covers_are_closed_and_places_are_as_what_will_be_there(at: Path) -> None:
    assert stat.S_IMODE((at / "denied-file").stat().st_mode) == 0
    assert stat.S_IMODE((at / "denied-directory").stat().st_mode) == 0
    assert (at / "lib/bin").is_dir()
    assert (at / "lib/one.py").is_file()
    assert stat.S_IMODE((at / "lib").stat().st_mode) == 0o755
    assert (at / "etc/hostname").read_text() == "sandbox\n"


@pytest.mark.parametrize("size", [0, 1, 300_000])
@pytest.mark.parametrize("source", ["file", "pipe"])
def test_a_feed_passes_everything_on_and_then_the_end(at: Path, size: int, source: str) -> None:
    data = os.urandom(size)

    async def feed() -> bytes:
        loop = asyncio.get_running_loop()
        if source == "file":
            path = at / "source"
            path.write_bytes(data)
            read_end = os.open(path, os.O_RDONLY)
            writing = None
        else:
            read_end, write_end = os.pipe()
            writing = loop.run_in_executor(None, _write_all, write_end, data)
        passing = Feed(loop, read_end, Gate(at).open_both("stdin"))
        reading = loop.run_in_executor(None, (at / gate.PIPES_IN / "stdin").read_bytes)
        await asyncio.sleep(0.05)
        passing.start()
        found = await asyncio.wait_for(reading, 20)
        if writing is not None:
            await writing
        passing.close()
        return found

    assert asyncio.run(feed()) == data


def _write_all(fd: int, data: bytes) -> None:
    with os.fdopen(fd, "wb") as file:
        file.write(data)
