"""docs/enforcement.md says what the planner does: every step, in its order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandbox.host import HostFacts
from sandbox.manifest import Manifest
from sandbox.planner import PathFact, Surroundings, decide
from sandbox.spec import CallSpec, Workspace

PAGE = (Path(__file__).parents[2] / "docs" / "enforcement.md").read_text()
ROWS = re.findall(r"^\| \d+ \| `(\w+)` \|", PAGE, re.MULTILINE)
# Made with the view or by the jail itself, depending on what is granted.
MOVABLE = {"scratch"}
EVERYDAY = {"best_effort": ["memory", "cpus", "io", "cpu_time", "pids"]}


def steps(facts: HostFacts, workspace: str) -> list[str]:
    filesystem: dict[str, object] = {"write": [":workspace"]}
    if workspace:
        filesystem |= {"workspace": workspace, "workspace_mode": "rw"}
    call = CallSpec(
        "program", ("true",), "true", workspace=Workspace("rw", workspace, workspace) if workspace else Workspace()
    )
    around = Surroundings(paths={workspace: PathFact(1, 1)} if workspace else {})
    plan = decide(Manifest(filesystem=filesystem, isolation=EVERYDAY), call, facts, around)
    return [step.name for step in plan.steps]


@pytest.mark.needs("jail")
@pytest.mark.parametrize("workspace", ["", "/srv/project"])
def test_the_page_lists_every_step_in_order(host_facts: HostFacts, workspace: str) -> None:
    planned = [name for name in steps(host_facts, workspace) if name not in MOVABLE]
    assert set(planned) <= set(ROWS)
    assert [name for name in ROWS if name in planned] == planned


def test_the_page_numbers_its_rows() -> None:
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \| `", PAGE, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(ROWS) == len(set(ROWS))


@pytest.mark.needs("jail")
def test_the_page_has_every_control(host_facts: HostFacts) -> None:
    from sandbox.host import controls

    for name in controls(host_facts):
        if name != "landlock":
            assert re.search(rf"^\|[^|]*\b{name}\b", PAGE, re.MULTILINE), name
