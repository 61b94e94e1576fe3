"""Scenes of network tests: a manifest and what the probe inside does, played in one world, told as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.net_servers import Outside
from tests.helpers.net_world import run_in_world

PROBE = (Path(__file__).parent / "net_probe.py").read_text()


def do(what: str, **arguments: Any) -> dict[str, Any]:
    """One action of the probe's."""
    return {"do": what, **arguments}


@dataclass(frozen=True)
class Scene:
    """One call: what its manifest allows, what the probe tries."""

    allow: Sequence[str]
    actions: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Seen:
    """What came of one scene."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.results: list[dict[str, Any]] = data["results"]
        self.stderr: str = data["stderr"]
        self.ending: dict[str, Any] = data["ending"]
        self.denials: list[str] = data["denials"]
        self.network: list[dict[str, Any]] | None = data["network"]
        self.usage: dict[str, Any] = data["usage"]
        self.notes: list[str] = data["notes"]
        self.reached: list[list[str]] = data["reached"]

    @property
    def result(self) -> dict[str, Any]:
        """The first action's result."""
        return self.results[0]

    def attempts(self, **wanted: Any) -> list[dict[str, Any]]:
        """The record's attempts with these fields."""
        found = self.network or []
        return [item for item in found if all(item.get(name) == value for name, value in wanted.items())]

    def one(self, **wanted: Any) -> dict[str, Any]:
        found = self.attempts(**wanted)
        assert len(found) == 1, (wanted, self.network)
        return found[0]


def play(
    scenes: Mapping[str, Scene],
    hosts: Mapping[str, str],
    furnish: Callable[[Outside], None],
) -> tuple[dict[str, Seen], list[str]]:
    """Play every scene in one world; returns what was seen of each, and the names that a resolver outside was asked."""

    def body() -> Any:
        from sandbox import Sandbox

        outside = Outside()
        furnish(outside)
        told = {}
        with Sandbox("python", wall_time="60s") as box:
            for name, scene in scenes.items():
                told[name] = _tell(box, scene, outside)
        return {"scenes": told, "queries": outside.queries}

    answer = run_in_world(body, hosts)
    return {name: Seen(data) for name, data in answer["scenes"].items()}, answer["queries"]


def _tell(box: Any, scene: Scene, outside: Outside) -> dict[str, Any]:
    outcome = box.run(
        ["python3", "-c", PROBE, json.dumps(list(scene.actions))],
        allow_hosts=list(scene.allow),
        **scene.settings,
    )
    record = outcome.record.to_json()
    return {
        "results": json.loads(outcome.stdout) if outcome.stdout else [],
        "stderr": outcome.stderr.decode("utf-8", "replace"),
        "ending": outcome.ending.to_json(),
        "denials": list(outcome.denials),
        "network": record["network"],
        "usage": record["usage"],
        "notes": list(record["isolation"]["notes"]),
        "reached": [[item.label, item.first.decode("latin-1")] for item in outside.take_reached()],
    }
