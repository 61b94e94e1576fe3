"""How long a request may take to arrive."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox.egress import http_exchange
from sandbox.egress.flow import Refused
from sandbox.egress.http_exchange import Exchanges


class Dripping:
    """A client that has always one more byte of its request's head."""

    def __init__(self, head: bytes) -> None:
        self._head = head
        self.given = 0

    async def recv(self) -> bytes:
        await asyncio.sleep(0.01)
        self.given += 1
        return self._head[self.given - 1 : self.given] or b"x"

    async def send(self, data: Any) -> None:
        raise AssertionError("nobody has asked for anything")

    async def finish(self) -> None:
        return


def serve(front: Dripping, early: bytes = b"") -> None:
    flow: Any = SimpleNamespace(session=SimpleNamespace(now=str), meter=SimpleNamespace(up=0, down=0))
    exchanges = Exchanges(flow, None, front, None, None)  # type: ignore[arg-type]
    asyncio.run(exchanges.serve(early))


@pytest.mark.parametrize("early", [b"", b"GET /x HT"])
def test_a_head_that_never_ends_is_cut_however_often_it_goes_on(early: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "HEAD_TIMEOUT_S", 0.2)
    front = Dripping(b"GET /x HTTP/1.1\r\nX-Slow: "[len(early) :])
    started = time.monotonic()
    with pytest.raises(Refused) as refused:
        serve(front, early)
    assert refused.value.reason == "head_timeout"
    assert 0.15 < time.monotonic() - started < 5
    assert front.given > 1
