"""What slow readers make the gateway keep is bounded over all flows, and given back."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from sandbox.egress import pump
from sandbox.egress.pump import SMALL_CHUNK_BYTES, Pump

BIG = 900_000


@pytest.fixture
def ends() -> Iterator[list[socket.socket]]:
    """The call, the pump's front, the pump's back, the server."""
    made = [*socket.socketpair(), *socket.socketpair()]
    for sock in made:
        sock.setblocking(False)
    made[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * BIG)
    yield made
    for sock in made:
        sock.close()


async def kept_of_a_deaf_server(ends: list[socket.socket]) -> tuple[int, int]:
    """The most that was kept of one read for a server that reads nothing, and what is kept after the flow's end."""
    call, front, back, _ = ends
    sent = call.send(b"x" * BIG)
    assert sent > 2 * SMALL_CHUNK_BYTES
    filler = back.send(b"y" * BIG)  # the server's side is full from the beginning
    assert filler < BIG
    carrier = Pump(front, back, ())
    carrier.start()
    await asyncio.sleep(0.05)
    kept = Pump._kept_bytes
    carrier.end("call_ended")
    await carrier.done
    return kept, Pump._kept_bytes


@pytest.fixture(autouse=True)
def without_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Socket pairs have no TCP_NODELAY."""
    monkeypatch.setattr(pump.Pump, "start", lambda self: self._on_readable(self.up))


def test_what_cannot_be_passed_on_is_kept_once_and_given_back(ends: list[socket.socket]) -> None:
    kept, after = asyncio.run(kept_of_a_deaf_server(ends))
    assert SMALL_CHUNK_BYTES < kept <= pump.CHUNK_BYTES
    assert after == 0


def test_reads_become_small_when_much_is_kept(ends: list[socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump, "KEPT_MAX_BYTES", 0)
    kept, after = asyncio.run(kept_of_a_deaf_server(ends))
    assert 0 < kept <= SMALL_CHUNK_BYTES
    assert after == 0
