"""Landlock as a second wall: what no rule grants is refused by the kernel; each denial has its permitted twin."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox._linux import landlock

pytestmark = [pytest.mark.needs("landlock")]

ROOT = Path(__file__).parents[2]
ABI = landlock.abi_version()

# Restricts itself by the rules in argv, then runs the statements; each prints "ok" or the errno.
CHILD = r"""
import errno, fcntl, json, os, signal, socket, sys
sys.path.insert(0, sys.argv[1])
from sandbox._linux import landlock, process
task = json.loads(sys.argv[2])
if os.geteuid() == 0:
    process.drop_all_caps(process.last_cap())
process.set_no_new_privs()
answers = []
try:
    rules = [(os.open(p[3:], os.O_PATH) if p.startswith("fd:") else p, a) for p, a in task["rules"]]
    if task["abi"]:
        landlock.restrict(rules, task["abi"], **task["options"])
except OSError as error:
    print(json.dumps([errno.errorcode[error.errno], str(error)]))
    raise SystemExit(0)
for statement in task["statements"]:
    try:
        exec(statement, globals())
        answers.append("ok")
    except OSError as error:
        answers.append(errno.errorcode[error.errno])
print(json.dumps(answers))
"""


def restricted(
    rules: list[tuple[str, list[str]]], statements: list[str], *, abi: int = ABI, **options: Any
) -> list[str]:
    task = {"rules": rules, "statements": statements, "abi": abi, "options": options}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", CHILD, str(ROOT), json.dumps(task)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers: list[str] = json.loads(done.stdout)
    return answers


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("read", "write", "other"):
        folder = tmp_path / name
        (folder / "sub").mkdir(parents=True)
        (folder / "file").write_text("content")
        (folder / "program").write_text("#!/bin/true\n")
        (folder / "program").chmod(0o755)
    return tmp_path


def test_each_abi_handles_all_rights_up_to_it() -> None:
    masks = [landlock.rights(abi) for abi in range(1, 8)]
    assert [mask[0] for mask in masks] == [0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF, 0xFFFF, 0xFFFF]
    assert [mask[1] for mask in masks] == [0, 0, 0, 3, 3, 3, 3]
    assert [mask[2] for mask in masks] == [0, 0, 0, 0, 0, 3, 3]
    assert landlock.rights(99) == masks[-1]
    assert landlock.rights(0) == (0, 0, 0)


def test_no_access_may_be_granted_to_make_device_nodes() -> None:
    granted = 0
    for rights in landlock.ACCESS.values():
        assert not granted & rights
        granted |= rights
    assert granted == landlock.rights(7)[0] & ~(landlock.MAKE_CHAR | landlock.MAKE_BLOCK)


def test_read_grant_reads_and_does_not_write(tree: Path) -> None:
    read, other = tree / "read", tree / "other"
    answers = restricted(
        [(str(read), ["read"])],
        [
            f"open({str(read / 'file')!r}).read()",
            f"os.listdir({str(read)!r})",
            f"open({str(read / 'file')!r}, 'a')",
            f"os.truncate({str(read / 'file')!r}, 0)",
            f"open({str(read / 'new')!r}, 'w')",
            f"os.mkdir({str(read / 'new')!r})",
            f"os.unlink({str(read / 'file')!r})",
            f"os.execv({str(read / 'program')!r}, ['program'])",
            f"open({str(other / 'file')!r})",
            f"os.listdir({str(other)!r})",
        ],
    )
    expected = ["ok", "ok", *["EACCES"] * 8]
    if ABI < 3:
        expected[3] = "ok"
    assert answers == expected


def test_write_grant_makes_renames_links_and_removes_but_no_devices(tree: Path) -> None:
    write = tree / "write"
    answers = restricted(
        [(str(write), ["read", "write"])],
        [
            f"os.chdir({str(write)!r})",
            "open('new', 'w').write('x')",
            "open('new', 'r+').truncate(0)",
            "os.mkdir('made')",
            "os.rename('new', 'sub/moved')",
            "os.link('sub/moved', 'made/linked')",
            "os.symlink('x', 'link')",
            "os.mkfifo('fifo')",
            "socket.socket(socket.AF_UNIX).bind('sock')",
            "os.unlink('sub/moved')",
            "os.rmdir('sub')",
            "os.mknod('dev', 0o020600, 0)",
            f"os.rename('file', {str(tree / 'other' / 'stolen')!r})",
            f"os.link({str(tree / 'other' / 'file')!r}, 'stolen')",
        ],
    )
    moves = "ok" if ABI >= 2 else "EXDEV"
    assert answers[:6] == ["ok"] * 4 + [moves] * 2
    assert answers[6:11] == ["ok"] * 3 + (["ok"] * 2 if ABI >= 2 else ["ENOENT", "ok"])
    assert answers[11] == "EACCES"
    assert set(answers[12:]) <= {"EACCES", "EXDEV"}
    # Without Landlock the same process may do all of it (the device 0:0 needs no privilege).
    assert restricted([], [f"os.mknod({str(write / 'dev')!r}, 0o020600, 0)"], abi=0) == ["ok"]


def test_exec_grant_runs_programs_and_shows_nothing_else(tree: Path) -> None:
    program = str(tree / "read" / "program")
    system = [(path, ["read", "exec"]) for path in ("/usr", "/bin", "/lib", "/lib64") if os.path.exists(path)]
    run = f"assert os.spawnv(os.P_WAIT, {program!r}, ['program']) in (0, 127); os.access({program!r}, os.X_OK)"
    statements = [f"os.execv({program!r}, ['program'])"]
    assert restricted([(str(tree / "read"), ["read"]), *system], statements) == ["EACCES"]
    granted = restricted([(str(tree / "read"), ["read", "exec"]), *system], [run])
    assert granted == ["ok"]


def test_rules_take_descriptors_and_single_files(tree: Path) -> None:
    read = tree / "read"
    answers = restricted(
        [(f"fd:{read}", ["read"]), (str(tree / "other" / "file"), ["read", "write", "exec", "ioctl"])],
        [
            f"open({str(read / 'file')!r})",
            f"open({str(tree / 'other' / 'file')!r}, 'r+')",
            f"open({str(tree / 'other' / 'program')!r})",
        ],
    )
    assert answers == ["ok", "ok", "EACCES"]


def test_grant_of_the_root_permits_everything_below_it(tree: Path) -> None:
    answers = restricted([("/", ["read", "write", "exec"])], [f"open({str(tree / 'other' / 'file')!r}, 'r+')"])
    assert answers == ["ok"]


@pytest.mark.skipif(ABI < 5, reason="needs Landlock ABI 5")
def test_device_ioctls_need_their_own_grant() -> None:
    statements = ["fcntl.ioctl(os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY), 0x80045430, bytes(4))"]
    assert restricted([("/dev", ["read", "write"])], statements) == ["EACCES"]
    assert restricted([("/dev", ["read", "write", "ioctl"])], statements) == ["ok"]
    assert restricted([("/dev", ["read", "write", "ioctl"])], statements, abi=4) == ["ok"]


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.skipif(ABI < 4, reason="needs Landlock ABI 4")
def test_tcp_is_held_to_the_given_ports_and_free_when_not_asked(listener: int) -> None:
    connect = f"socket.socket().connect(('127.0.0.1', {listener}))"
    bind = "socket.socket().bind(('127.0.0.1', 0))"
    assert restricted([], [connect, bind]) == ["ok", "ok"]
    assert restricted([], [connect, bind], connect_ports=[], bind_ports=[]) == ["EACCES", "EACCES"]
    assert restricted([], [connect, bind], connect_ports=[listener]) == ["ok", "ok"]
    assert restricted([], [connect, bind], connect_ports=[9], bind_ports=[0]) == ["EACCES", "ok"]


def test_tcp_rules_are_refused_where_the_abi_lacks_them() -> None:
    answers = restricted([], [], abi=3, connect_ports=[1])
    assert answers[0] == "ENOTSUP"
    assert "ABI 4" in answers[1]


@pytest.mark.skipif(ABI < 6, reason="needs Landlock ABI 6")
def test_scope_keeps_signals_and_abstract_sockets_inside() -> None:
    name = f"toolcall-sandbox-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        connect = f"socket.socket(socket.AF_UNIX).connect('\\0{name}')"
        signals = [f"os.kill({os.getpid()}, 0)", "os.kill(os.getpid(), 0)"]
        assert restricted([], [connect, *signals]) == ["EPERM", "EPERM", "ok"]
        assert restricted([], [connect, *signals], scoped=False) == ["ok", "ok", "ok"]
        assert restricted([], [connect, *signals], abi=5) == ["ok", "ok", "ok"]


def test_missing_path_is_named_and_nothing_is_restricted(tree: Path) -> None:
    answers = restricted([(str(tree / "absent"), ["read"])], [])
    assert answers[0] == "ENOENT"
    assert str(tree / "absent") in answers[1]


def test_no_descriptor_stays_open(tree: Path) -> None:
    statements = ["assert not [f for f in os.listdir('/proc/self/fd') if int(f) > 3]"]
    assert restricted([("/proc", ["read"]), (str(tree), ["read"])], statements) == ["ok"]


NO_NEW_PRIVS = "NoNewPrivs:\t1" in Path("/proc/self/status").read_text()


@pytest.mark.skipif(NO_NEW_PRIVS, reason="no_new_privs is set already and is inherited")
def test_restriction_needs_no_new_privs() -> None:
    script = (
        "import errno, os, sys; sys.path.insert(0, sys.argv[1]); from sandbox._linux import landlock, process\n"
        "if os.geteuid() == 0: process.drop_all_caps(process.last_cap())\n"
        f"try: landlock.restrict([], {ABI})\n"
        "except OSError as error: print(errno.errorcode[error.errno], error)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(ROOT)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("EPERM")
    assert "landlock_restrict_self" in done.stdout
