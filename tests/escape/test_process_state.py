"""What of the caller's process survives into the tool: descriptors, environment, ids, groups, terminal, keyrings."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.escape.conftest import Secret
from tests.helpers.escape import TIME_FACTOR, Errno, Jail, source
from tests.helpers.waiting import awaited

pytestmark = [pytest.mark.needs("jail")]

ROOT = Path(__file__).parents[2]
# A caller of its own process: a supervisor inherits what was there when it started.
CALLER = """
import json, os, sys
from sandbox import Sandbox
os.umask(0)
files = [os.open(path, os.O_RDONLY) for path in json.loads(sys.argv[2])]
for fd in files:
    os.set_inheritable(fd, True)
with Sandbox("shell", state=sys.argv[1]) as box:
    out = box.run(["python3", "-S", "-c", sys.argv[3], sys.argv[4]], input=b"given")
    assert out.ok, (out, out.stderr)
    print(out.text)
"""


def call_from_a_process(state: Path, files: list[Path], *actions: list[object], **options: object) -> list[object]:
    argv = [sys.executable, "-c", CALLER, str(state), json.dumps(list(map(str, files)))]
    argv += [source("act"), json.dumps(actions)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=60 * TIME_FACTOR, check=False, env=env, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return [result.get("ok", result.get("errno")) for result in json.loads(done.stdout)]


def test_open_files_of_the_caller_are_not_inherited(tmp_path: Path, secret: Secret) -> None:
    """A secret file, and a directory, which would be a way round every path rule."""
    files = [secret.path, secret.directory, Path("/")]
    actions: list[list[object]] = [["descriptors"]]
    actions += [["open_at_descriptor", fd, "etc/hostname"] for fd in range(3, 24)]
    found = call_from_a_process(tmp_path / "state", files, *actions, close_fds=False)
    descriptors = found[0]
    assert isinstance(descriptors, dict)
    assert set(descriptors) == {"0", "1", "2"}
    assert all(path.startswith(("pipe:", "/memfd:", "/dev/null")) for path in descriptors.values())
    assert set(found[1:]) == {"EBADF"}


def test_no_descriptor_but_the_standard_three(jail: Jail) -> None:
    assert set(jail.one("descriptors")) == {"0", "1", "2"}


def test_the_command_lines_own_input_does_not_go_inside(tmp_path: Path) -> None:
    """`sandbox run -- program < file`: through /proc it could be opened anew, for writing."""
    given = tmp_path / "given"
    given.write_text("given")
    given.chmod(0o666)
    argv = [sys.executable, "-m", "sandbox.cli.main", "run", "--state", str(tmp_path / "state"), "--no-tty"]
    argv += ["--", "python3", "-S", "-c", source("act"), json.dumps([["descriptors"], ["reopen", 0, "r"]])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with given.open("r+b") as file:
        done = subprocess.run(
            argv, stdin=file, capture_output=True, text=True, env=env, check=False, timeout=60 * TIME_FACTOR
        )
    found = json.loads(done.stdout)
    assert [path.split(":")[0] for path in found[0]["ok"].values()] == ["pipe"] * 3
    assert found[1] == {"ok": "given"}


@pytest.mark.parametrize("mode", ["w", "rw"])
def test_input_cannot_be_tampered_with_through_proc(jail: Jail, mode: str) -> None:
    actions = [["reopen", 0, mode], ["reopen", 0, "r"]]
    outcome = jail.run(["python3", "-S", "-c", source("act"), json.dumps(actions)], input=b"given")
    changed, kept = json.loads(outcome.stdout)
    assert changed["errno"] in ("EPERM", "EACCES")
    assert kept == {"ok": "given"}


def test_the_callers_environment_does_not_reach_the_tool(jail: Jail, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "LD_PRELOAD_X", "PYTHONSTARTUP_X", "SSH_AUTH_SOCK", "ZZ_ALLOWED"):
        monkeypatch.setenv(name, f"/value-of-{name}")
    found = jail.one("environment", env_allow=["ZZ_ALLOWED"])
    assert found.pop("ZZ_ALLOWED") == "/value-of-ZZ_ALLOWED"
    # LC_CTYPE is the interpreter's own doing (PEP 538).
    allowed = {"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "PWD", "SHELL", "USER", "TZ", "TERM"}
    assert set(found) <= allowed | {"COLUMNS", "LINES"}
    assert "value-of" not in json.dumps(found)


def test_the_supervisors_environment_is_not_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere")
    from sandbox import Sandbox, link

    with Sandbox("shell", state=tmp_path / "state") as box:
        assert box.run(["true"]).ok
        assert box._link is not None
        pids = (box._link.supervisor_pid, box._link.zygote_pid)
        assert Path(link.PACKAGE_ROOT).exists()
        if os.geteuid() == 0:  # an ordinary user may not look into what made itself undumpable, which is as well
            for pid in pids:
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                assert b"hidden" not in environ
                assert b"LD_LIBRARY_PATH" not in environ


def test_ids_are_those_of_an_unprivileged_user_alone(jail: Jail) -> None:
    found = jail.one("identity")
    assert (found["uid"], found["gid"]) == ([1000] * 3, [1000] * 3)
    # An ordinary user cannot drop supplementary groups: they show as the overflow gid (user_namespaces(7)).
    assert set(found["groups"]) <= (set() if os.geteuid() == 0 else {65534, 1000})


@pytest.mark.parametrize("kind", ["setuid", "setgid", "seteuid", "setegid"])
def test_other_ids_cannot_be_taken(jail: Jail, kind: str) -> None:
    assert jail.act(["become", kind, 0], ["become", kind, 1000]) == [Errno("EINVAL"), True]
    assert jail.one("become", kind, 1001) == Errno("EINVAL")


def test_groups_cannot_be_set(jail: Jail) -> None:
    assert jail.one("become", "setgroups", [0]) == Errno("EPERM")


@pytest.mark.needs("root")
def test_no_process_of_a_jail_has_the_hosts_root_uid(jail: Jail) -> None:
    """Seen from outside: uid 0 without a capability would still own /proc/sys."""
    from sandbox.supervisor import identity, polling

    assert jail.box._link is not None
    zygote = jail.box._link.zygote_pid
    with jail.box.stream(["sleep", "30"]) as stream:
        del stream

        def tools() -> list[int]:
            return [pid for pid in polling.descendants(zygote) if _name(pid) == "sleep"]

        found = awaited(tools)
        assert found
        for pid in found:
            ids = {int(word) for word in _field(pid, "Uid").split()} | {
                int(word) for word in _field(pid, "Gid").split()
            }
            assert all(one >= identity.FIRST_UID for one in ids), ids
            assert _field(pid, "Groups") == ""


def _field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith(f"{name}:"))


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_the_callers_terminal_cannot_be_opened(tmp_path: Path) -> None:
    """The caller has a controlling terminal; the tool has none, or one of its own."""
    pid, master = pty.fork()
    if pid == 0:
        status = 1
        try:
            own = os.open("/dev/tty", os.O_RDWR)  # the caller itself does have one
            os.close(own)
            found = call_from_a_process(tmp_path / "state", [], ["read", "/dev/tty"], ["write", "/dev/tty", "x"])
            status = 0 if found == ["ENXIO", "ENXIO"] else 2
            (tmp_path / "found").write_text(repr(found))
        finally:
            os._exit(status)
    output = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:
            break
        if not data:
            break
        output += data
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, ((tmp_path / "found").read_text(), output)


def test_keyrings_are_closed(jail: Jail) -> None:
    """They belong to no namespace: the caller's session keyring would be inherited (keyrings(7))."""
    from sandbox.seccomp.numbers import NUMBERS

    numbers = NUMBERS[os.uname().machine]
    session, search, describe = -3, 10, 6
    found = jail.act(
        ["syscall", numbers["keyctl"], 0, session, 0],
        ["syscall", numbers["keyctl"], describe, session, ["buffer", 64], 64],
        ["syscall", numbers["keyctl"], search, session, "user", "name", 0],
        ["syscall", numbers["request_key"], "user", "name", 0, session],
        ["syscall", numbers["add_key"], "user", "name", "payload", 7, session],
        ["syscall", numbers["getpid"]],
    )
    assert found[:-1] == [Errno("EPERM")] * 5
    assert found[-1] > 1


def test_limits_on_pid_1_cannot_be_set(jail: Jail) -> None:
    """A CPU limit of one second for pid 1 would end the jail, and the record would blame the host."""
    found = jail.act(
        ["set_limit", 1, "CPU", 1, 1], ["set_limit", 1, "NOFILE", 1, 1], ["set_limit", 0, "NOFILE", 64, 64]
    )
    assert found == [Errno("EPERM"), Errno("EPERM"), True]


def test_pid_1_ignores_every_signal_from_inside(jail: Jail) -> None:
    numbers = [number for number in range(1, 65) if number not in (32, 33)]
    script = f"import os, time\nfor number in {numbers}:\n    os.kill(1, number)\ntime.sleep(0.3)\nprint('alive')"
    outcome = jail.run(["python3", "-S", "-c", script])
    assert (outcome.text, outcome.ending.kind) == ("alive\n", "ok")
    outcome = jail.run(["sh", "-c", "sleep 30 & kill $! && wait $!; echo $?"])
    assert outcome.text == "143\n"
