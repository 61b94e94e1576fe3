"""Dialling: the first address that answers wins, a dead one delays little, and nothing stays open behind."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator

import pytest

from sandbox.egress import dial as dialling
from sandbox.egress.addresses import Address, parse_address
from sandbox.egress.dial import dial

LOCAL = parse_address("127.0.0.1")
OTHER = parse_address("127.0.0.2")


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def unanswering() -> Iterator[tuple[Address, int]]:
    """A listener whose backlog is full: a connect to it is neither accepted nor refused."""
    server = socket.create_server(("127.0.0.3", 0), backlog=0)
    where = server.getsockname()
    filling = []
    for _ in range(3):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(where)
        filling.append(sock)
    time.sleep(0.05)
    yield parse_address(where[0]), where[1]
    for sock in (*filling, server):
        sock.close()


def run(addresses: list[Address], port: int) -> tuple[Address, float, int]:
    """(which answered, after how long, descriptors left open)"""

    async def main() -> tuple[Address, float, int]:
        before, started = len(os.listdir("/proc/self/fd")), time.monotonic()
        sock, address = await dial(addresses, port)
        took = time.monotonic() - started
        assert sock.getpeername()[0] == str(address)
        sock.close()
        return address, took, len(os.listdir("/proc/self/fd")) - before

    return asyncio.run(main())


def test_the_first_address_that_answers_is_used(port: int) -> None:
    assert run([LOCAL], port)[0] == LOCAL
    assert run([LOCAL, OTHER], port)[0] == LOCAL


def test_a_refusal_passes_on_to_the_next_at_once(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialling, "NEXT_AFTER_S", 30)
    address, took, left = run([OTHER, LOCAL], port)
    assert (address, left) == (LOCAL, 0)
    assert took < dialling.NEXT_AFTER_S


def test_an_address_that_does_not_answer_delays_by_a_moment_only(unanswering: tuple[Address, int]) -> None:
    dead, port = unanswering
    with socket.create_server(("127.0.0.1", port)):
        address, took, left = run([dead, LOCAL], port)
    assert (address, left) == (LOCAL, 0)
    assert took < 5


def test_when_all_refuse_the_last_refusal_is_told(port: int) -> None:
    for addresses in ([OTHER], [OTHER, parse_address("127.0.0.4")]):
        with pytest.raises(ConnectionRefusedError):
            run(addresses, port)


def test_giving_up_in_the_midst_leaves_nothing_open(unanswering: tuple[Address, int]) -> None:
    dead, port = unanswering

    async def main() -> int:
        before = len(os.listdir("/proc/self/fd"))
        task = asyncio.get_running_loop().create_task(dial([dead, dead], port))
        await asyncio.sleep(dialling.NEXT_AFTER_S + 0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(os.listdir("/proc/self/fd")) - before

    assert asyncio.run(main()) == 0
