"""Groups of ended jails are removed in their order, in a thread while calls run, and at the end at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, cast

import pytest

from sandbox.launchers import burial


class Group:
    def __init__(self, name: str, done: list[tuple[str, bool]], error: OSError | None = None) -> None:
        self.name = name
        self._done = done
        self._error = error

    def destroy(self) -> bool:
        self._done.append((self.name, threading.current_thread() is threading.main_thread()))
        if self._error is not None:
            raise self._error
        return True


def run(names: list[str], *, pauses: bool, error: OSError | None = None) -> list[tuple[str, bool]]:
    done: list[tuple[str, bool]] = []

    async def main() -> None:
        ours = burial.Burial()
        for name in names:
            ours.bury(cast(Any, Group(name, done, error)))
            if pauses:
                await asyncio.sleep(burial.PAUSE_S * 2)
        ours.close()

    asyncio.run(main())
    return done


def test_a_single_one_is_removed_at_the_end_without_a_thread() -> None:
    assert run(["one", "two"], pauses=False) == [("one", True), ("two", True)]


def test_those_of_calls_before_are_removed_in_a_thread() -> None:
    assert run(["one", "two"], pauses=True) == [("one", False), ("two", False)]


@pytest.mark.parametrize("pauses", [False, True])
def test_one_that_stays_is_told_of_and_stops_nothing(pauses: bool, capfd: pytest.CaptureFixture[str]) -> None:
    assert [name for name, _ in run(["one", "two"], pauses=pauses, error=OSError(16, "busy"))] == ["one", "two"]
    assert capfd.readouterr().err.count("was not removed: [Errno 16] busy") == 2
