"""What a copy-on-write workspace asks of the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox import planner_workspace
from sandbox.host import Feature
from sandbox.spec import CallSpec, Workspace, WorkspaceMode
from tests.unit.test_host_table import FULL, ORDINARY

WITHOUT_OVERLAY = Feature(False, "mount overlay: Operation not permitted")
WITHOUT_ATTRIBUTES = Feature(False, "user.* attributes on tmpfs: Operation not supported")


def call(mode: WorkspaceMode) -> CallSpec:
    return CallSpec("program", ("true",), "true", workspace=Workspace(mode, "/srv/project", "/srv/project"))


def test_a_cow_workspace_is_refused_where_overlays_do_not_work() -> None:
    facts = replace(ORDINARY, overlay_in_userns=WITHOUT_OVERLAY)
    assert "Operation not permitted" in planner_workspace.refusal(call("cow"), facts)
    assert planner_workspace.refusal(call("cow"), ORDINARY) == ""
    assert planner_workspace.refusal(call("rw"), facts) == ""
    # Root mounts before it enters a user namespace.
    assert planner_workspace.refusal(call("cow"), replace(FULL, overlay_in_userns=WITHOUT_OVERLAY)) == ""


@pytest.mark.parametrize("mode", ["rw", "ro", "private"])
def test_only_cow_calls_are_told_of_a_kernel_that_cannot_hide_directories(mode: WorkspaceMode) -> None:
    facts = replace(ORDINARY, tmpfs_attributes=WITHOUT_ATTRIBUTES)
    assert "Linux 6.6" in planner_workspace.notes(call("cow"), facts)[0]
    assert planner_workspace.notes(call(mode), facts) == ()
    assert planner_workspace.notes(call("cow"), ORDINARY) == ()
    assert planner_workspace.notes(call("cow"), replace(FULL, tmpfs_attributes=WITHOUT_ATTRIBUTES)) == ()
