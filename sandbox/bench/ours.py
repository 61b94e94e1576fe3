"""This project as contenders: the ways in which a call can be started."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sandbox.bench.contenders import Contender, run_checked
from sandbox.bench.jobs import Job
from sandbox.runtime import Sandbox

PROFILE = "python"
READY_S = 30.0


class Boxes:
    """The runtimes that stay up while others are measured, as they would in a service."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.warm = Sandbox(PROFILE, state=state)
        self.cold = Sandbox(PROFILE, state=state, warm=False)
        self.egress = Sandbox(PROFILE, state=state, allow_hosts=["example.org:443"])

    def warm_up(self, jobs: tuple[Job, ...]) -> None:
        """Until templates serve what is going to be asked for."""
        for job in jobs:
            ways = [lambda job=job: self.warm.run(list(job.argv))]
            if job.function is not None:
                ways.append(lambda job=job: self.warm.call(job.function))
            for way in ways:
                wait_warm(way)

    def close(self) -> None:
        for box in (self.warm, self.cold, self.egress):
            box.close()


def wait_warm(call: Any) -> None:
    """Call until a template serves this kind. Raises RuntimeError when none does."""
    deadline = time.monotonic() + READY_S
    while "template" not in (done := call()).record.isolation.applied:
        if time.monotonic() > deadline:
            raise RuntimeError(f"no template serves this: {done!r}")
        time.sleep(0.05)


def program(box: Sandbox, job: Job) -> None:
    done = box.run(list(job.argv))
    if not done.ok or done.text.strip() != job.expected:
        raise RuntimeError(f"{done!r}: {done.stderr[-300:]!r}")


def function(box: Sandbox, job: Job) -> None:
    assert job.function is not None
    value = box.call(job.function).unwrap()
    if str(value) != job.expected:
        raise RuntimeError(f"{value!r} instead of {job.expected}")


def contenders(boxes: Boxes) -> list[Contender]:
    """Each call is to a runtime that has been idle for the turns of all others: standbys are parked."""
    functions = ("function", "numpy")
    programs = ("true", "python")
    return [
        Contender(
            "standby function", "a parked jail is taken", lambda job: function(boxes.warm, job), functions, ours=True
        ),
        Contender(
            "warm program", "a parked jail is taken, exec in it", lambda job: program(boxes.warm, job), programs, True
        ),
        Contender(
            "cold program", "the jail is built for this call", lambda job: program(boxes.cold, job), programs, True
        ),
        Contender(
            "cold function", "built, with a fresh interpreter", lambda job: function(boxes.cold, job), functions, True
        ),
        Contender(
            "program with egress",
            "as the warm program, with a gateway that allows one host",
            lambda job: program(boxes.egress, job),
            ("true",),
            True,
        ),
        Contender("new runtime", "a supervisor is started and ended for one call", _new_runtime, ("true",), True),
        Contender("command line", "the whole process `sandbox run -p shell -- ...`", _command, programs, True),
    ]


def _new_runtime(job: Job) -> None:
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as place, Sandbox(PROFILE, state=place) as box:
        program(box, job)


def _command(job: Job) -> None:
    script = shutil.which("sandbox", path=f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}")
    start = [script] if script else [sys.executable, "-m", "sandbox.cli.main"]
    run_checked([*start, "run", "-p", "shell", "--", *job.argv], job)
