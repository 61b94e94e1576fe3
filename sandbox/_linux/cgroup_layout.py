"""Where this process stands in the cgroup trees, and what it may do there. Changes nothing.

Source: cgroups(7), proc_pid_mountinfo(5). `/proc/self/cgroup` and the root field of mountinfo are both relative to
the cgroup namespace, so a group's directory is the mount point plus what is left of the path after that root; this
holds on a plain host, in a container with or without a cgroup namespace, and for a bind-mounted subtree.
"""

from __future__ import annotations

import os
import re

from sandbox._linux.cgroup_files import read_pids, read_records, read_text, read_words

# What a limit needs, by the v2 name; v1 calls io's controller blkio.
CONTROLS = ("memory", "pids", "cpu", "io")
V1_NAMES = {"memory": "memory", "pids": "pids", "cpu": "cpu", "io": "blkio"}
# Where processes go that were in the group which now passes controllers on to ours.
LEAF = "supervisor"
V1_CONTROLLERS = frozenset(("memory", "pids", "cpu", "cpuacct", "blkio", "freezer", "devices"))


class Hierarchy:
    """One mounted tree: `own` is the directory of our own group in it."""

    __slots__ = ("controllers", "mount_point", "own", "version", "writable")

    def __init__(self, version: int, controllers: frozenset[str], mount_point: str, own: str, writable: bool) -> None:
        self.version = version
        self.controllers = controllers
        self.mount_point = mount_point
        self.own = own
        self.writable = writable

    def __repr__(self) -> str:
        names = ",".join(sorted(self.controllers)) or "no controllers"
        return f"<Hierarchy v{self.version} {names} own={self.own} {'writable' if self.writable else 'read-only'}>"


class Home:
    """The v2 group below which ours go: `controllers` can be had there, once `move_first` processes sit in a leaf."""

    __slots__ = ("controllers", "move_first", "path")

    def __init__(self, path: str, controllers: frozenset[str], move_first: bool) -> None:
        self.path = path
        self.controllers = controllers
        self.move_first = move_first


class Layout:
    """`v1` maps a controller to its tree; `v2` is the unified tree, `home` the place in it that is open to us."""

    __slots__ = ("home", "v1", "v2")

    def __init__(self, v1: dict[str, Hierarchy], v2: Hierarchy | None, home: Home | None) -> None:
        self.v1 = v1
        self.v2 = v2
        self.home = home

    @property
    def kind(self) -> str:
        """`v1`, `v2`, `hybrid` or `none`."""
        # A lone tree of devices limits nothing that a call asks for.
        if self.v1.keys() - {"devices"}:
            return "hybrid" if self.v2 else "v1"
        return "v2" if self.v2 else "none"

    def where(self, control: str) -> str:
        """`v2` or `v1` when we can limit `control` there, else an empty string."""
        if self.home and control in self.home.controllers:
            return "v2"
        tree = self.v1.get(V1_NAMES[control])
        return "v1" if tree and tree.writable else ""

    def reason(self, control: str) -> str:
        """Why `where(control)` is empty."""
        tree = self.v1.get(V1_NAMES[control])
        if tree:
            return f"the cgroup v1 group {tree.own} is not writable for us"
        if not self.v2:
            return "no cgroup tree with this controller is mounted, or our own group is not visible in it"
        if control not in read_words(self.v2.mount_point + "/cgroup.controllers"):
            return f"the kernel or the container does not offer the {control} controller in {self.v2.mount_point}"
        return f"no cgroup v2 group around {self.v2.own} that offers {control} is delegated to us"

    def to_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "v1": {name: {"own": t.own, "writable": t.writable} for name, t in sorted(self.v1.items())},
            "v2": {"own": self.v2.own, "mount_point": self.v2.mount_point} if self.v2 else None,
            "v2_home": self.home.path if self.home else "",
            "v2_controllers": sorted(self.home.controllers) if self.home else [],
        }


def detect(proc: str = "/proc/self") -> Layout:
    """Read our place in every cgroup tree. `proc` may be another process's directory."""
    paths = _own_paths(read_records(proc + "/cgroup"))
    v1: dict[str, Hierarchy] = {}
    v2 = None
    for fstype, dev, root, mount_point, controllers in _mounts(read_records(proc + "/mountinfo")):
        wanted = controllers & V1_CONTROLLERS
        if fstype == "cgroup2":
            key = ""
        elif wanted:
            key = min(wanted)
        else:
            continue
        own = _own_directory(paths.get(key), dev, root, mount_point)
        if not own:
            continue
        tree = Hierarchy(2 if fstype == "cgroup2" else 1, wanted, mount_point, own, _is_writable(own))
        if fstype == "cgroup2":
            v2 = tree if v2 is None or (tree.writable and not v2.writable) else v2
        else:
            for name in wanted:
                if name not in v1 or (tree.writable and not v1[name].writable):
                    v1[name] = tree
    return Layout(v1, v2, find_home(v2) if v2 else None)


def _own_paths(text: str) -> dict[str, str]:
    """Controller to path from /proc/PID/cgroup; the unified tree has the empty name."""
    paths = {}
    for line in text.splitlines():
        _number, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            paths[name] = path
    return paths


def _mounts(text: str) -> list[tuple[str, str, str, str, frozenset[str]]]:
    """(file system, device, root, mount point, super options) of every cgroup mount."""
    mounts = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields, after = head.split(" "), tail.split(" ")
        if after[0] in ("cgroup", "cgroup2"):
            options = frozenset(after[2].split(","))
            mounts.append((after[0], fields[2], _unescape(fields[3]), _unescape(fields[4]), options))
    return mounts


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _own_directory(path: str | None, dev: str, root: str, mount_point: str) -> str:
    """The directory of group `path` below this mount, or an empty string when it cannot be seen through it."""
    if path is None or path.endswith(" (deleted)") or "/.." in path + root:
        return ""
    if root == "/":
        rest = path
    elif path == root or path.startswith(root + "/"):
        rest = path[len(root) :]
    else:
        return ""
    own = (mount_point + rest).rstrip("/")
    try:
        st_dev = os.stat(own + "/cgroup.procs").st_dev
    except OSError:
        return ""
    # Another mount may lie on top of this one: what we see there must be this very file system.
    return own if f"{os.major(st_dev)}:{os.minor(st_dev)}" == dev else ""


def _is_writable(directory: str) -> bool:
    return os.access(directory, os.W_OK | os.X_OK, effective_ids=True)


def find_home(v2: Hierarchy) -> Home | None:
    """The nearest group, from our own upwards, that offers us most of memory, pids and cpu; None when all are closed.

    Near, because limits that an operator set on the groups above us must go on holding for what we start.
    """
    best: Home | None = None
    directory = v2.own
    while True:
        home = _as_home(directory, is_own=directory == v2.own)
        if home and (best is None or _offer(home) > _offer(best)):
            best = home
        if directory == v2.mount_point:
            return best
        directory = directory.rpartition("/")[0]


def _offer(home: Home) -> int:
    return len(home.controllers - {"io"})


def _as_home(directory: str, *, is_own: bool) -> Home | None:
    """What `directory` could do for us as the parent of our groups."""
    # Moving a process between two groups needs write access to cgroup.procs of their nearest common ancestor, which
    # is `directory` itself.
    if not (_is_writable(directory) and os.access(directory + "/cgroup.procs", os.W_OK, effective_ids=True)):
        return None
    kind = read_text(directory + "/cgroup.type")
    if kind is not None and kind.strip() != "domain":
        return None
    enabled = read_words(directory + "/cgroup.subtree_control") & frozenset(CONTROLS)
    missing = (read_words(directory + "/cgroup.controllers") & frozenset(CONTROLS)) - enabled
    if not missing or not os.access(directory + "/cgroup.subtree_control", os.W_OK, effective_ids=True):
        return Home(directory, enabled, False)
    # Only the root of the whole tree, which has no cgroup.type, may hold processes and enable controllers at once.
    pids = read_pids(directory) if kind is not None else []
    if not pids:
        return Home(directory, enabled | missing, False)
    # The leaf that a supervisor moved us to is no home: what was above it is.
    if is_own and os.path.basename(directory) != LEAF and is_ours(directory, pids):
        return Home(directory, enabled | missing, True)
    return Home(directory, enabled, False)


def is_ours(directory: str, pids: list[int]) -> bool:
    """Whether we may move every process of the group: they are us and our descendants.

    In a group that systemd marks as delegated, also when they all descend from one of our own ancestors in it, which
    is what `systemd-run -p Delegate=yes SHELL` looks like.
    """
    me = os.getpid()
    tops = {me}
    if _is_delegated(directory):
        tops |= set(_ancestors(me)) & set(pids)
    return all(pid in tops or tops & set(_ancestors(pid)) for pid in pids)


def _is_delegated(directory: str) -> bool:
    # systemd sets trusted.delegate, which takes CAP_SYS_ADMIN to read, and newer versions user.delegate too. Where
    # neither can be seen, the parent slice of a user's scope usually serves as home instead.
    for name in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(directory, name) == b"1":
                return True
        except OSError:
            continue
    return False


def _ancestors(pid: int) -> list[int]:
    found: list[int] = []
    while pid > 1 and len(found) < 256:
        stat = read_text(f"/proc/{pid}/stat")
        if stat is None:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found
