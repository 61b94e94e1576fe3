"""One sandbox for all attacks, and things of the host's that no jail should get at."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox import Sandbox
from tests.helpers.escape import BOUNDS, Jail

Compile = Callable[[str], Path]


@pytest.fixture(scope="session")
def jail(state_root: Path) -> Iterator[Jail]:
    """The everyday profile for programs, bounded."""
    with Sandbox("shell", state=state_root, **BOUNDS) as box:
        yield Jail(box)


@dataclass(frozen=True)
class Secret:
    path: Path
    text: str

    @property
    def directory(self) -> Path:
        return self.path.parent


@pytest.fixture
def secret(tmp_path: Path) -> Secret:
    """A file that everyone on the host may read, which no manifest names."""
    directory = tmp_path / "host"
    directory.mkdir()
    path = directory / "secret"
    text = f"secret-{secrets.token_hex(8)}"
    path.write_text(text)
    return Secret(path, text)
