"""The supervisor's event loop watches descriptors as asyncio's own does, whatever happens to them meanwhile."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sandbox.supervisor.loop import Loop


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    made = [os.pipe() for _ in range(2)]
    yield made
    for end in (end for pair in made for end in pair):
        try:
            os.close(end)
        except OSError:
            pass  # the test closed it


def _run(work: Callable[[Loop], None], turns: int = 3) -> list[dict[str, Any]]:
    """Have `work` on the loop, then let that turn some times; what its exception handler was told."""
    told: list[dict[str, Any]] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, Loop)
        loop.set_exception_handler(lambda _loop, context: told.append(context))
        work(loop)
        for _ in range(turns):
            await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main())
    return told


def test_a_reader_is_called_as_long_as_there_is_something_to_read(pipes: list[tuple[int, int]]) -> None:
    (read_end, write_end), _ = pipes
    seen: list[bytes] = []
    os.write(write_end, b"ab")

    _run(lambda loop: loop.add_reader(read_end, lambda size: seen.append(os.read(read_end, size)), 1))

    assert seen == [b"a", b"b"]


def test_the_end_of_a_pipe_is_readable(pipes: list[tuple[int, int]]) -> None:
    (read_end, write_end), _ = pipes
    seen: list[bytes] = []
    os.close(write_end)

    _run(lambda loop: loop.add_reader(read_end, lambda: seen.append(os.read(read_end, 1))))

    assert set(seen) == {b""}


def test_a_removed_reader_is_not_called_though_it_was_due(pipes: list[tuple[int, int]]) -> None:
    seen: list[int] = []

    def work(loop: Loop) -> None:
        def first_come(number: int) -> None:
            seen.append(number)
            assert all(loop.remove_reader(read_end) for read_end, _ in pipes)

        for number, (read_end, write_end) in enumerate(pipes):
            os.write(write_end, b"x")
            loop.add_reader(read_end, first_come, number)

    _run(work)

    assert len(seen) == 1


def test_a_number_that_was_given_anew_is_not_taken_for_what_it_was(pipes: list[tuple[int, int]]) -> None:
    seen: list[str] = []
    ends = [read_end for read_end, _ in pipes]

    def work(loop: Loop) -> None:
        def first_come(own: int) -> None:
            seen.append("due")
            other = next(end for end in ends if end != own)
            loop.remove_reader(own)
            loop.remove_reader(other)
            os.close(other)
            # Nothing to read in it, under the number of what was due.
            made = os.pipe()
            pipes.append(made)
            fresh = made[0]
            assert fresh == other
            loop.add_reader(fresh, seen.append, "fresh")

        for read_end, write_end in pipes:
            os.write(write_end, b"x")
            loop.add_reader(read_end, first_come, read_end)

    _run(work)

    assert seen == ["due"]


def test_a_number_that_was_closed_while_it_was_watched_can_be_watched_anew(pipes: list[tuple[int, int]]) -> None:
    (read_end, _), (other_end, other_write) = pipes
    seen: list[bytes] = []

    def work(loop: Loop) -> None:
        loop.add_reader(read_end, lambda: seen.append(b"wrong"))
        os.close(read_end)
        os.dup2(other_end, read_end)
        os.write(other_write, b"x")
        loop.add_reader(read_end, lambda: seen.append(os.read(read_end, 1)))

    _run(work)

    assert seen == [b"x"]


def test_a_reader_that_fails_is_told_and_the_others_get_their_turn(pipes: list[tuple[int, int]]) -> None:
    seen: list[int] = []
    for _, write_end in pipes:
        os.write(write_end, b"x")

    def fail() -> None:
        raise ValueError("not ours")

    def work(loop: Loop) -> None:
        loop.add_reader(pipes[0][0], fail)
        loop.add_reader(pipes[1][0], seen.append, 1)

    told = _run(work)

    assert seen
    assert {str(context["exception"]) for context in told} == {"not ours"}


def test_removing_what_is_not_watched_or_closed_already_says_so(pipes: list[tuple[int, int]]) -> None:
    (read_end, _), (other, _) = pipes
    answers: list[bool] = []

    def work(loop: Loop) -> None:
        answers.append(loop.remove_reader(read_end))
        loop.add_reader(other, answers.clear)
        os.close(other)
        answers.append(loop.remove_reader(other))

    _run(work)

    assert answers == [False, True]
