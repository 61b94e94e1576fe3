"""One Docker daemon per test process, with images built from this machine's own files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import engine as engines


@pytest.fixture(scope="session")
def engine() -> Iterator[engines.Engine]:
    if reason := engines.missing():
        pytest.skip(f"needs a Docker daemon: {reason}")
    with engines.running() as made:
        made.load(engines.PYTHON, engines.python_image())
        made.load(engines.NO_PYTHON, engines.plain_image())
        made.load(engines.OTHER_PYTHON, engines.other_image())
        yield made
