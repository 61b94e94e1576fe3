"""One Docker daemon per test process, with images built from this machine's own files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sandbox import Sandbox
from tests.helpers import engine as engines
from tests.helpers.docker_calls import GATES, containers, wait_for


@pytest.fixture(scope="session")
def engine() -> Iterator[engines.Engine]:
    if reason := engines.missing():
        pytest.skip(f"needs a Docker daemon: {reason}")
    with engines.running() as made:
        made.load(engines.PYTHON, engines.python_image())
        made.load(engines.NO_PYTHON, engines.plain_image())
        made.load(engines.OTHER_PYTHON, engines.other_image())
        yield made


@pytest.fixture
def docker(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Sandbox]]:
    """Makes sandboxes under the docker launcher; afterwards nothing of theirs is left in the daemon or on the host."""
    monkeypatch.setenv("DOCKER_HOST", engine.host)
    made: list[Sandbox] = []

    def make(
        image: str = engines.PYTHON, best_effort: Sequence[str] = (), runtime: str = "", **sections: Any
    ) -> Sandbox:
        isolation = {"launcher": "docker", "image": image, "runtime": runtime, "best_effort": list(best_effort)}
        manifest = {"filesystem": {"write": [":workspace"]}, **sections, "isolation": isolation}
        made.append(Sandbox(manifest, state=tmp_path))
        return made[-1]

    yield make
    for box in made:
        box.close()
    wait_for(lambda: [one["Name"] for one in containers(engine)] == [])
    assert not GATES.exists() or not any(str(path.name).startswith(str(os.getpid())) for path in GATES.iterdir())
