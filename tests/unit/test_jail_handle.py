"""The supervisor's handle of a jail: what may be given to a call."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping

import pytest

from sandbox._linux import wire
from sandbox.launchers.jail import Jail

SEALED = {"ev": "sealed", "steps": ["seccomp"], "notes": [], "fds": []}


async def _made() -> tuple[Jail, socket.socket]:
    """A jail, and the other end of its channel."""
    ends: list[int] = []

    def launch(_message: Mapping[str, object], fds: Mapping[str, int]) -> None:
        ends.append(os.dup(fds["status"]))

    jail = Jail("jail-0", None, None)
    jail.launch_with(launch, {}, {})
    return jail, socket.socket(fileno=ends[0])


@pytest.mark.parametrize(
    ("said", "closes", "usable"),
    [
        ([], False, True),
        ([SEALED], False, True),
        ([], True, False),
        ([SEALED], True, False),
        ([SEALED, {"ev": "gone", "wait_status": 9}], False, False),
        ([{"ev": "step_failed", "step": "proc", "errno": 1, "message": "", "bug": False}], False, False),
    ],
)
def test_a_jail_is_usable_until_word_of_its_end_has_come_even_unread(
    said: list[dict[str, object]], closes: bool, usable: bool
) -> None:
    async def look() -> bool:
        jail, inside = await _made()
        # All of it before the loop gets to read any.
        for message in said:
            wire.send(inside, message)
        if closes:
            inside.close()
        try:
            return jail.is_usable()
        finally:
            jail.close()
            inside.close()

    assert asyncio.run(look()) is usable
