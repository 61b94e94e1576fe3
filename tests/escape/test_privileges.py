"""Gaining privileges: capabilities, set-id programs, refused calls, namespaces, other processes, foreign ABIs."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import NUMBERS
from tests.helpers.escape import Errno, Jail

pytestmark = [pytest.mark.needs("jail", "seccomp")]

NR = NUMBERS.get(os.uname().machine, {})
REFUSED = [name for _, names in policies.REFUSED.values() for name in names.split() if name in NR]
ABSENT = [name for name in policies.ABSENT.split() if name in NR]
EPERM, ENOSYS = Errno("EPERM"), Errno("ENOSYS")
DIRTY = 0xDEAD_BEEF << 32
NEWUSER, NEWNS, NEWNET, NEWPID = 0x10000000, 0x00020000, 0x40000000, 0x20000000
SIGCHLD = 17


@pytest.fixture(scope="session")
def answers(jail: Jail) -> dict[str, object]:
    """What each refused or absent call answers in a real jail: all in one, since none of them does anything."""
    names = [*REFUSED, *ABSENT]
    found = jail.act(*(["syscall", NR[name], 0, 0, 0, 0, 0, 0] for name in names))
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_call_that_reaches_past_the_walls_is_refused(answers: dict[str, object], name: str) -> None:
    assert answers[name] == EPERM


@pytest.mark.parametrize("name", ABSENT)
def test_a_call_that_cannot_be_judged_is_absent(answers: dict[str, object], name: str) -> None:
    assert answers[name] == ENOSYS


def test_permitted_calls_work(jail: Jail) -> None:
    found = jail.act(["syscall", NR["getpid"]], ["syscall", NR["eventfd2"], 0, 0], ["syscall", NR["umask"], 0o22])
    assert all(isinstance(value, int) and value >= 0 for value in found)


def test_no_capabilities_no_new_privileges_and_a_filter(jail: Jail) -> None:
    found = jail.one("status")
    assert {found[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    assert int(found["Seccomp_filters"]) >= 1


@pytest.mark.parametrize("flags", [NEWUSER, NEWUSER | NEWNS, NEWNET, NEWPID, NEWUSER | DIRTY], ids=hex)
def test_clone_makes_no_namespace(jail: Jail, flags: int) -> None:
    refused, plain = jail.act(
        ["syscall", NR["clone"], flags | SIGCHLD, 0, 0, 0, 0], ["run", ["/bin/sh", "-c", "echo forked"]]
    )
    assert (refused, plain) == (EPERM, [0, "forked\n"])


@pytest.mark.parametrize("kind", ["user", "mnt", "net", "pid", "ipc", "uts", "cgroup"])
def test_own_namespaces_are_not_the_hosts(jail: Jail, kind: str) -> None:
    assert jail.one("readlink", f"/proc/self/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_a_second_wall_stands_behind_the_filter(jail: Jail) -> None:
    """Were the filter broken, the kernel itself would allow no user namespace below the jail's own."""
    limits = [["read", f"/proc/sys/user/{name}"] for name in ("max_user_namespaces", "max_inotify_instances")]
    assert jail.act(*limits, ["write", "/proc/sys/user/max_user_namespaces", "9"]) == ["0\n", "64\n", Errno("EACCES")]


def test_unshare_as_a_program_fails(jail: Jail) -> None:
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed")
    outcome = jail.run(["unshare", "-Ur", "id", "-u"])
    assert (outcome.exit_code, b"Operation not permitted" in outcome.stderr, outcome.stdout) == (1, True, b"")


@pytest.fixture
def set_id_program(tmp_path: Path) -> Path:
    """`id` with set-uid and set-gid, owned by whoever runs the tests: root's is the real thing."""
    program = tmp_path / "bin" / "id"
    program.parent.mkdir()
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o6755)
    return program


@pytest.mark.parametrize("access", ["read", "write"])
def test_a_set_uid_program_of_the_hosts_gives_no_ids(jail: Jail, set_id_program: Path, access: str) -> None:
    outcome = jail.run([str(set_id_program)], **{access: [str(set_id_program.parent)]})
    assert outcome.exit_code == 0
    assert outcome.text.startswith("uid=1000(user) gid=1000(user)")
    assert "euid" not in outcome.text
    assert "egid" not in outcome.text


def test_set_uid_programs_of_the_system_give_no_ids(jail: Jail) -> None:
    program = next((path for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount") if os.path.exists(path)), "")
    if not program:
        pytest.skip("no set-uid program here")
    outcome = jail.run([program, "root"], input=b"\n")
    assert outcome.exit_code not in (0, 126, 127)
    assert jail.run(["id", "-u"]).text == "1000\n"


@pytest.mark.parametrize("mode", [0o4755, 0o2755, 0o6755, 0o4755 | DIRTY], ids=oct)
@pytest.mark.parametrize("call", ["chmod", "fchmodat", "creat", "open", "openat", "mknod"])
def test_set_id_bits_cannot_be_made(jail: Jail, tmp_path: Path, call: str, mode: int) -> None:
    """In a directory of the host they would be root's (idmapped) or the caller's, for anyone on the host to run.

    Refused by the filter, at once: a sweep after the call would come too late when the supervisor is killed first.
    """
    if call not in NR:
        pytest.skip(f"no {call} on this machine")
    create = os.O_CREAT | os.O_WRONLY
    arguments = {
        "chmod": lambda path, bits: (path, bits),
        "fchmodat": lambda path, bits: (-100, path, bits),
        "creat": lambda path, bits: (path, bits),
        "open": lambda path, bits: (path, create, bits),
        "openat": lambda path, bits: (-100, path, create, bits),
        "mknod": lambda path, bits: (path, 0o100000 | bits, 0),
    }[call]
    existing = call in ("chmod", "fchmodat")
    for name in ("set", "plain") if existing else ():
        (tmp_path / name).write_text("x")
    found = jail.act(
        ["syscall", NR[call], *arguments(f"{tmp_path}/set", mode)],
        ["syscall", NR[call], *arguments(f"{tmp_path}/plain", 0o755)],
        write=[str(tmp_path)],
    )
    assert found[0] == EPERM
    assert not isinstance(found[1], Errno)
    assert existing == (tmp_path / "set").exists()
    assert not any(path.stat().st_mode & 0o6000 for path in tmp_path.iterdir())


def test_file_capabilities_cannot_be_set(jail: Jail, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    # VFS_CAP_REVISION_2 with CAP_SYS_ADMIN, effective
    vector = "\x01\x00\x00\x02\x00\x00\x20\x00" + "\0" * 12
    found = jail.act(
        ["setxattr", f"{tmp_path}/file", "security.capability", vector],
        ["setxattr", f"{tmp_path}/file", "user.note", "x"],
        write=[str(tmp_path)],
    )
    assert found == [EPERM, True]


def test_pid_1_cannot_be_traced_or_signalled_to_death(jail: Jail) -> None:
    found = jail.act(
        ["syscall", NR["ptrace"], 16, 1, 0, 0],
        ["syscall", NR["process_vm_readv"], 1, 0, 0, 0, 0, 0],
        ["syscall", NR["kcmp"], 1, 1, 0, 0, 0],
        ["send_signal", 1, int(signal.SIGKILL)],
        ["send_signal", 1, int(signal.SIGSTOP)],
        ["identity"],
    )
    assert found[:3] == [EPERM] * 3
    assert found[5]["uid"] == [1000] * 3


def test_descriptors_of_pid_1_cannot_be_fetched(jail: Jail) -> None:
    """Among them would be the status channel to the supervisor."""
    script = f"""
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(1)
found = []
for fd in range(3, 40):
    result = libc.syscall({NR["pidfd_getfd"]}, pidfd, fd, 0)
    found.append(errno.errorcode[ctypes.get_errno()] if result < 0 else "fetched")
print(json.dumps(sorted(set(found))))
"""
    outcome = jail.run(["python3", "-S", "-c", script])
    assert outcome.text == '["EPERM"]\n', outcome.stderr


def test_processes_of_the_host_do_not_exist(jail: Jail) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        found = jail.act(
            ["send_signal", victim.pid, 9],
            ["send_signal", os.getpid(), 0],
            ["syscall", NR["pidfd_open"], victim.pid, 0],
        )
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    # A number that happens to be taken inside as well would be one of the jail's own.
    assert found[0] == Errno("ESRCH")
    assert found[2] in (Errno("ESRCH"), Errno("EINVAL"))


def test_everyone_is_only_everyone_inside(jail: Jail) -> None:
    victim = subprocess.Popen(["sleep", "60"])
    try:
        outcome = jail.run(["sh", "-c", "sleep 15 & trap : TERM; kill -TERM -1; wait $!; echo done"])
        assert outcome.text == "done\n"
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@functools.cache
def compiled(directory: Path, text: str, *options: str) -> Path:
    source = directory / "probe.c"
    source.write_text(text)
    subprocess.run(["gcc", "-O1", *options, "-o", directory / "probe", source], check=True, timeout=60)
    return directory / "probe"


FOREIGN = r"""
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include <sys/syscall.h>
int main(int argc, char **argv) {
    long result = -1;
    if (argc > 1 && !strcmp(argv[1], "native")) {
        result = syscall(SYS_getpid);
    } else if (argc > 1 && !strcmp(argv[1], "i386")) {
        /* keyctl (288) by its 32-bit number: round any filter that lists 64-bit numbers only */
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(288L), "b"(0L), "c"(-3L), "d"(0L) : "memory", "cc");
    } else if (argc > 1 && !strcmp(argv[1], "x32")) {
        result = syscall(0x40000000L | 39);
    } else if (argc > 1 && !strcmp(argv[1], "x32-execve")) {
        char *none[] = {0};
        result = syscall(0x40000000L | 520, "/bin/true", none, none);
    }
    printf("%d\n", result > 0);
    return 0;
}
"""


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("foreign"), FOREIGN, "-static")


@pytest.mark.needs("gcc", "x86_64")
@pytest.mark.parametrize("abi", ["i386", "x32", "x32-execve"])
def test_calls_of_a_foreign_abi_kill_the_process(jail: Jail, foreign: Path, abi: str) -> None:
    granted = [str(foreign.parent)]
    outcome = jail.run([str(foreign), abi], read=granted)
    assert outcome.ending.signal == signal.SIGSYS
    assert outcome.record.ending.signal == signal.SIGSYS
    assert (outcome.ending.kind, outcome.ending.fault, outcome.stdout) == ("tool_error", "tool", b"")
    assert jail.run([str(foreign), "native"], read=granted).text == "1\n"
