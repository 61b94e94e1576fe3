"""The supervisor's cgroups: one parent per supervisor, one group per call in every tree in use.

A control is limited where the host has its controller: in the unified tree (v2), in a v1 tree, or, in a hybrid
layout, in both kinds at once. Birth, kill and freeze use the unified tree whenever there is one.
Names: `toolcall-sandbox-<pid>-<starttime>` belongs to the process with that pid and start time, which holds a lock on
the directory while it lives; `reap` removes those whose owner is gone.
Not defended against: another process of the same user that writes into our groups.
Source: cgroups(7), flock(2).
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time

from sandbox._linux import cgroup_v1, cgroup_v2
from sandbox._linux.cgroup_files import (
    child_groups,
    groups_below,
    make_group,
    read_pids,
    read_text,
    remove_group,
    remove_groups,
    write_value,
)
from sandbox._linux.cgroup_layout import CONTROLS, V1_NAMES, Hierarchy, Home, Layout, detect

__all__ = [
    "CONTROLS",
    "PREFIX",
    "CallGroup",
    "Hierarchy",
    "Home",
    "Layout",
    "Tree",
    "block_device",
    "child_groups",
    "detect",
    "owner_name",
    "reap",
]

PREFIX = "toolcall-sandbox-"
# The key of `limits` that belongs to each control.
LIMIT_KEYS = {"memory": "memory_bytes", "pids": "pids", "cpu": "cpus", "io": "io_bytes_per_s"}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_REAP_SECONDS = 2.0
_WALK_GROUPS = 20_000


class CallGroup:
    """One call's group in every tree in use. Made by `Tree.create`; `destroy` ends it."""

    __slots__ = ("_oom_fd", "_v2_fd", "name", "v1", "v2")

    def __init__(self, name: str, v2: str, v1: dict[str, str]) -> None:
        self.name = name
        self.v2 = v2
        self.v1 = v1
        self._v2_fd: int | None = None
        self._oom_fd: int | None = None

    def __repr__(self) -> str:
        return f"<CallGroup {self.name} v2={bool(self.v2)} v1={','.join(sorted(self.v1)) or '-'}>"

    @property
    def fds_for_clone(self) -> int | None:
        """The directory descriptor for CLONE_INTO_CGROUP, ours until `destroy`; None without a unified tree."""
        if self._v2_fd is None and self.v2:
            self._v2_fd = cgroup_v2.open_directory(self.v2)
        return self._v2_fd

    def procs_paths(self, *, cloned: bool = False) -> list[str]:
        """The files that must still receive the jail's pid, while it has a single thread.

        `cloned`: it was born in the unified group, so only the v1 files remain.
        """
        paths = [f"{self.v2}/cgroup.procs"] if self.v2 and not cloned else []
        # The jail's first process has one thread when it joins. To move a thread the kernel need not hold off every
        # fork of the host, as it does to move a process (cgroup_procs_write_start in kernel/cgroup/cgroup.c).
        return [*paths, *(f"{group}/tasks" for group in dict.fromkeys(self.v1.values()))]

    def add(self, pid: int, *, cloned: bool = False) -> None:
        """Put `pid` under the limits. Memory it was charged before stays with its old group."""
        for path in self.procs_paths(cloned=cloned):
            write_value(path, pid)

    def apply(self, limits: dict[str, float | int], io_devices: list[str] | None = None) -> None:
        """Write the limits. Raises OSError naming the file that refused.

        ENOTSUP: no controller here limits that control. ENODEV: an io limit without a disk to hold it.
        """
        v1_limits, v2_limits = {}, {}
        for control, key in LIMIT_KEYS.items():
            if key not in limits:
                continue
            if V1_NAMES[control] in self.v1:
                v1_limits[key] = limits[key]
            elif self.v2 and os.path.exists(f"{self.v2}/{_V2_MARKS[control]}"):
                v2_limits[key] = limits[key]
            else:
                raise OSError(errno.ENOTSUP, f"no cgroup controller here limits {control}", self.name)
        if "io_bytes_per_s" in limits and not io_devices:
            raise OSError(errno.ENODEV, "an io limit is kept per disk, and no disk is behind these paths", self.name)
        cgroup_v2.apply_limits(self.v2, v2_limits, io_devices or [])
        cgroup_v1.apply_limits(self.v1, v1_limits, io_devices or [])

    def kill(self, timeout_s: float = 1.0) -> bool:
        """SIGKILL to everything inside. True when it is done; by v2 at once, by v1 once the groups are empty."""
        if self.v2 and cgroup_v2.kill(self.v2) and not self._has_v1_processes():
            return True
        if self.v1:
            return cgroup_v1.kill(self.v1, timeout_s=timeout_s)
        return not self.v2 or cgroup_v1.kill({"": self.v2}, timeout_s=timeout_s)

    def _has_v1_processes(self) -> bool:
        # A process that joined a v1 group but not the unified one is out of cgroup.kill's reach: a builder that
        # died between the two writes. Those just killed also show here until they are gone.
        inside = set(read_pids(self.v2))
        return any(pid not in inside for group in set(self.v1.values()) for pid in read_pids(group))

    def freeze(self, timeout_s: float = 0.5) -> bool:
        """Stop everything inside, keeping its state. False when not all of it stopped in time; it will."""
        return self._set_frozen(frozen=True, timeout_s=timeout_s)

    def thaw(self, timeout_s: float = 0.5) -> bool:
        return self._set_frozen(frozen=False, timeout_s=timeout_s)

    def _set_frozen(self, *, frozen: bool, timeout_s: float) -> bool:
        if self.v2:
            return cgroup_v2.set_frozen(self.v2, frozen=frozen, timeout_s=timeout_s)
        if "freezer" in self.v1:
            return cgroup_v1.set_frozen(self.v1["freezer"], frozen=frozen, timeout_s=timeout_s)
        raise OSError(errno.ENOTSUP, "neither a unified tree nor the freezer controller is there", self.name)

    def open_oom_event(self) -> int | None:
        """A descriptor that becomes readable when a v1 group has run out of memory; the caller closes it.

        None with v2 memory: there the kernel kills the whole group by itself (memory.oom.group).
        """
        fd, self._oom_fd = self._oom_fd, None
        if fd is None and "memory" in self.v1:
            fd = cgroup_v1.open_oom_event(self.v1["memory"])
        return fd

    def prepare_oom_event(self) -> None:
        """Have what `open_oom_event` will give."""
        if self._oom_fd is None:
            self._oom_fd = self.open_oom_event()

    def stats(self) -> dict[str, float | int]:
        """The counters of this call so far; what the host does not count is absent. Units are in the names."""
        found = cgroup_v2.stats(self.v2, self.v1) if self.v2 else {}
        found.update(cgroup_v1.stats(self.v1))
        return found

    def is_empty(self) -> bool:
        if self.v2 and cgroup_v2.is_populated(self.v2):
            return False
        return not any(read_pids(group) for group in set(self.v1.values()))

    def remove(self) -> bool:
        """Remove the groups without waiting. False while one of them is not empty."""
        if not remove_groups(([self.v2] if self.v2 else []) + list(dict.fromkeys(self.v1.values()))):
            return False
        self.close()
        return True

    def destroy(self, timeout_s: float = 2.0) -> bool:
        """Kill what is inside and remove the groups. False when something would not die in time; `reap` gets it."""
        deadline = time.monotonic() + timeout_s
        while not self.remove():
            self.kill(timeout_s=max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                self.close()
                return False
            time.sleep(0.0005)
        return True

    def close(self) -> None:
        """Give the descriptor back without touching the groups."""
        for fd in (self._v2_fd, self._oom_fd):
            if fd is not None:
                os.close(fd)
        self._v2_fd = self._oom_fd = None


# The file that shows that a v2 group has the controller.
_V2_MARKS = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max", "io": "io.max"}


class Tree:
    """The supervisor's own parent group in each tree in use, locked while the supervisor lives."""

    __slots__ = ("_lock_fds", "name", "refused", "v1", "v2")

    def __init__(self, name: str) -> None:
        self.name = name
        self.v2 = ""
        self.v1: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._lock_fds: list[int] = []

    def __repr__(self) -> str:
        return f"<Tree {self.name} v2={self.v2 or '-'} v1={','.join(sorted(self.v1)) or '-'}>"

    @classmethod
    def open(cls, name: str, layout: Layout | None = None) -> Tree:
        """Make the parent groups `toolcall-sandbox-<name>`; what the host does not offer is left out.

        Raises OSError when an offered tree refuses us; then nothing is left behind.
        """
        _check_name(name)
        tree = cls(PREFIX + name)
        try:
            tree._open(layout or detect())
        except BaseException:
            tree.close()
            raise
        return tree

    def _open(self, layout: Layout) -> None:
        if layout.home:
            self.v2, self.refused = cgroup_v2.open_parent(layout.home, self.name)
            self._lock(self.v2)
        used = {V1_NAMES[control] for control in CONTROLS if layout.where(control) == "v1"}
        if used or not self.v2:
            # The unified tree counts cpu time, freezes and takes device rules by itself.
            used |= set() if self.v2 else {"cpuacct", "freezer", "devices"}
        paths: dict[str, str] = {}
        for controller in sorted(used):
            hierarchy = layout.v1.get(controller)
            if not hierarchy or not hierarchy.writable:
                continue
            if hierarchy.own not in paths:
                path = f"{hierarchy.own}/{self.name}"
                make_group(path)
                paths[hierarchy.own] = path
                self._lock(path)
            self.v1[controller] = paths[hierarchy.own]

    def _lock(self, path: str) -> None:
        # The lock tells other supervisors that the owner lives, also those in another pid namespace, where our pid
        # means nothing. It ends with us: close-on-exec keeps it from programs that we start.
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._lock_fds.append(fd)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def has_groups(self) -> bool:
        """False when no tree is open to us: then calls are limited and killed by other means."""
        return bool(self.v2 or self.v1)

    def where(self, control: str) -> str:
        """`v1` or `v2`, where calls get this control's limit from; empty when nowhere."""
        if V1_NAMES[control] in self.v1:
            return "v1"
        if self.v2 and control in (read_text(self.v2 + "/cgroup.subtree_control") or "").split():
            return "v2"
        return ""

    def create(self, call_name: str, limits: dict[str, float | int], io_devices: list[str] | None = None) -> CallGroup:
        """Make one call's groups and apply `limits` (`memory_bytes`, `pids`, `cpus`, `io_bytes_per_s`).

        `io_devices`: "major:minor" of whole disks, from `block_device`. Raises OSError (EEXIST: the name is in
        use; ENOTSUP: a limit has no controller here); then nothing is left behind.
        """
        _check_name(call_name)
        made: list[str] = []
        try:
            v2 = self._make_below(self.v2, call_name, made) if self.v2 else ""
            v1 = {}
            for controller, parent in self.v1.items():
                if controller == "blkio" and "io_bytes_per_s" not in limits:
                    continue
                v1[controller] = self._make_below(parent, call_name, made)
            group = CallGroup(call_name, v2, v1)
            try:
                group.apply(limits, io_devices)
            except BaseException:
                group.close()
                raise
        except BaseException:
            for path in made:
                remove_group(path)
            raise
        return group

    @staticmethod
    def _make_below(parent: str, name: str, made: list[str]) -> str:
        path = f"{parent}/{name}"
        if path not in made:
            make_group(path)
            made.append(path)
        return path

    def close(self, timeout_s: float = _REAP_SECONDS) -> bool:
        """Kill whatever is left in any call's group and remove all of them; False when some of it would not die."""
        paths = ([self.v2] if self.v2 else []) + list(dict.fromkeys(self.v1.values()))
        alive = [path for path in paths if not _remove_tree(path, timeout_s)]
        while self._lock_fds:
            os.close(self._lock_fds.pop())
        return not alive


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(f"a group's name must match {_NAME.pattern}: {name!r}")


def _remove_tree(path: str, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while True:
        groups = groups_below(path)
        if remove_groups(groups):
            return True
        if not os.path.exists(path + "/cgroup.kill") or not cgroup_v2.kill(path):
            for group in groups:
                cgroup_v1.kill({_kind(group): group}, timeout_s=max(0.0, deadline - time.monotonic()))
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)


def _kind(group: str) -> str:
    for mark in ("pids", "freezer"):
        if os.path.exists(f"{group}/{'pids.max' if mark == 'pids' else 'freezer.state'}"):
            return mark
    return ""


def owner_name(pid: int) -> str:
    """The name for `Tree.open` that ties a tree to the process `pid`. Raises ProcessLookupError."""
    start = _start_time(pid)
    if not start:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{pid}")
    return f"{pid}-{start}"


def _start_time(pid: int) -> str:
    """Clock ticks from boot to the start of `pid` (proc_pid_stat(5), field 22); empty when it is gone or a zombie."""
    fields = (read_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def reap(prefix: str = PREFIX, layout: Layout | None = None) -> list[str]:
    """Kill and remove the trees that dead supervisors left; the paths removed. Touches nothing else."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)-(\d+)")
    reaped = []
    for path in _find(pattern, layout or detect()):
        match = pattern.fullmatch(os.path.basename(path))
        if match and _start_time(int(match[1])) != match[2] and _reap_one(path):
            reaped.append(path)
    return reaped


def _reap_one(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False  # gone, or another user's
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return _remove_tree(path, _REAP_SECONDS)
    except (BlockingIOError, PermissionError):
        return False  # its owner lives in another pid namespace, or it is another user's
    finally:
        os.close(fd)


def _find(pattern: re.Pattern[str], layout: Layout) -> list[str]:
    """Every group of that name in every tree. Bounded: on a host with very many groups the far ones are left alone."""
    trees = list(layout.v1.values()) + ([layout.v2] if layout.v2 else [])
    found = []
    for mount_point in dict.fromkeys(tree.mount_point for tree in trees):
        todo = [mount_point]
        for visited in todo:
            for child in child_groups(visited):
                if pattern.fullmatch(os.path.basename(child)):
                    found.append(child)
                elif len(todo) < _WALK_GROUPS:
                    todo.append(child)
    return found


def block_device(path: str) -> str | None:
    """The whole disk that holds `path`, as "major:minor" for io limits; None when no disk does (tmpfs, overlay)."""
    st_dev = os.stat(path).st_dev
    link = f"/sys/dev/block/{os.major(st_dev)}:{os.minor(st_dev)}"
    if not os.path.exists(link):
        return None
    # Limits are kept per disk: a partition's own number is refused (ENODEV).
    if os.path.exists(link + "/partition"):
        link = os.path.dirname(os.path.realpath(link))
    return (read_text(link + "/dev") or "").strip() or None
