"""Reaching the host's SysV objects and POSIX queues, and giving the terminal keystrokes."""

from __future__ import annotations

import ctypes
import os
import secrets
from collections.abc import Iterator

import pytest

from sandbox.seccomp import policy as policies
from sandbox.seccomp.numbers import NUMBERS
from tests.helpers.escape import Errno, Jail

pytestmark = [pytest.mark.needs("jail", "seccomp")]

NR = NUMBERS.get(os.uname().machine, {})
IPC_CREAT, IPC_RMID = 0o1000, 0
DIRTY = 0xDEAD_BEEF << 32
TIOCGWINSZ = 0x5413


def system_call(name: str, *args: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    result = int(libc.syscall(ctypes.c_long(NR[name]), *map(ctypes.c_ulong, args)))
    if result == -1:
        raise OSError(ctypes.get_errno(), name)
    return result


@pytest.fixture
def key() -> int:
    return secrets.randbits(30) + 1


@pytest.fixture
def host_object(request: pytest.FixtureRequest, key: int) -> Iterator[str]:
    """A SysV object of the host's, open to everyone."""
    kind: str = request.param
    make = {"shm": (key, 4096, IPC_CREAT | 0o666), "msg": (key, IPC_CREAT | 0o666), "sem": (key, 1, IPC_CREAT | 0o666)}
    number = system_call(f"{kind}get", *make[kind])
    try:
        yield kind
    finally:
        arguments = (number, 0, IPC_RMID) if kind == "sem" else (number, IPC_RMID, 0)
        system_call(f"{kind}ctl", *arguments)


@pytest.mark.parametrize("host_object", ["shm", "msg", "sem"], indirect=True)
def test_sysv_objects_of_the_host_do_not_exist(jail: Jail, host_object: str, key: int) -> None:
    arguments = {"shm": (key, 4096, 0), "msg": (key, 0), "sem": (key, 1, 0)}[host_object]
    create = {
        "shm": (key, 4096, IPC_CREAT | 0o600),
        "msg": (key, IPC_CREAT | 0o600),
        "sem": (key, 1, IPC_CREAT | 0o600),
    }
    number = NR[f"{host_object}get"]
    found = jail.act(["syscall", number, *arguments], ["syscall", number, *create[host_object]])
    assert found[0] == Errno("ENOENT")
    assert not isinstance(found[1], Errno)


def test_posix_queues_of_the_host_do_not_exist(jail: Jail) -> None:
    libc = ctypes.CDLL("librt.so.1", use_errno=True)
    name = f"/sandbox-test-{secrets.token_hex(6)}"
    queue = libc.mq_open(name.encode(), os.O_CREAT | os.O_RDWR, 0o666, None)
    if queue < 0:
        pytest.skip(f"no POSIX queues here: {os.strerror(ctypes.get_errno())}")
    try:
        # The system call wants the name without its slash.
        opened, made = jail.act(
            ["syscall", NR["mq_open"], name[1:], os.O_RDWR, 0, 0],
            ["syscall", NR["mq_open"], name[1:], os.O_RDWR | os.O_CREAT, 0o600, 0],
        )
    finally:
        libc.mq_unlink(name.encode())
        os.close(queue)
    assert opened == Errno("ENOENT")
    assert not isinstance(made, Errno)


@pytest.mark.parametrize("name", policies.TERMINAL_IOCTLS)
@pytest.mark.parametrize("dirty", [0, DIRTY], ids=["clean", "dirty"])
def test_a_terminal_takes_no_injected_input(jail: Jail, name: str, dirty: int) -> None:
    """Also with bits above the 32 that the kernel looks at (CVE-2019-10063)."""
    request = policies.TERMINAL_IOCTLS[name] | dirty
    found = jail.act(["terminal_ioctl", request, "x"], ["terminal_ioctl", TIOCGWINSZ | dirty, ""])
    assert found == [Errno("EPERM"), 0]


def test_shared_memory_files_are_each_jails_own(jail: Jail) -> None:
    found = jail.act(["create", "/dev/shm/sandbox-test"], ["exists", "/dev/shm/sandbox-test"])
    assert found == [1, True]
    assert jail.one("exists", "/dev/shm/sandbox-test") is False
    assert not os.path.exists("/dev/shm/sandbox-test")
