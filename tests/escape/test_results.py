"""What a tool sends out: results, output, file names. All of it is data to whoever receives it."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox import Outcome, Sandbox, ToolFailed
from tests.helpers.escape import BOUNDS, TIME_FACTOR, Jail, source
from tests.helpers.workspaces import plant

pytestmark = [pytest.mark.needs("jail")]

ROOT = Path(__file__).parents[2]
ESCAPES = ("\x1b[2J", "\x1b]0;owned\x07", "\x9b31m", "\r", "\x08", "\u202e", "\x00")
HOSTILE_NAME = "a\x1b]0;owned\x07\r\nsandbox: all good\u202e\x9b"


@pytest.fixture(scope="module")
def functions(state_root: Path) -> Any:
    with Sandbox("python", state=state_root, **BOUNDS) as box:
        yield box


def reply(data: bytes) -> Callable[[], None]:
    """A tool that writes to every descriptor it has, in place of the runner, and ends well."""

    def tool() -> None:
        import os

        for name in os.listdir("/proc/self/fd"):
            fd = int(name)
            if fd > 2:
                try:
                    os.write(fd, data)
                except OSError:
                    continue
        os._exit(0)

    return tool


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def header(length: int, text: bytes) -> bytes:
    return b"TCR1" + length.to_bytes(4, "little") + text


GARBAGE = {
    "nothing": b"",
    "random": os.urandom(512),
    "magic-alone": b"TCR1",
    "length-beyond-the-end": header(1 << 31, b"{}"),
    "no-json": header(4, b"\xff\xfe{}"),
    "deep": header(200_000, b'{"json":' + b"[" * 99_991 + b"]" * 99_991 + b"}"),
    "unknown-tag": header(23, b'{"tree":["os.system",1]}'[:23]),
    "not-an-object": header(2, b"[]"),
    "two-kinds": header(24, b'{"json":1,"error":{"a":1'),
    "huge-number": header(1_000_009, b'{"json":' + b"9" * 1_000_000 + b"}"),
    "error-of-no-shape": header(13, b'{"error":[1]}'),
    "buffer-that-is-not-there": header(19, b'{"tree":["str",99]}'),
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_for_a_result_is_the_tools_failure(functions: Sandbox, name: str) -> None:
    outcome = functions.call(reply(GARBAGE[name]))
    assert isinstance(outcome, Outcome)
    assert outcome.value is None
    assert (outcome.ok, outcome.ending.fault) == (False, "tool"), outcome
    with pytest.raises(ToolFailed):
        outcome.unwrap()
    assert functions.call(lambda: "fine").unwrap() == "fine"


def test_a_pickle_for_a_result_is_not_loaded(functions: Sandbox, tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "made"))
    for data in (bomb, header(len(bomb), bomb)):
        assert functions.call(reply(data)).ok is False
    assert not (tmp_path / "made").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "made").exists()


def test_a_result_cannot_be_of_a_class_that_runs_code(functions: Sandbox, tmp_path: Path) -> None:
    path = str(tmp_path / "made")

    def tool() -> Any:
        class Value:
            def __reduce__(self) -> Any:
                return (open, (path, "w"))

        return Value()

    outcome = functions.call(tool)
    assert (outcome.ok, outcome.value) == (False, None)
    assert not (tmp_path / "made").exists()


def test_a_huge_result_ends_at_the_limit(functions: Sandbox) -> None:
    def tool() -> None:
        import os

        fd = max(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
        while True:
            os.write(fd, b"x" * 65536)

    outcome = functions.call(tool)
    assert outcome.ending.kind == "limit:output"
    assert outcome.ending.fault == "tool"


def test_types_are_checked_against_the_annotation(functions: Sandbox) -> None:
    def liar() -> int:
        return "text"  # type: ignore[return-value]

    def honest() -> int:
        return 3

    assert functions.call(liar).ok is False
    assert functions.call(honest).unwrap() == 3


def test_an_error_cannot_choose_its_class_outside(functions: Sandbox) -> None:
    def tool() -> None:
        class SystemExit2(KeyboardInterrupt):
            pass

        raise SystemExit2("\x1b[31mred")

    outcome = functions.call(tool)
    with pytest.raises(ToolFailed) as caught:
        outcome.unwrap()
    assert type(caught.value) is ToolFailed


def test_the_request_cannot_be_rewritten_through_proc(functions: Sandbox) -> None:
    """The bytes of a call are sealed: what is digested is what ran."""

    def tool() -> list[str]:
        import os

        answers = []
        for name in os.listdir("/proc/self/fd"):
            try:
                target = os.readlink(f"/proc/self/fd/{name}")
                if "memfd" in target:
                    fd = os.open(f"/proc/self/fd/{name}", os.O_RDWR)
                    answers.append(str(os.pwrite(fd, b"x", 0)))
            except OSError as error:
                answers.append(type(error).__name__)
        return answers

    answers = functions.call(tool).unwrap()
    assert set(answers) <= {"PermissionError", "FileNotFoundError"}


def test_a_function_has_no_descriptor_of_ours(functions: Sandbox) -> None:
    """The process that ran the sealing steps becomes the tool: its status channel must be gone."""

    def tool() -> dict[str, str]:
        import os

        return {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if int(name) > 2}

    for _ in range(3):
        try:
            found = functions.call(tool).unwrap()
        except ToolFailed:
            continue  # the listing's own descriptor is gone by the time it is asked about
        assert not [path for path in found.values() if path.startswith("socket:")]


@pytest.mark.parametrize("streams", [">&1", ">&2", ">&1 2>&1"])
def test_a_flood_of_output_ends_at_the_limit(jail: Jail, streams: str) -> None:
    outcome = jail.run(["sh", "-c", f"yes {streams}"], output="1MiB")
    assert (outcome.ending.kind, outcome.ending.fault) == ("limit:output", "tool")
    assert len(outcome.stdout) + len(outcome.stderr) <= 1 << 20
    assert outcome.record.output.truncated is True
    outcome = jail.run(["sh", "-c", f"yes | head -c 1000000 {streams}"], output="1MiB")
    assert outcome.ok


def test_a_flood_of_lines_does_not_grow_the_record(jail: Jail) -> None:
    outcome = jail.run(["sh", "-c", "head -c 900000 /dev/urandom"], output="1MiB")
    assert outcome.ok
    assert len(json.dumps(outcome.record.to_json())) < 100_000


def sandbox_command(*words: str, state: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "NO_COLOR": "1"}
    argv = [sys.executable, "-m", "sandbox.cli.main", *words, "--state", str(state)]
    argv = [*argv[: 3 + 1], "--state", str(state), *words[1:]] if words[0] == "run" else argv
    return subprocess.run(argv, input=stdin, capture_output=True, env=env, check=False, timeout=60 * TIME_FACTOR)


def assert_harmless(text: bytes) -> None:
    shown = text.decode("utf-8", "surrogateescape")
    for sequence in ESCAPES:
        assert sequence not in shown, repr(shown)
    assert "\nsandbox: all good" not in shown


def test_a_hostile_argument_cannot_forge_lines_of_the_record(tmp_path: Path) -> None:
    with Sandbox("shell", state=tmp_path) as box:
        outcome = box.run(["true", HOSTILE_NAME.replace("\0", "")], why=f"because {HOSTILE_NAME}")
        record_id = outcome.record.record_id
    for words in (("audit", "list"), ("audit", "show", record_id)):
        done = sandbox_command(*words, state=tmp_path)
        assert done.returncode == 0, done.stderr
        assert record_id[:8].encode() in done.stdout
        assert_harmless(done.stdout + done.stderr)
    verified = sandbox_command("audit", "verify", state=tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    lines = [line for path in tmp_path.rglob("*.jsonl") for line in path.read_bytes().splitlines()]
    assert all(json.loads(line) for line in lines)
    assert not any(b"\x1b" in line or b"\r" in line for line in lines)


def test_hostile_file_names_reach_the_terminal_escaped(tmp_path: Path) -> None:
    workspace = plant(tmp_path / "workspace", {"kept": "x"})
    script = "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/.envrc', 'w').close()"
    for mode in ("rw", "cow"):
        name = HOSTILE_NAME.replace("/", "") + mode
        done = sandbox_command(
            "run", "--no-tty", "-w", f"{workspace}:{mode}", "--", "python3", "-S", "-c", script, name,
            state=tmp_path / "state",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert_harmless(done.stderr)
        assert done.stdout == b""
    for words in (("audit", "list"),):
        assert_harmless(sandbox_command(*words, state=tmp_path / "state").stdout)


def test_a_tools_own_output_passes_through_a_pipe_untouched(tmp_path: Path) -> None:
    """Bytes are bytes; only what we say ourselves is escaped."""
    data = bytes(range(256))
    done = sandbox_command("run", "--no-tty", "--", "cat", state=tmp_path, stdin=data)
    assert done.stdout == data


def test_a_failing_functions_message_is_bounded_and_escaped_on_the_way_to_a_terminal(functions: Sandbox) -> None:
    def tool() -> None:
        raise ValueError("\x1b]0;owned\x07" + "A" * 10_000_000)

    outcome = functions.call(tool)
    assert outcome.error is not None
    assert len(str(outcome.error)) < 100_000
    record = json.dumps(outcome.record.to_json(), ensure_ascii=False)
    assert len(record) < 200_000
    assert "\x1b" not in record
    stream = io.StringIO()
    print(outcome, file=stream)
    assert "\x1b" not in stream.getvalue()


def test_probes_speak_one_line() -> None:
    """What the other tests rest on: a probe that printed more would be noticed."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", source("act"), '[["exists", "/"]]'], capture_output=True, text=True, check=True
    )
    assert done.stdout == '[{"ok": true}]\n'
