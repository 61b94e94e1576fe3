"""The command line as a person or a script meets it: exit statuses, streams, signals, terminals, messages."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.needs("jail"), pytest.mark.once]

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "sandbox.cli.main"]


def environment(state: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return {**kept, "PYTHONPATH": path, "SANDBOX_STATE": str(state), "TERM": "xterm"}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory on which the once-said things have been said."""
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    (path / "told-partial").touch()
    return path


class Cli:
    """Runs `sandbox` in a process of its own."""

    def __init__(self, state: Path, cwd: Path) -> None:
        self.state = state
        self.cwd = cwd

    def __call__(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"stdin": subprocess.DEVNULL, **options} if "input" not in options else options
        return subprocess.run(
            [*CLI, *words],
            **{"capture_output": True, **options},
            text=True,
            cwd=self.cwd,
            env=environment(self.state),
            timeout=60,
            check=False,
        )

    def start(self, *words: str, **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*CLI, *words], cwd=self.cwd, env=environment(self.state), **options)

    def json(self, *words: str) -> Any:
        done = self(*words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def cli(state: Path, tmp_path: Path) -> Cli:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    return Cli(state, cwd)


# -- exit statuses --------------------------------------------------------------------------------------------------


def test_exit_statuses_are_the_tools_own(cli: Cli) -> None:
    for script, status in (
        ("exit 0", 0),
        ("exit 7", 7),
        ("exit 255", 255),
        ("kill -TERM $$", 143),
        ("kill -9 $$", 137),
    ):
        done = cli("run", "--", "sh", "-c", script)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", ""), script


def test_what_cannot_be_executed_is_126_and_what_is_not_there_127(cli: Cli) -> None:
    missing, plain = cli("run", "--", "no-such-program"), cli("run", "--", "/etc/passwd")
    assert (missing.returncode, plain.returncode) == (127, 126)
    assert missing.stderr.startswith("sandbox: no-such-program: no such program inside [tool_error")
    assert plain.stderr.startswith("sandbox: /etc/passwd: cannot be executed [tool_error")
    assert cli("run", "--", "sh", "-c", "no-such-program").returncode == 127
    nowhere = cli("run", "--set-env", "PATH=", "--", "ls")
    assert (nowhere.returncode, "ls: no such program inside [tool_error, fault: tool" in nowhere.stderr) == (127, True)


def test_limits_have_their_statuses_and_say_how_to_get_more(cli: Cli) -> None:
    slow = cli("run", "--wall-time", "300ms", "--", "sleep", "30")
    assert slow.returncode == 124
    assert slow.stderr.startswith("sandbox: the wall time ran out (0.3s; --wall-time allows more) [limit:wall_time")
    big = cli("run", "--memory", "64MiB", "--", "python3", "-c", "x = bytearray(300 << 20); import time; time.sleep(1)")
    assert big.returncode == 137
    assert "(64MiB; --memory allows more) [limit:memory, fault: tool" in big.stderr
    loud = cli("run", "--output", "1KiB", "--", "yes")
    assert (loud.returncode, len(loud.stdout)) == (137, 1024)
    assert "[limit:output" in loud.stderr


MISTAKES = [
    (["-p", "no-such"], "there is no profile 'no-such'", "a file is given with its path"),
    (["-p", "./no-such.toml"], "no-such.toml: cannot be read: No such file", ""),
    (["-p", "bad.toml"], "bad.toml:3 resources.memry: unknown key", "did you mean 'memory'?"),
    (["-p", "broken.toml"], "broken.toml:1: is not TOML", ""),
    (["--memory", "lots"], "--memory: 'lots' is not a size; allowed: a number and one of B, KiB", ""),
    (["--wall-time", "5"], "--wall-time: '5' has no unit; allowed: a number and one of ms, s", ""),
    (["--pids", "0"], "--pids: 0 is too small; allowed: 1 or more", ""),
    (["--pids", "many"], "Invalid value for '--pids'", ""),
    (["--cpus", "1000000"], "--cpus: 1000000.0 is too large; allowed: 1024.0 or less", ""),
    (["--read", "/no/such"], "--read: the path '/no/such' is not there", "mark it optional"),
    (["--write", "/"], "--write: '/' is the jail's own", "name the directories"),
    (["-w", "/no/such"], "--workspace: the workspace '/no/such' is not a directory", ""),
    (["-w", ".:rx"], "--workspace: unknown workspace mode 'rx'; allowed: rw, cow, ro", ""),
    (["--set-env", "NAME"], "--set-env: 'NAME' is not NAME=VALUE", "--env NAME passes on"),
    (["--best-effort", "magic"], "--best-effort: 'magic' is not allowed", ""),
    (["--collect", "*.json"], "--collect GLOB and --into DIR belong together", ""),
    (["--commit"], "--commit: there is nothing to commit without a cow workspace", ""),
    (["--record", "/no/such/file"], "--record: /no/such/file cannot be written", ""),
    (["--state", "/proc/none"], "cannot keep records in /proc/none", "SANDBOX_STATE or --state"),
    (["--memory", ""], "--memory: the value is empty", ""),
    (["-w", ""], "--workspace: the value is empty", ""),
    (["--set-env", "A B=c"], "--set-env: 'A B' is not a variable name", ""),
    (["--allow-protected", "hooks"], "--allow-protected: 'hooks' is no rule and no path; rules are", ""),
    (["--traceparent", "00-1-2-01"], "--traceparent: '00-1-2-01' is not 00-TRACE-SPAN-FLAGS", ""),
    (["--no-such-option"], "No such option: --no-such-option", ""),
]


@pytest.mark.parametrize(("words", "message", "hint"), MISTAKES, ids=[" ".join(words) for words, _, _ in MISTAKES])
def test_a_mistake_is_one_clear_message_and_125(cli: Cli, words: list[str], message: str, hint: str) -> None:
    (cli.cwd / "bad.toml").write_text('extends = "shell"\n[resources]\nmemry = "1GiB"\n')
    (cli.cwd / "broken.toml").write_text("[resources\n")
    done = cli("run", *words, "--", "touch", "ran")
    assert (done.returncode, done.stdout) == (125, "")
    assert message in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("sandbox: ") <= 1
    assert not list(cli.state.glob("chains/*/*.jsonl")), "something ran"


def test_a_refusal_is_125_with_a_record(cli: Cli) -> None:
    (cli.cwd / "strong.toml").write_text('extends = "shell"\n[isolation]\nminimum = "microvm"\n')
    done = cli("run", "-p", "strong.toml", "--record", "refused.json", "--", "true")
    assert done.returncode == 125
    assert done.stderr.startswith("sandbox: this host cannot enforce isolation")
    record = json.loads((cli.cwd / "refused.json").read_text())
    assert record["ending"]["kind"] == "refused"
    assert f"sandbox: record {record['record_id']}\n" in done.stderr


def test_missing_commands_and_unknown_ones_are_said_so(cli: Cli) -> None:
    assert (cli("run").returncode, "Missing argument" in cli("run").stderr) == (125, True)
    typo = cli("rum")
    assert (typo.returncode, "Did you mean 'run'?" in typo.stderr) == (2, True)


def test_a_file_outside_is_pointed_at(cli: Cli) -> None:
    (cli.cwd / "script.py").write_text("print('ran')")
    done = cli("run", "--", "python3", "script.py")
    assert done.returncode == 2
    assert "sandbox: hint: script.py is in the current directory, which is not inside: -w ." in done.stderr
    assert cli("run", "-w", ".", "--", "python3", "script.py").stdout == "ran\n"
    path = str(cli.cwd / "script.py")
    absolute = cli("run", "--", "cat", path)
    assert "is not inside unless it is granted: --read" in absolute.stderr
    denied = cli("run", "--read", ".", "--deny", "**/script.py", "--", "cat", path)
    assert denied.stderr.endswith(f"sandbox: hint: {path} is denied inside: **/script.py\n")
    assert "hint" not in cli("run", "--read", ".", "--", "sh", "-c", "exit 1", path).stderr


def test_a_limit_that_a_tool_ran_into_and_failed_of_is_named(cli: Cli) -> None:
    full = cli("run", "--disk", "1MiB", "--", "sh", "-c", "head -c 5M /dev/zero >/tmp/x")
    assert full.stderr.endswith("sandbox: hint: the limit disk was reached (1MiB; --disk allows more)\n")
    forks = "for i in 1 2 3 4 5 6 7 8 9; do sleep 2 & done; wait"
    many = cli("run", "--pids", "4", "--", "sh", "-c", forks)
    record = cli.json("audit", "show", "last", "--json")
    assert many.returncode == 2
    if record["enforcement"]["pids"]["mechanism"].startswith("cgroup"):
        assert many.stderr.endswith("sandbox: hint: the limit pids was reached (4; --pids allows more)\n")
        assert record["attestation"]["pids"]["verdict"] == "exceeded"
    fits = cli("run", "--pids", "4", "--", "sh", "-c", "sleep 0.2 & sleep 0.2 & sleep 0.2 & wait")
    assert (fits.returncode, fits.stderr) == (0, "")
    record = cli.json("audit", "show", "last", "--json")
    if record["enforcement"]["pids"]["mechanism"].startswith("cgroup"):
        # The jail's own pid 1 is counted with the tool's four.
        attested = record["attestation"]["pids"]
        assert (attested["verdict"], attested["granted"], attested["observed"]) == ("within", 4, 5)


# -- streams and signals --------------------------------------------------------------------------------------------


def test_streams_pass_through_apart_and_whole(cli: Cli) -> None:
    done = cli("run", "--", "sh", "-c", "cat; echo err >&2", input="some input\n")
    assert (done.stdout, done.stderr, done.returncode) == ("some input\n", "err\n", 0)
    data = bytes(range(256)) * 20_000
    with cli.start("run", "--", "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(data, timeout=60)
    assert out == data


def test_output_comes_as_it_is_made(cli: Cli) -> None:
    script = "echo first; read line; echo got $line"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with cli.start("run", "--", "sh", "-c", script, **pipes) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == b"first\n"
        process.stdin.write(b"answer\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"got answer\n"
        process.communicate(timeout=30)


def test_closed_streams_are_nobodys_trouble(cli: Cli) -> None:
    shell = " ".join(CLI) + " run -- sh -c 'cat; echo out; echo err >&2; exit 4'"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        options = {"shell": True, "capture_output": True, "text": True, "timeout": 60, "input": ""}
        done = subprocess.run(f"{shell} {closed}", cwd=cli.cwd, env=environment(cli.state), check=False, **options)
        assert done.returncode == 4, closed
        assert done.stdout == ("" if ">&-" in closed.replace("2>&-", "") else "out\n")
        assert "Traceback" not in done.stderr


def test_a_reader_that_leaves_breaks_the_tools_pipe(cli: Cli) -> None:
    shell = " ".join(CLI) + " run -- yes | head -n 1; echo ${PIPESTATUS[0]}"
    started = time.monotonic()
    argv = ["bash", "-c", shell]
    done = subprocess.run(
        argv, cwd=cli.cwd, env=environment(cli.state), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "y\n141\n"
    assert done.stderr == ""
    assert time.monotonic() - started < 20


def test_output_that_cannot_be_written_is_an_error_and_not_lost(cli: Cli) -> None:
    with open("/dev/full", "w") as full:
        done = cli("run", "--", "echo", "lost", stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 125
    assert done.stderr == "sandbox: cannot write to standard output: No space left on device; the call was ended\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_tool_which_decides(cli: Cli, number: int) -> None:
    name = signal.Signals(number).name.removeprefix("SIG")
    script = f"trap 'echo caught; exit 9' {name}; echo ready; while :; do sleep 0.05; done"
    with cli.start("run", "--", "sh", "-c", script, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"caught\n", 9)


def test_a_signal_that_the_tool_does_not_handle_ends_it(cli: Cli) -> None:
    with cli.start("run", "--", "sh", "-c", "echo ready; exec sleep 60", stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 143
    (record,) = cli.json("audit", "list", "--json")
    assert record["ending"]["kind"] == "tool_error"


def test_an_interrupt_before_the_tool_runs_ends_everything_quietly(cli: Cli) -> None:
    for delay in (0.05, 0.1, 0.2, 0.35, 0.5):
        process = cli.start("run", "--", "sleep", "60", stderr=subprocess.PIPE)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        # Before our first line runs, the interrupt is the interpreter's, which on a busy machine may take a while.
        if err.startswith((b"Fatal Python error: init_", b"Could not import runpy module")):
            continue
        assert process.returncode in (130, -signal.SIGINT), err.decode()
        assert b"Traceback" not in err or b", in main\n" not in err, err.decode()


# -- terminals ------------------------------------------------------------------------------------------------------


class Terminal:
    """A process with a terminal of its own, of which this is the other end."""

    def __init__(self, argv: list[str], cwd: Path, env: dict[str, str], *, rows: int = 30, columns: int = 100) -> None:
        self.master, slave = os.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(slave)
        claim = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", claim, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            cwd=cwd,
            env=env,
            start_new_session=True,
        )
        self.slave = slave
        self.seen = ""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, within_s: float = 30.0) -> str:
        """Read until `text` has been shown since the last wait; gives what came up to it."""
        deadline = time.monotonic() + within_s
        while text not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} was not shown, but {self.seen!r}"
            self.seen += os.read(self.master, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait(self) -> int:
        status = self.process.wait(30)
        assert termios.tcgetattr(self.slave) == self.before, "the terminal was not restored"
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.slave)
        os.close(self.master)


@pytest.fixture
def terminal(cli: Cli) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def open_terminal(*words: str, **options: Any) -> Terminal:
            argv = options.pop("argv", [*CLI, *words])
            opened = Terminal(argv, cli.cwd, environment(cli.state), **options)
            stack.callback(opened.close)
            return opened

        yield open_terminal


def test_a_tool_on_a_terminal_has_one_of_its_own(terminal: Any) -> None:
    screen = terminal(
        "run", "--", "sh", "-c", "tty; test -t 0 && test -t 1 && test -t 2 && echo yes; stty size; exit 6"
    )
    screen.wait_for("/dev/pts/0")
    screen.wait_for("yes")
    screen.wait_for("30 100")
    assert screen.wait() == 6


def test_typing_interrupting_and_resizing_reach_the_tool(terminal: Any) -> None:
    traps = "trap 'exit 9' TERM; trap 'echo interrupted' INT; trap 'stty size' WINCH"
    script = f"{traps}; echo ready; read word; echo got:$word"
    screen = terminal("run", "--", "bash", "-c", f"{script}; while :; do sleep 0.05; done", rows=24, columns=80)
    screen.wait_for("ready")
    screen.type("typed\r")
    screen.wait_for("got:typed")
    screen.type("\x03")
    screen.wait_for("interrupted")
    screen.resize(40, 132)
    screen.wait_for("40 132")
    screen.process.send_signal(signal.SIGTERM)
    assert screen.wait() == 9


def test_end_of_file_typed_at_a_terminal_is_one_inside(terminal: Any) -> None:
    screen = terminal("run", "--", "sh", "-c", "echo ready; cat; echo done")
    screen.wait_for("ready")
    screen.type("line\r\x04")
    screen.wait_for("done")
    assert screen.wait() == 0


def test_the_terminal_is_restored_when_the_call_is_ended(terminal: Any) -> None:
    screen = terminal("run", "--wall-time", "500ms", "--", "sh", "-c", "stty raw -echo; echo ready; sleep 60")
    screen.wait_for("the wall time ran out")
    assert screen.wait() == 124


def test_without_a_terminal_asked_for_there_is_none(terminal: Any, cli: Cli) -> None:
    screen = terminal("run", "--no-tty", "--", "sh", "-c", "tty; exit 0")
    screen.wait_for("not a tty")
    assert screen.wait() == 0
    assert cli("run", "--tty", "--", "sh", "-c", "test -t 1 && echo yes").stdout == "yes\n"


def test_a_shell_is_a_look_around(terminal: Any, cli: Cli) -> None:
    screen = terminal("shell", "--set-env", "A=b")
    screen.wait_for("(sandbox shell) /workspace $")
    screen.type("cd /; echo $A-$(id -un)-$((6 * 7))\r")
    screen.wait_for("b-user-42")
    screen.wait_for("(sandbox shell) / $")
    screen.type("no-such-program\r")
    screen.wait_for("command not found")
    screen.type("exit 3\r")
    assert screen.wait() == 3
    piped = cli("shell", input="echo piped $((6 * 7)); exit 5\n")
    assert (piped.stdout, piped.stderr, piped.returncode) == ("piped 42\n", "", 5)


def test_a_slow_start_is_shown_on_a_terminal_and_nowhere_else(terminal: Any, cli: Cli) -> None:
    source = (
        "import time; from sandbox.cli import progress; progress.AFTER_S = 0.1\n"
        "with progress.Progress('starting'): time.sleep(0.8)\nprint('over')"
    )
    screen = terminal(argv=[sys.executable, "-c", source])
    screen.wait_for("sandbox: starting")
    screen.wait_for("over")
    assert screen.wait() == 0
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment(cli.state), check=True
    )
    assert (done.stdout, done.stderr) == ("over\n", "")
    run = (
        "import sys; from sandbox.cli import main, progress; progress.AFTER_S = 0.01\n"
        "sys.argv = ['sandbox', 'run', '--', 'sh', '-c', 'echo it runs; exit 3']; main.main()"
    )
    screen = terminal(argv=[sys.executable, "-c", run])
    screen.wait_for("sandbox: starting")
    screen.wait_for("it runs")
    assert screen.wait() == 3


LIGHT = (
    "import os, sys; from sandbox.cli import main; sys.argv = ['sandbox', 'run', *sys.argv[1:]]\n"
    "end = os._exit\n"
    "def show(status): print(*sys.modules, flush=True); end(status)\n"
    "os._exit = show; main.main()"
)
# `dataclasses` alone brings in `inspect`, `typing` takes as long as all of ours.
NOT_NEEDED = {"asyncio", "rich", "typer", "pydantic", "numpy", "cloudpickle", "cryptography", "logging", "ssl"}
NOT_NEEDED |= {"dataclasses", "inspect", "typing", "pathlib", "sandbox.codec", "sandbox.runtime", "sandbox.planner"}
NOT_NEEDED |= {"subprocess", "locale", "getpass", "hashlib"}


def test_a_run_loads_nothing_that_it_does_not_need(cli: Cli) -> None:
    def loaded(*words: str) -> set[str]:
        argv = [sys.executable, "-c", LIGHT, *words]
        done = subprocess.run(
            argv, capture_output=True, text=True, env=environment(cli.state), check=True, cwd=cli.cwd, timeout=60
        )
        return set(done.stdout.splitlines()[-1].split())

    first, second = loaded("--", "true"), loaded("--why", "again", "--", "echo", "other words")
    assert {"pydantic", "sandbox.planner"} <= first, "there was no plan yet"
    assert "sandbox.link" in second
    # An ordinary user's cgroups are looked at before the supervisor starts: it may need a scope of systemd.
    by_scope = set() if os.geteuid() == 0 else {"dataclasses", "inspect", "typing", "pathlib"}
    assert not (NOT_NEEDED - by_scope) & second


def test_a_kept_plan_is_the_one_that_is_decided_and_shown(cli: Cli) -> None:
    words = ["--memory", "300MiB", "--agent", "me", "--why", "to see"]
    outs = [cli("run", *words, "--", "sh", "-c", "pwd; env | sort; ulimit -a") for _ in range(3)]
    assert outs[0].returncode == 0, outs[0].stderr
    assert len({out.stdout for out in outs}) == 1
    (path,) = (cli.state / "cache").glob("*.plan")
    kept = json.loads(path.read_bytes()[32:])
    shown = cli.json("plan", *words[:2], "--json")
    own = {"argv", "env", "cwd"}
    assert {k: v for k, v in kept["plan"].items() if k not in own} == {
        k: v for k, v in shown["plan"].items() if k not in own
    }
    assert kept["policy"]["manifest_sha256"] == shown["manifest_sha256"]
    decided, *others = [cli.json("audit", "show", entry["record_id"], "--json") for entry in records(cli)]
    for record in others:
        for group in ("policy", "enforcement", "tool", "isolation"):
            assert record.get(group) == decided.get(group), group
        assert record["context"] == decided["context"]
        assert record["context"]["why"] == "to see"


def records(cli: Cli) -> list[Any]:
    found = cli.json("audit", "list", "--json")
    assert isinstance(found, list)
    return found


def test_a_change_of_a_parent_or_a_ceiling_holds_for_the_next_run(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, ceiling = cli.cwd / "parent.toml", cli.cwd / "ceiling.toml"
    parent.write_text('extends = "shell"\n[resources]\nopen_files = 101\n')
    (cli.cwd / "child.toml").write_text('extends = "./parent.toml"\n')
    (cli.cwd / "named.toml").write_text('extends = "shell"\n[resources]\nopen_files = 101\n')
    for profile, file in (("child.toml", parent), ("named.toml", cli.cwd / "named.toml")):
        run = ("run", "-p", f"./{profile}", "--", "sh", "-c", "ulimit -n")
        assert [cli(*run).stdout for _ in range(2)] == ["101\n"] * 2
        file.write_text(file.read_text().replace("101", "102"))
        assert [cli(*run).stdout for _ in range(2)] == ["102\n"] * 2
    ceiling.write_text("[resources]\nopen_files = 90\n")
    monkeypatch.setenv("SANDBOX_CEILING", str(ceiling))
    assert [cli(*run).stdout for _ in range(2)] == ["90\n"] * 2
    ceiling.write_text("[resources]\nopen_files = 80\n")
    assert cli(*run).stdout == "80\n"


def test_a_variable_that_is_passed_on_is_the_one_of_the_moment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("UTC", "UTC", "CET"):
        monkeypatch.setenv("TZ", value)
        assert cli("run", "--", "sh", "-c", "echo $TZ").stdout == f"{value}\n"
    assert b"CET" not in b"".join(path.read_bytes() for path in (cli.state / "cache").glob("*.plan"))


def test_what_depends_on_more_than_is_checked_is_not_kept(cli: Cli) -> None:
    (cli.cwd / "data").mkdir()
    for words in (["--read", "data"], ["-w", "."], ["--set-env", "A=b"], ["--deny", "/etc/hosts"]):
        assert cli("run", *words, "--", "true").returncode == 0, words
    assert not list((cli.state / "cache").glob("*.plan"))
    assert cli("run", "--deny", "**/.env", "--", "true").returncode == 0
    assert len(list((cli.state / "cache").glob("*.plan"))) == 1


# -- workspaces and files -------------------------------------------------------------------------------------------


def test_workspace_modes(cli: Cli) -> None:
    (cli.cwd / "a").write_text("a\n")
    change = ["--", "sh", "-c", "cat a && echo b > b"]
    assert cli("run", "-w", ".:ro", *change).returncode != 0
    assert not (cli.cwd / "b").exists()
    kept = cli("run", "-w", ".", *change)
    assert (kept.returncode, kept.stdout) == (0, "a\n")
    assert "sandbox: 1 added, 0 modified, 0 deleted; kept: sandbox changes show|commit|discard" in kept.stderr
    assert not (cli.cwd / "b").exists()
    record_id = kept.stderr.split()[-1]
    assert "b" in cli("changes", "show", record_id).stdout
    assert cli("changes", "commit", record_id).returncode == 0
    assert (cli.cwd / "b").read_text() == "b\n"
    (cli.cwd / "b").unlink()
    assert cli("run", "-w", ".:rw", *change).returncode == 0
    assert (cli.cwd / "b").read_text() == "b\n"


def test_commit_applies_what_a_good_command_changed(cli: Cli) -> None:
    bad = cli("run", "-w", ".", "--commit", "--", "sh", "-c", "echo 1 > f; exit 3")
    assert (bad.returncode, (cli.cwd / "f").exists()) == (3, False)
    good = cli("run", "-w", ".", "--commit", "--", "sh", "-c", "echo 1 > f; mkdir -p .git/hooks; echo > .git/hooks/x")
    assert (cli.cwd / "f").read_text() == "1\n"
    assert not (cli.cwd / ".git" / "hooks" / "x").exists()
    assert good.returncode == 125
    assert "sandbox: not committed: .git/hooks" in good.stderr
    assert cli("run", "-w", ".", "--commit", "--", "sh", "-c", "echo 2 > f").returncode == 0


def test_collected_files_land_in_a_directory(cli: Cli) -> None:
    script = "mkdir -p out; echo '{}' > out/a.json; echo no > out/b.txt; ln -s /etc/passwd out/c.json"
    done = cli("run", "--collect", "out/*.json", "--into", "got", "--", "sh", "-c", script)
    assert done.returncode == 0
    assert sorted(path.name for path in (cli.cwd / "got").rglob("*") if path.is_file()) == ["a.json"]
    assert "sandbox: 1 files collected into got" in done.stderr


def test_overrides_reach_the_manifest(cli: Cli) -> None:
    words = ["--memory", "200MiB", "--pids", "40", "--cpus", "0.5", "--wall-time", "9s", "--disk", "20MiB"]
    words += ["--output", "2MiB", "--deny", "**/.env", "--read", "data", "--why", "to see", "--record", "r.json"]
    words += ["--set-env", "A=b", "--env", "GIVEN"]
    (cli.cwd / "data").mkdir()
    (cli.cwd / "data" / ".env").write_text("secret")
    (cli.cwd / "data" / "f").write_text("plain")
    script = f"cat {cli.cwd}/data/f {cli.cwd}/data/.env; echo $A"
    done = cli("run", *words, "--", "sh", "-c", script)
    assert (done.stdout, "Permission denied" in done.stderr) == ("plainb\n", True)
    record = json.loads((cli.cwd / "r.json").read_text())
    manifest = record["policy"]["resolved_manifest"]
    resources = manifest["resources"]
    assert (resources["memory_bytes"], resources["pids"], resources["cpus"]) == (200 << 20, 40, 0.5)
    assert (resources["wall_time_s"], resources["disk_bytes"], resources["output_bytes"]) == (9, 20 << 20, 2 << 20)
    assert manifest["environment"]["set"] == {"A": "[not recorded]"}
    assert "GIVEN" in manifest["environment"]["allow"]
    assert record["context"]["why"] == "to see"


TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_call_is_joined_to_agent_session_and_trace(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def recorded(*words: str) -> tuple[dict[str, Any], str]:
        done = cli("run", *words, "--", "true")
        assert done.returncode == 0, done.stderr
        record = cli.json("audit", "show", "last", "--json")
        return record["context"] | {"agent": record["agent"]["name"]}, done.stderr

    monkeypatch.setenv("TRACEPARENT", TRACE)
    monkeypatch.setenv("SANDBOX_SESSION", "from-env")
    context, _ = recorded("--agent", "scout", "--parent", "01a1fe8a", "--why", "look")
    assert (context["agent"], context["session"], context["why"]) == ("scout", "from-env", "look")
    assert (context["trace_id"], context["span_id"]) == (TRACE[3:35], TRACE[36:52])
    assert context["parent_record_id"] == "01a1fe8a"
    context, _ = recorded("--traceparent", TRACE.replace("b7ad", "0000"), "--session", "given")
    assert (context["session"], context["span_id"]) == ("given", "00006b7169203331")
    # What others left in the environment is no reason not to run.
    monkeypatch.setenv("TRACEPARENT", "no trace")
    context, said = recorded()
    assert context["trace_id"] is None
    assert said.startswith("sandbox: TRACEPARENT is left out: 'no trace' is not 00-TRACE")


# -- facts ----------------------------------------------------------------------------------------------------------


def test_every_json_output_parses(cli: Cli) -> None:
    kept = cli("run", "-w", ".", "--record", "r.json", "--", "sh", "-c", "echo x > f")
    record_id = json.loads((cli.cwd / "r.json").read_text())["record_id"]
    assert kept.returncode == 0
    assert cli.json("plan", "--json")["plan"]["steps"]
    assert cli.json("plan", "-p", "python", "--memory", "1GiB", "--json", "--", "python3")["profile"] == "python"
    assert {info["name"] for info in cli.json("profile", "list", "--json")} >= {"shell", "python"}
    assert cli.json("profile", "show", "shell", "--json")
    assert cli.json("profile", "schema")["type"] == "object"
    assert isinstance(cli.json("audit", "list", "--json"), list)
    assert cli.json("audit", "show", record_id, "--json")["record_id"] == record_id
    assert cli.json("audit", "verify", "--json")
    assert len(cli.json("changes", "list", "--json")) == 1
    assert cli.json("changes", "show", record_id, "--json")["record_id"] == record_id
    assert cli.json("changes", "show", "last", "--json")["record_id"] == record_id
    assert cli.json("changes", "discard", record_id, "--json")
    assert cli.json("changes", "list", "--json") == []
    doctor = cli("doctor", "--json")
    assert doctor.returncode in (0, 1)
    assert json.loads(doctor.stdout)["controls"]
    differing = cli("profile", "diff", "shell", "python", "--json")
    assert json.loads(differing.stdout)


def test_plan_says_what_each_limit_is_held_by(cli: Cli) -> None:
    shown = cli("plan", "-p", "python", "--pids", "33").stdout
    assert "seccomp" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith("pids")] == [["pids", "33"]]


def test_a_refused_plan_is_shown_with_what_is_short(cli: Cli) -> None:
    strict = cli.cwd / "strict.toml"
    strict.write_text('extends = "shell"\n[remove]\nisolation.best_effort = ["io"]\n[isolation]\nrequired = ["io"]\n')
    done = cli("plan", "-p", str(strict))
    if done.returncode == 0:
        pytest.skip("io holds in full here")
    lines = done.stdout.splitlines()
    assert done.returncode == 125
    assert next(line.split() for line in lines if line.startswith("io "))[4] == "refused"
    assert any(line.split()[1:2] == ["seccomp"] for line in lines)
    assert done.stderr.startswith("sandbox: this host cannot enforce io:")
    data = json.loads(cli("plan", "-p", str(strict), "--json").stdout)
    assert list(data["refused"]["controls"]) == ["io"]
    assert data["plan"]["steps"]
    assert cli.json("plan", "--json")["refused"] is None


def test_plan_needs_no_privileges_and_says_what_is_missing_without_them(cli: Cli) -> None:
    # Inside a jail there is no privilege at all, not even that of making a user namespace.
    grants = [word for path in sys.path if Path(path).is_dir() for word in ("--read", path)]
    inside = ["python3", "-m", "sandbox.cli.main", "plan", "-p", str(ROOT / "profiles" / "shell.toml")]
    path = f"PYTHONPATH={os.pathsep.join([str(ROOT), *filter(None, sys.path)])}"
    places = ["--read", str(ROOT / "sandbox"), "--read", str(ROOT / "profiles")]
    done = cli("run", "-p", "python", *places, *_unseen(grants), "--set-env", path, "--", *inside)
    assert done.returncode == 125, done.stderr
    assert "sandbox: this host cannot enforce" in done.stderr
    assert "refused here: what this host does not hold is marked" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("processes"))
    assert " none refused " in line
    assert "Traceback" not in done.stderr


def _unseen(grants: list[str]) -> list[str]:
    """Those grants that the interpreter's own view does not bring along, so that the test needs no more than that."""
    pairs = zip(grants[::2], grants[1::2], strict=True)
    return [
        word for pair in pairs for word in pair if not pair[1].startswith((sys.prefix, "/usr", str(ROOT / "sandbox")))
        and Path(pair[1]) != ROOT and ROOT not in Path(pair[1]).parents and Path(pair[1]) not in ROOT.parents
    ]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["run"], ["shell"], ["plan"], ["doctor"], ["profile"], ["audit"], ["changes"]])
def test_help_is_there(cli: Cli, words: list[str]) -> None:
    done = cli(*words, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: sandbox" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_completion_knows_commands_options_and_profiles(cli: Cli) -> None:
    # Which shell it is for is told by the parent process.
    script = shlex.join([*CLI, "--show-completion"]) + "; exit $?"
    shown = subprocess.run(
        ["bash", "-c", script], env=environment(cli.state), capture_output=True, text=True, timeout=30, check=False
    )
    assert "complete" in shown.stdout, shown
    for line, wanted in (("sandbox ru", "run"), ("sandbox run --mem", "--memory"), ("sandbox run -p she", "shell")):
        words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_SANDBOX_COMPLETE": "complete_bash"}
        env = {**environment(cli.state), **words}
        done = subprocess.run(CLI, env=env, capture_output=True, text=True, timeout=30, check=False)
        assert wanted in done.stdout.split(), (line, done)


def test_limits_that_hold_in_part_are_said_once(cli: Cli) -> None:
    (cli.state / "told-partial").unlink()
    first, second = cli("run", "--", "true"), cli("run", "--", "true")
    record = cli.json("audit", "list", "--json")[0]
    partial = [name for name, control in record["enforcement"].items() if control["level"] != "full"]
    assert ("only in part" in first.stderr) == bool(partial)
    assert second.stderr == ""
