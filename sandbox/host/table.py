"""What each control is worth on this host: full, partial or none, by what mechanism, why, and what would change it.

Pure: facts in, table out. `strength` is a separate axis from `level`: how hard the mechanism is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sandbox.host.delegation import MORE_CONTROLLERS
from sandbox.host.facts import Feature, HostFacts

TYPE_CHECKING = False

if TYPE_CHECKING:
    from sandbox.plan import Level, Strength

CONTROL_NAMES = (
    "filesystem",
    "network",
    "processes",
    "syscalls",
    "landlock",
    "memory",
    "pids",
    "cpus",
    "cpu_time",
    "wall_time",
    "disk",
    "inodes",
    "open_files",
    "output",
    "io",
    "gpu",
)
# What every call asks for. io is asked for by few manifests, Landlock is a second wall behind the mount namespace.
EVERY_CALL = tuple(name for name in CONTROL_NAMES if name not in ("io", "landlock"))
_NAMESPACES_OF = {
    "filesystem": ("mount",),
    "network": ("net",),
    "processes": ("pid", "ipc", "uts", "cgroup"),
}
_V2_FILES = {"memory": "memory.max", "pids": "pids.max", "cpu": "cpu.max", "io": "io.max"}
_V1_FILES = {"memory": "memory.limit_in_bytes", "pids": "pids.max", "cpu": "cpu.cfs_quota_us"}


@dataclass(frozen=True, slots=True)
class Control:
    """One row of the table; `reason` says why it is less than full, `fix` is the command that would make it more."""

    level: Level
    mechanism: str
    strength: Strength = "kernel"
    reason: str = ""
    fix: str = ""


def controls(facts: HostFacts) -> dict[str, Control]:
    """Judge every control of `CONTROL_NAMES`. Without a jail nothing holds: then all of them are none."""
    table = {name: _judge(name, facts) for name in CONTROL_NAMES}
    missing = next((table[name] for name in _NAMESPACES_OF if table[name].level == "none"), None)
    if missing is None:
        return table
    reason = f"no jail can be made here: {missing.reason}"
    return {
        name: control if name in _NAMESPACES_OF else Control("none", "", "none", reason, missing.fix)
        for name, control in table.items()
    }


def _judge(name: str, facts: HostFacts) -> Control:
    if name in _NAMESPACES_OF:
        return _namespaces(name, facts)
    if name in _RULES:
        return _RULES[name](facts)
    return Control("full", _FIXED[name])


# Held by the kernel or by the supervisor outside the jail, wherever there is a jail at all.
_FIXED = {
    "wall_time": "supervisor timer and group kill",
    "output": "bounded pipes read by the supervisor",
    "disk": "sized tmpfs",
    "inodes": "sized tmpfs",
    "open_files": "rlimit nofile",
}


def _namespaces(name: str, facts: HostFacts) -> Control:
    needed: list[Feature] = [facts.user_namespaces]
    needed += [facts.namespaces.get(kind, Feature(False, "not tried")) for kind in _NAMESPACES_OF[name]]
    if name == "processes":
        needed.append(facts.proc_mount)
    failed = next((feature for feature in needed if not feature.ok), None)
    if failed:
        return Control("none", "", "none", failed.reason, failed.fix)
    kinds = ", ".join(_NAMESPACES_OF[name])
    mechanisms = {
        "filesystem": "mount namespace, pivot_root",
        "network": "network namespace with loopback only",
        "processes": f"{kinds} namespaces",
    }
    return Control("full", mechanisms[name])


def _memory(facts: HostFacts) -> Control:
    control = _by_cgroup("memory", facts)
    if control is None:
        reason, fix = _no_cgroup("memory", facts)
        return Control("partial", "polled by the supervisor, then killed", "polled", reason, fix)
    if facts.swap_bytes and not facts.swap_accounted:
        reason = "the kernel does not count swap per group, so a call can move memory there"
        return Control("partial", control.mechanism, "kernel", reason, "boot with swapaccount=1, or sudo swapoff -a")
    return control


def _pids(facts: HostFacts) -> Control:
    control = _by_cgroup("pids", facts)
    if control:
        return control
    if facts.nproc_in_userns.ok:
        return Control("full", "rlimit nproc in the jail's user namespace")
    reason, fix = _no_cgroup("pids", facts)
    return Control("none", "", "none", f"{facts.nproc_in_userns.reason}; {reason}", facts.nproc_in_userns.fix or fix)


def _cpus(facts: HostFacts) -> Control:
    control = _by_cgroup("cpu", facts)
    if control:
        return control
    reason, fix = _no_cgroup("cpu", facts)
    return Control("partial", "cpu affinity", "kernel", f"whole cores only: {reason}", fix)


def _cpu_time(facts: HostFacts) -> Control:
    if facts.cpu_accounting:
        return Control("full", "cgroup cpu accounting and supervisor timer")
    reason, fix = _no_cgroup("cpu", facts)
    return Control("partial", "polled by the supervisor, then killed", "polled", reason, fix)


def _io(facts: HostFacts) -> Control:
    where = facts.cgroups["io"].where if "io" in facts.cgroups else ""
    if where == "v2":
        return Control("full", "cgroup v2 io.max")
    if where == "v1":
        reason = "cgroup v1 does not hold back writes that go through the page cache"
        fix = "boot with systemd.unified_cgroup_hierarchy=1"
        return Control("partial", "cgroup v1 blkio.throttle", "kernel", reason, fix)
    reason, fix = _no_cgroup("io", facts)
    if facts.cgroup_kind == "v2" and not facts.is_root_like:
        fix = MORE_CONTROLLERS
    return Control("none", "", "none", reason, fix)


def _syscalls(facts: HostFacts) -> Control:
    if not facts.seccomp_filter:
        return Control(
            "none", "", "none", "the kernel has no seccomp filters", "use a kernel with CONFIG_SECCOMP_FILTER=y"
        )
    if not facts.libseccomp:
        return Control("none", "", "none", "libseccomp.so.2, which compiles the filter, is not there", _LIBSECCOMP_FIX)
    return Control("full", "seccomp filter")


_LIBSECCOMP_FIX = "sudo apt install libseccomp2   (dnf: libseccomp)"


def _landlock(facts: HostFacts) -> Control:
    if facts.landlock_abi:
        return Control("full", f"Landlock ABI {facts.landlock_abi}")
    reason = "the kernel has no Landlock, or has it switched off"
    return Control("none", "", "none", reason, "boot with lsm=landlock,... (Linux 5.13 or newer)")


def _by_cgroup(name: str, facts: HostFacts) -> Control | None:
    where = facts.cgroups[name].where if name in facts.cgroups else ""
    if not where:
        return None
    return Control("full", f"cgroup {where} {(_V2_FILES if where == 'v2' else _V1_FILES)[name]}")


def _no_cgroup(name: str, facts: HostFacts) -> tuple[str, str]:
    """Why there is no group that limits `name`, and the command that would give one."""
    control = facts.cgroups.get(name)
    reason = control.reason if control else "cgroups were not looked at"
    if facts.systemd_user.ok:
        return reason, "systemd-run --user --scope -p Delegate=yes -- COMMAND"
    if facts.uid != 0 and facts.cgroup_kind in ("v1", "hybrid"):
        return reason, facts.systemd_user.fix or "run as root: version 1 groups are not delegated to users"
    if facts.container:
        return reason, "give the container its own writable cgroup tree (docker: --privileged --cgroupns=private)"
    if not facts.is_root_like:
        return reason, facts.systemd_user.fix or "run as root"
    return reason, ""


def _gpu(facts: HostFacts) -> Control:
    # The nodes are absent for everyone; the rule is a second wall, for whoever would come by a node some other way.
    rules = {"bpf": ", cgroup device program", "v1": ", cgroup v1 devices list"}
    return Control("full", f"device nodes absent{rules.get(facts.device_rule, '')}")


_RULES: dict[str, Callable[[HostFacts], Control]] = {
    "memory": _memory,
    "pids": _pids,
    "cpus": _cpus,
    "cpu_time": _cpu_time,
    "io": _io,
    "syscalls": _syscalls,
    "landlock": _landlock,
    "gpu": _gpu,
}
