"""Runs probes inside jails and says what the kernel answered them: `ok(value)` or the name of an errno."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sandbox import Outcome, Sandbox

PROBES = Path(__file__).parent / "probes"
# Emulated machines take many times as long for everything.
TIME_FACTOR = float(os.environ.get("SANDBOX_TIME_FACTOR", "1"))
# A wall that does not hold must not hurt the machine that tests it.
BOUNDS: dict[str, Any] = {"memory": "256MiB", "pids": 64, "disk": "32MiB", "output": "4MiB"}
BOUNDS["wall_time"] = f"{20 * TIME_FACTOR}s"


def source(name: str) -> str:
    return (PROBES / f"{name}.py").read_text()


class Jail:
    """One profile; each call gets a jail of its own."""

    def __init__(self, box: Sandbox) -> None:
        self.box = box

    def run(self, argv: list[str], **overrides: Any) -> Outcome:
        return self.box.run(argv, **overrides)

    def probe(self, name: str, *args: str, **overrides: Any) -> Any:
        """The JSON line of one of our probe programs, which must have ended well.

        Handed in as text, so that a jail without any grant, as most are, can be probed.
        """
        outcome = self.run(["python3", "-S", "-c", source(name), *args], **overrides)
        assert outcome.ok, (outcome, outcome.stderr.decode("utf-8", "replace"))
        return json.loads(outcome.stdout)

    def act(self, *actions: list[Any], **overrides: Any) -> list[Any]:
        """What each action gave: its value, or the name of the errno with which it was refused, as `Errno`."""
        results = self.probe("act", json.dumps(actions), **overrides)
        return [Errno(result["errno"]) if "errno" in result else result["ok"] for result in results]

    def one(self, *action: Any, **overrides: Any) -> Any:
        """`act` for a single action."""
        return self.act(list(action), **overrides)[0]


class Errno(str):
    """A refusal; a value that a probe read can never be equal to it by accident."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Errno) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return str.__hash__(self)

    def __repr__(self) -> str:
        return f"Errno({str.__str__(self)})"
