"""Which groups are a container's own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox._linux.cgroup_layout import Layout
from sandbox.launchers.group import ContainerGroup


@pytest.mark.parametrize(("v2", "found"), [("/", ""), ("/made/x", "/cg/unified/made/x")])
def test_the_root_that_everyone_is_in_is_no_containers_group(
    v2: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup").write_text(f"9:memory:/made/x\n2:cpuacct:/\n0::{v2}\n")
    monkeypatch.setattr("sandbox.launchers.group.Path", lambda _path: tmp_path / "cgroup")
    trees: Any = {name: SimpleNamespace(mount_point=f"/cg/{name}") for name in ("memory", "cpuacct", "unified")}
    group = ContainerGroup("one", None)
    group.find(1, Layout(trees, trees["unified"], None))
    assert group.v1 == {"memory": "/cg/memory/made/x"}
    assert group.v2 == found
