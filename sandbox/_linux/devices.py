"""The second wall around device nodes: a rule on the supervisor's cgroups, whatever a jail's /dev may hold.

Version 2 and hybrid trees: one program on the supervisor's own group holds for every call's group below it, and costs
a call nothing; a group that was granted more gets a program of its own in its place. Version 1: the `devices`
controller, whose children start with what their parent may and can only be narrowed.
Only root can do either; an ordinary user's supervisor has none, and says so.
Source: bpf(2); Documentation/admin-guide/cgroup-v1/devices.rst.
"""

from __future__ import annotations

import os

from sandbox._linux import bpf
from sandbox._linux.cgroup_files import write_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sandbox._linux.bpf import Rule

# What every jail has: the nodes of its /dev, its terminals. Making the overlay's whiteouts (0:0) is asked about by
# kernels before 5.8 only, opening none of them ever is.
BASE: tuple[Rule, ...] = (
    *(("c", 1, minor, "rw") for minor in (3, 5, 7, 8, 9)),
    ("c", 5, 0, "rw"),
    ("c", 5, 2, "rw"),
    ("c", 136, None, "rw"),
    ("c", 0, 0, "m"),
)


class DeviceRules:
    """The rules on one supervisor's tree. `kind`: "bpf", "v1", or empty with the `reason` why there are none."""

    __slots__ = ("_grantable", "_programs", "kind", "reason")

    def __init__(self) -> None:
        self.kind = ""
        self.reason = ""
        self._programs: dict[tuple[Rule, ...], int] = {}
        self._grantable: tuple[Rule, ...] = ()

    def __repr__(self) -> str:
        return f"<DeviceRules {self.kind or 'none: ' + self.reason} programs={len(self._programs)}>"

    @classmethod
    def open(cls, v2: str, v1: str, grantable: Iterable[Rule] = ()) -> DeviceRules:
        """Put the supervisor's own groups (directories; empty: there is none) under the rule of every jail.

        `grantable`: what single calls may be granted later; version 1 has to know it beforehand.
        """
        rules = cls()
        try:
            if v2:
                rules._attach(v2, BASE, bpf.ALLOW_OVERRIDE)
                rules.kind = "bpf"
            elif v1:
                rules._grantable = tuple(grantable)
                write_value(v1 + "/devices.deny", "a")
                for rule in (*BASE, *rules._grantable):
                    write_value(v1 + "/devices.allow", v1_line(rule))
                rules.kind = "v1"
            else:
                rules.reason = "no cgroup that takes a device rule is open to us"
        except OSError as error:
            rules.reason = str(error)
        return rules

    def admit(self, v2: str, v1: str, granted: Sequence[Rule] = ()) -> None:
        """Let one call's group open what was granted to it, before anything runs in it. Raises OSError."""
        if self.kind == "bpf" and granted:
            self._attach(v2, (*BASE, *granted), 0)
        elif self.kind == "v1":
            for rule in self._grantable:
                if rule not in granted:
                    write_value(v1 + "/devices.deny", v1_line(rule))

    def _attach(self, group: str, rules: tuple[Rule, ...], flags: int) -> None:
        if rules not in self._programs:
            self._programs[rules] = bpf.load_device_program(bpf.device_program(rules))
        fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            bpf.attach_device_program(self._programs[rules], fd, flags)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Give the descriptors back; programs stay with the groups that they are attached to."""
        for fd in self._programs.values():
            os.close(fd)
        self._programs.clear()


def v1_line(rule: Rule) -> str:
    """The rule as a line of `devices.allow`: "c 195:0 rw"."""
    kind, major, minor, accesses = rule
    return f"{kind} {major}:{'*' if minor is None else minor} {accesses}"


def node_rule(path: str, accesses: str = "rw") -> Rule:
    """The rule that permits this very character device. Raises OSError, ValueError when it is something else."""
    info = os.stat(path)
    if info.st_mode & 0o170000 != 0o020000:
        raise ValueError(f"{path} is no character device")
    return ("c", os.major(info.st_rdev), os.minor(info.st_rdev), accesses)
