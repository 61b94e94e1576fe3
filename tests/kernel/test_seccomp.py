"""The real filter over a real process: each refused group answers its errno, and its permitted twin works.

A child without privileges installs the filter and makes the calls; what it cannot undo ends with it. The errnos are
seen twice: as promised, and with the filter's answers replaced by an errno that no kernel code returns here, so that
"refused by the filter" cannot be mistaken for "refused by the kernel behind it".
"""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox.seccomp import bpf
from sandbox.seccomp import compile as compiler
from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import NUMBERS

pytestmark = [pytest.mark.needs("seccomp")]

ARCH = platform.machine()
POLICY = policies.default_policy()
ROOT = Path(__file__).parents[2]
DIRTY = 0xDEAD_BEEF_0000_0000
# Nothing in the kernel answers these to such calls; they stand in for EPERM and ENOSYS.
STAND_IN = {"EPERM": errno.ENOANO, "ENOSYS": errno.EBADSLT}

# Reads {"program", "calls", "uid"} from stdin, prints one list of [result, errno]. A result of 0 in a child of clone
# ends that child. Arguments are numbers, "b:TEXT" for a C string, "n:SIZE" for a zeroed buffer.
CHILD = r"""
import ctypes, json, os, sys
from sandbox._linux import process, seccomp
task = json.loads(sys.stdin.read())
os.umask(0)
# A descriptor that every call can use: a terminal of our own.
master, tty = os.openpty()
if os.geteuid() == 0:
    uid = task["uid"]
    os.setgroups([])
    if uid == 0:
        process.drop_all_caps(process.last_cap())
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
process.set_no_new_privs()
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
if task["program"]:
    seccomp.install(bytes.fromhex(task["program"]))
results, keep = [], []
for nr, *args in task["calls"]:
    words = []
    for arg in args:
        if arg == "tty":
            arg = tty
        if isinstance(arg, str):
            buffer = ctypes.create_string_buffer(arg[2:].encode() if arg[0] == "b" else int(arg[2:]))
            keep.append(buffer)
            arg = ctypes.addressof(buffer)
        words.append(ctypes.c_ulong(arg & (1 << 64) - 1))
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(nr), *words)
    code = ctypes.get_errno()
    if result == 0 and task.get("clone") == nr:
        os._exit(0)
    if task.get("clone") == nr and result > 0:
        os.waitpid(result, 0)
    results.append([result, code if result == -1 else 0])
print(json.dumps(results))
"""


def numbers() -> dict[str, int]:
    return dict(NUMBERS[ARCH])


def make_calls(
    calls: list[tuple[Any, ...]], *, policy: dict[str, Any] = POLICY, program: bytes | None = None, cwd: Path = ROOT
) -> list[str]:
    """Make calls under the filter; each answer is "ok" or an errno's name."""
    table = numbers()
    task = {
        "program": (compiler.program(policy) if program is None else program).hex(),
        "calls": [[table[name], *args] for name, *args in calls],
        "uid": cwd.stat().st_uid if cwd != ROOT else 65534,
        "clone": table["clone"],
    }
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return ["ok" if result != -1 else errno.errorcode[code] for result, code in found]


def with_stand_ins() -> bytes:
    """The filter with other errnos for EPERM and ENOSYS."""
    replaced = {bpf.return_value(name): 0x0005_0000 | number for name, number in STAND_IN.items()}
    code = bpf.decode(compiler.program(POLICY))
    return bpf.encode(
        [part._replace(k=replaced.get(part.k, part.k)) if part.code == bpf.RET else part for part in code]
    )


def refused_names(answer: str) -> list[str]:
    return sorted(name for name, then in POLICY["calls"].items() if then == answer and name in NUMBERS[ARCH])


@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_every_refused_call_is_answered_by_the_filter(answer: str) -> None:
    names = refused_names(answer)
    calls = [(name, 0, 0, 0, 0, 0, 0) for name in names]
    assert dict(zip(names, make_calls(calls), strict=True)) == dict.fromkeys(names, answer)
    stand_in = errno.errorcode[STAND_IN[answer]]
    answers = dict(zip(names, make_calls(calls, program=with_stand_ins()), strict=True))
    assert answers == dict.fromkeys(names, stand_in)


def check(cases: list[tuple[tuple[Any, ...], str]], **options: Any) -> None:
    """Each call has its answer, also with garbage in the upper half of its numbers (where these are ints)."""
    calls = [call for call, _ in cases]
    found = make_calls(calls, **options)
    assert list(zip(calls, found, strict=True)) == cases


def dirty(cases: list[tuple[tuple[Any, ...], str]], *positions: int) -> list[tuple[tuple[Any, ...], str]]:
    """The cases, and the same again with a dirty upper half in the arguments at `positions`."""
    return cases + [
        ((call[0], *(DIRTY | arg if at in positions else arg for at, arg in enumerate(call[1:]))), answer)
        for call, answer in cases
    ]


def test_clone_makes_processes_but_no_namespaces() -> None:
    flags = {"NEWNS": 17, "NEWCGROUP": 25, "NEWUTS": 26, "NEWIPC": 27, "NEWUSER": 28, "NEWPID": 29, "NEWNET": 30}
    cases = [(("clone", signal.SIGCHLD | 1 << bit, 0, 0, 0, 0), "EPERM") for bit in flags.values()]
    cases.append((("clone", signal.SIGCHLD, 0, 0, 0, 0), "ok"))
    check(dirty(cases, 0))


def test_clone3_is_absent_so_that_libc_falls_back() -> None:
    check([(("clone3", "n:88", 88), "ENOSYS"), (("clone3", 0, 0), "ENOSYS")])


def test_set_id_bits_cannot_be_set(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.chmod(tmp_path, 0o777)
    here = -100 & 0xFFFF_FFFF
    wanted = [(0o4755, "EPERM"), (0o2755, "EPERM"), (0o6000, "EPERM"), (0o1755, "ok"), (0o644, "ok")]
    create, tmpfile, read_write = os.O_CREAT | os.O_RDWR, os.O_TMPFILE | os.O_RDWR, os.O_RDWR
    cases: list[tuple[tuple[Any, ...], str]] = []
    for mode, answer in wanted:
        cases.append((("fchmodat", here, "b:file", mode), answer))
        cases.append((("openat", here, f"b:new-{mode}", create, mode), answer))
        cases.append((("openat", here, "b:.", tmpfile, mode), answer))
        # Nothing is created: the mode is not looked at by the kernel, and not by us.
        cases.append((("openat", here, "b:file", os.O_RDONLY, mode), "ok"))
    check(dirty(cases, 3) + dirty([((*c[:3], read_write, *c[4:]), a) for c, a in cases[3::4]], 2), cwd=tmp_path)
    modes = {path.name: path.stat().st_mode & 0o6000 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0}
    assert len(modes) == 1 + 2


@pytest.mark.skipif("chmod" not in NUMBERS.get(ARCH, {}), reason="calls of x86-64 only")
def test_older_calls_cannot_set_set_id_bits_either(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.chmod(tmp_path, 0o777)
    cases: list[tuple[tuple[Any, ...], str]] = []
    for mode, answer in ((0o4755, "EPERM"), (0o2644, "EPERM"), (0o755, "ok")):
        cases.append((("chmod", "b:file", mode), answer))
        cases.append((("creat", f"b:creat-{mode}", mode), answer))
        cases.append((("mknod", f"b:mknod-{mode}", 0o100000 | mode, 0), answer))
    cases += dirty([(("open", f"b:open-{mode}", os.O_CREAT, mode), answer) for mode, answer in ((0o4755, "EPERM"),)], 1)
    cases.append((("open", "b:open-755", os.O_CREAT, 0o755), "ok"))
    check(cases, cwd=tmp_path)
    assert {path.stat().st_mode & 0o6000 for path in tmp_path.iterdir()} == {0}


def test_fchmod_and_fchmodat2_cannot_set_set_id_bits(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.chmod(tmp_path / "file", 0o666)
    os.chmod(tmp_path, 0o777)
    here = -100 & 0xFFFF_FFFF
    check(
        dirty([(("fchmod", 0, mode), answer) for mode, answer in ((0o4755, "EPERM"), (0o2755, "EPERM"))], 1)
        + [(("fchmodat2", here, "b:file", mode, 0), "EPERM") for mode in (0o4755, 0o2755)]
        + [(("fchmodat", here, "b:file", 0o640), "ok"), (("openat2", here, "b:file", "n:24", 24), "ENOSYS")],
        cwd=tmp_path,
    )


def test_mkdir_needs_no_rule_because_the_kernel_drops_set_id_bits(tmp_path: Path) -> None:
    os.chmod(tmp_path, 0o777)
    check([(("mkdirat", -100 & 0xFFFF_FFFF, "b:folder", 0o6755), "ok")], cwd=tmp_path)
    assert (tmp_path / "folder").stat().st_mode & 0o7777 == 0o755


def test_device_nodes_cannot_be_made_fifos_can(tmp_path: Path) -> None:
    """Character device 0:0 needs no privilege (it is overlayfs' mark for "deleted"), so the filter refuses it."""
    os.chmod(tmp_path, 0o777)
    here = -100 & 0xFFFF_FFFF
    cases = [
        (("mknodat", here, "b:whiteout", 0o020600, 0), "EPERM"),
        (("mknodat", here, "b:null", 0o020666, 0x103), "EPERM"),
        (("mknodat", here, "b:disk", 0o060600, 0x800), "EPERM"),
        (("mknodat", here, "b:set-id", 0o104755, 0), "EPERM"),
    ]
    twins = [
        (("mknodat", here, "b:fifo", 0o010600, 0), "ok"),
        (("mknodat", here, "b:socket", 0o140600, 0), "ok"),
        (("mknodat", here, "b:plain", 0o600, 0), "ok"),
        (("mknodat", here, "b:plain2", 0o100600, 0), "ok"),
    ]
    check(dirty(cases, 2) + twins, cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fifo", "socket", "plain", "plain2"}


def test_terminal_injection_is_refused_ordinary_terminal_calls_work() -> None:
    cases = [(("ioctl", "tty", number, "b:x"), "EPERM") for number in policies.TERMINAL_IOCTLS.values()]
    twins = [(("ioctl", "tty", number, "n:64"), "ok") for number in (0x5401, 0x5413)]  # TCGETS, TIOCGWINSZ
    check(dirty(cases + twins, 1))


def test_prctl_cannot_touch_memory_layout_or_securebits() -> None:
    check(
        dirty(
            [
                (("prctl", 35, 1, 0, 0, 0), "EPERM"),
                (("prctl", 28, 0, 0, 0, 0), "EPERM"),
                (("prctl", 15, "b:name", 0, 0, 0), "ok"),
                (("prctl", 38, 1, 0, 0, 0), "ok"),
            ],
            0,
        )
    )


def test_personality_changes_are_absent_the_query_works() -> None:
    cases = [(("personality", value), "ENOSYS") for value in (0x0004_0000, 0x0040_0000, 0x0010_0000, 0x0002_0001)]
    twins = [(("personality", value), "ok") for value in (0xFFFF_FFFF, 0, 8, 0)]
    check(dirty(cases + twins, 0))


SOCKETS = [
    ((1, 1, 0), "ok"),
    ((1, 2 | os.O_CLOEXEC | os.O_NONBLOCK, 0), "ok"),
    ((1, 5, 0), "ok"),
    ((2, 1 | os.O_CLOEXEC, 0), "ok"),
    ((2, 1, 6), "ok"),
    ((2, 2, 17), "ok"),
    ((10, 1, 0), "ok"),
    ((16, 3, 0), "ok"),
    ((16, 2 | os.O_CLOEXEC, 0), "ok"),
    ((2, 3, 1), "EPERM"),
    ((2, 3 | os.O_CLOEXEC, 255), "EPERM"),
    ((10, 3, 58), "EPERM"),
    ((2, 10, 0x0300), "EPROTONOSUPPORT"),  # SOCK_PACKET
    ((2, 2, 1), "EPROTONOSUPPORT"),  # ICMP
    ((2, 5, 132), "EPROTONOSUPPORT"),  # SCTP
    ((2, 1, 262), "EPROTONOSUPPORT"),  # MPTCP
    *(((16, 3, protocol), "EPROTONOSUPPORT") for protocol in (2, 4, 9, 12, 15, 16, 21)),
    *(((family, 1, 0), "EAFNOSUPPORT") for family in (3, 9, 21, 29, 30, 31, 36, 39, 41, 43)),
    *(((family, 3, 0), "EAFNOSUPPORT") for family in (15, 17, 26, 44)),
    ((38, 5, 0), "EAFNOSUPPORT"),  # AF_ALG
    ((40, 1, 0), "EAFNOSUPPORT"),  # AF_VSOCK
    ((40, 2, 0), "EAFNOSUPPORT"),
]


def test_only_unix_tcp_udp_and_route_sockets_can_be_made() -> None:
    check(dirty([(("socket", *args), answer) for args, answer in SOCKETS], 0, 1, 2))


def test_only_unix_sockets_come_in_pairs() -> None:
    check(
        dirty(
            [(("socketpair", 1, kind, 0, "n:8"), "ok") for kind in (1, 2, 5)]
            + [(("socketpair", family, 1, 0, "n:8"), "ENOTSUP") for family in (2, 16, 30, 40)],
            0,
        )
    )


def test_cores_can_be_changed_unless_the_policy_pins_them() -> None:
    call = ("sched_setaffinity", 0, 128, "b:" + "\x01")
    read = ("sched_getaffinity", 0, 128, "n:128")
    check([(read, "ok"), (call, "ok")])
    check([(read, "ok"), (call, "EPERM")], policy=policies.default_policy(deny_set_affinity=True))


def test_numbers_that_nobody_knows_are_absent() -> None:
    table = numbers()
    task_numbers = [400, 500, 1000, (1 << 30) - 1]
    program = compiler.program(POLICY)
    script = CHILD.replace('task["calls"]', "[[n] for n in %r]" % task_numbers)  # noqa: UP031
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps({"program": program.hex(), "calls": [], "uid": 65534, "clone": table["clone"]}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[-1, errno.ENOSYS]] * len(task_numbers)


def test_programs_may_add_walls_of_their_own() -> None:
    """seccomp(2) and Landlock by the tool itself: only ever tighter."""
    check(
        [
            (("seccomp", 2, 0, "n:4"), "ok"),  # GET_ACTION_AVAIL, kill_thread
            (("seccomp", 1, 0, 0), "EFAULT"),  # SET_MODE_FILTER reaches the kernel
            (("prctl", 22, 2, 0, 0, 0), "EFAULT"),  # PR_SET_SECCOMP likewise
            (("landlock_create_ruleset", "n:8", 8, 0), "ENOMSG"),
        ]
    )
