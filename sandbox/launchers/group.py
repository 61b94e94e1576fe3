"""The cgroup of a container that its engine has made: read here, limited there.

Where the engine puts it below a group of ours, that group still counts when the engine has removed the container's
own; elsewhere the counters are those of the last look. Source: cgroups(7).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from sandbox._linux import cgroup, cgroup_v1, cgroup_v2


class ContainerGroup:
    """`below`: the group of ours around it, if any. `v1` and `v2` name the container's own once it is `found`."""

    def __init__(self, name: str, below: cgroup.CallGroup | None) -> None:
        self.name = name
        self.below = below
        self.v1: dict[str, str] = {}
        self.v2 = ""
        self.is_out_of_memory = False
        self._last: dict[str, float | int] = {}

    def __repr__(self) -> str:
        return f"<ContainerGroup {self.name} below={self.below} v2={self.v2 or '-'} v1={len(self.v1)}>"

    def find(self, pid: int, layout: cgroup.Layout) -> None:
        """Where the process `pid` is. Raises OSError when it has ended.

        A tree in which the engine has made it no group, so that it is at the root with everyone else, tells nothing.
        """
        for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            if path == "/":
                continue
            if not names and layout.v2 is not None:
                self.v2 = layout.v2.mount_point + path
            for controller in filter(None, names.split(",")):
                if controller in layout.v1:
                    self.v1[controller] = layout.v1[controller].mount_point + path

    def stats(self) -> dict[str, float | int]:
        """The latest counters: what the container's own group says while it is there, then what is known of it."""
        with contextlib.suppress(OSError):
            found = cgroup_v2.stats(self.v2, self.v1) if self.v2 and os.path.isdir(self.v2) else {}
            found.update(cgroup_v1.stats({name: path for name, path in self.v1.items() if os.path.isdir(path)}))
            self._last = {**self._last, **found}
        merged = dict(self._last)
        if self.below is not None:
            for name, value in self.below.stats().items():
                merged[name] = max(merged.get(name, 0), value)
        if self.is_out_of_memory:
            merged["oom_kills"] = max(1, int(merged.get("oom_kills", 0)))
        return merged

    def io_limited(self) -> set[str]:
        """The disks, as "major:minor", whose traffic is limited in the container's own group."""
        path = f"{self.v2}/io.max"
        if "blkio" in self.v1:
            path = f"{self.v1['blkio']}/blkio.throttle.write_bps_device"
        try:
            lines = Path(path).read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return set()
        return {line.split()[0] for line in lines if "wbps=max" not in line}

    def open_oom_event(self) -> int | None:
        """As of a group of ours; None where the container has no v1 memory group, or has ended."""
        try:
            return cgroup_v1.open_oom_event(self.v1["memory"]) if "memory" in self.v1 else None
        except FileNotFoundError:
            return None

    def freeze(self, timeout_s: float = 0.5) -> bool:
        return self._set_frozen(frozen=True, timeout_s=timeout_s)

    def thaw(self, timeout_s: float = 0.5) -> bool:
        return self._set_frozen(frozen=False, timeout_s=timeout_s)

    def _set_frozen(self, *, frozen: bool, timeout_s: float) -> bool:
        if self.v2 and os.path.exists(f"{self.v2}/cgroup.freeze"):
            return cgroup_v2.set_frozen(self.v2, frozen=frozen, timeout_s=timeout_s)
        if "freezer" in self.v1:
            return cgroup_v1.set_frozen(self.v1["freezer"], frozen=frozen, timeout_s=timeout_s)
        raise OSError(95, "neither a unified tree nor the freezer controller is there", self.name)


def common_path(group: cgroup.CallGroup, layout: cgroup.Layout) -> str:
    """The group's path from the root of every tree, for an engine that takes one for all; empty where they differ."""
    mount_points = {name: tree.mount_point for name, tree in layout.v1.items()}
    paths = {os.path.relpath(path, mount_points[name]) for name, path in group.v1.items() if name in mount_points}
    if group.v2 and layout.v2 is not None:
        paths.add(os.path.relpath(group.v2, layout.v2.mount_point))
    return f"/{paths.pop()}" if len(paths) == 1 else ""


def remove_everywhere(path: str, layout: cgroup.Layout) -> None:
    """Remove `path` and what is empty below it in every tree: an engine makes it also where we have made none."""
    trees = [*layout.v1.values(), *((layout.v2,) if layout.v2 is not None else ())]
    for mount_point in dict.fromkeys(tree.mount_point for tree in trees):
        top = mount_point + path
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
