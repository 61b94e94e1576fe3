"""The journal of a changeset's commits: append-only lines, so that an interrupted commit can be finished.

`run TOKEN` starts one, `begin N` and `done N` frame each change. The token is in the names of that commit's temporary
files, so the next one finds what was left behind.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox.workspace.collect import write_all

JOURNAL = "journal"


def read_journal(directory: Path) -> tuple[frozenset[int], frozenset[int], tuple[str, ...]]:
    """Which changes commits have finished, which they have begun (by number), and the tokens of the commits."""
    numbers: dict[str, set[int]] = {"begin": set(), "done": set()}
    runs: list[str] = []
    try:
        text = (directory / JOURNAL).read_text("ascii")
    except FileNotFoundError:
        text = ""
    for line in text.split("\n")[:-1]:  # what follows the last newline is nothing, or torn
        word, _, value = line.partition(" ")
        if word in numbers and value.isdigit():
            numbers[word].add(int(value))
        elif word == "run":
            runs.append(value)
    return frozenset(numbers["done"]), frozenset(numbers["begin"]), tuple(runs)


class Journal:
    """What this and earlier commits of the changeset have begun and finished; the open file is the lock."""

    def __init__(self, fd: int, directory: Path) -> None:
        self._fd = fd
        self.done, self.begun, self._runs = read_journal(directory)
        self._run = os.urandom(8).hex()
        self._write(f"run {self._run}")

    def starts(self, number: int) -> None:
        self._write(f"begin {number}")

    def finished(self, number: int) -> None:
        self._write(f"done {number}")

    def temporary(self, number: int) -> str:
        return f".sandbox-commit-{self._run}-{number}"

    def remove_leftovers(self, number: int, parent_fd: int) -> None:
        """Unlink what an interrupted commit left beside the path. The names are random, so nobody else's match."""
        for run in self._runs if number in self.begun else ():
            try:
                os.unlink(f".sandbox-commit-{run}-{number}", dir_fd=parent_fd)
            except FileNotFoundError:
                pass  # the usual case: it was finished, or had not come that far

    def _write(self, line: str) -> None:
        # A torn last line of an interrupted commit must not swallow this one.
        write_all(self._fd, f"\n{line}\n".encode() if line.startswith("run") else f"{line}\n".encode())
