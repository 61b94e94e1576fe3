"""The jobs that every contender gets: as a program, or for us as a function as well."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """`argv` does the same work as `function`; `expected` is what either gives, on standard output or as its value."""

    name: str
    argv: tuple[str, ...]
    function: Callable[[], Any] | None = None
    expected: str = ""


def one() -> int:
    """As little as a function can do."""
    return 1


def numpy_sum() -> int:
    """A small operation, and the import that it takes."""
    import numpy as np

    return int(np.arange(1000).sum())


_NUMPY = "import numpy as np; print(int(np.arange(1000).sum()))"


def jobs() -> tuple[Job, ...]:
    """Those that this interpreter can do."""
    python = sys.executable
    found = [
        Job("true", ("/bin/true",)),
        Job("python", (python, "-c", "pass")),
        Job("function", (python, "-c", "print((lambda: 1)())"), one, "1"),
    ]
    if importlib.util.find_spec("numpy") is not None:
        found.append(Job("numpy", (python, "-c", _NUMPY), numpy_sum, "499500"))
    return tuple(found)
