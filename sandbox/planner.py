"""Decide a launch: manifest + call + host facts -> an ordered plan, or `Unenforceable`. Pure: no clock, no I/O.

What the host cannot hold in full is refused, unless the manifest names that control under `best_effort`; then the
plan carries it as `partial` or `none` with the reason, and so will the record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sandbox import planner_egress, planner_gpu, planner_http, planner_launcher, planner_workspace
from sandbox.errors import Unenforceable
from sandbox.host import Control, HostFacts
from sandbox.launchers.declared import DECLARED, Choice, has_landlock
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan, Limit, Step
from sandbox.spec import CallSpec

HOME = "/home/user"
HOSTNAME = "sandbox"
SYSTEM_DIRECTORIES = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
# What programs of the system view read in /etc and which tells nothing about the host's users or secrets.
ETC_PATHS = tuple(
    f"/etc/{name}"
    for name in (
        "ld.so.cache",
        "ld.so.conf",
        "ld.so.conf.d",
        "alternatives",
        "ssl/certs",
        "ssl/openssl.cnf",
        "pki/tls/certs",
        "pki/ca-trust/extracted",
        "ca-certificates.conf",
        "localtime",
        "timezone",
        "mime.types",
        "magic",
        "protocols",
        "services",
        "inputrc",
        "bash.bashrc",
        "profile",
        "terminfo",
        "fonts",
        "locale.alias",
        "os-release",
        "debian_version",
        "lsb-release",
        "java-17-openjdk",
        "java-21-openjdk",
        "perl",
        "python3",
        "vim",
    )
)
# How many CPUs there are, as in /proc/cpuinfo: lscpu and libraries such as cpuinfo (of PyTorch) look here only.
COPIED_FILES = tuple(f"/sys/devices/system/cpu/{name}" for name in ("online", "possible", "present"))
DEVICE_NODES = ("null", "zero", "full", "random", "urandom", "tty")
# The lists of container runtimes, plus the entries by which a machine is told from another.
PROC_MASKED = (
    "acpi",
    "asound",
    "interrupts",
    "kallsyms",
    "kcore",
    "key-users",
    "keys",
    "kmsg",
    "kpagecgroup",
    "kpagecount",
    "kpageflags",
    "latency_stats",
    "modules",
    "mtrr",
    "sched_debug",
    "scsi",
    "slabinfo",
    "timer_list",
    "timer_stats",
    "vmallocinfo",
)
# Models and serials of the machine's GPUs; the driver's libraries read it, so it is masked where no GPU is granted.
PROC_DRIVER = "driver"
PROC_READ_ONLY = ("bus", PROC_DRIVER, "dynamic_debug", "fs", "irq", "sys", "sysrq-trigger")
# Of what the kernel counts per user. 64 watchers are more than any build tool opens.
USER_LIMITS = {"max_user_namespaces": 0, "max_inotify_instances": 64, "max_fanotify_groups": 0}
PRIVATE_PLACES = {"/tmp": "tmp", "/var/tmp": "var-tmp", HOME: "home", "/dev/shm": "shm"}  # noqa: S108 - inside
NAMESPACES = ("user", "pid", "mount", "network", "ipc", "uts", "cgroup")
DENY_ENTRIES_MAX = 1_000_000


@dataclass(frozen=True, slots=True)
class PathFact:
    """One host path as it was when resolved: the launcher refuses to mount anything else under that name."""

    dev: int
    ino: int


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the decision needs from the caller's side, gathered beforehand.

    `paths`: every granted host path. `caller_env`: the caller's variables that the manifest allows by name.
    `python_paths`: (host path, jail path) of the interpreter's prefixes. `runtime_files`: (host path, jail path) of
    what a function call needs. `search_path`: directories put before the system's in PATH. `hidden`: host paths that
    are never shown, such as the state directory with the records. `links`: (asked path, real path) of grants that were
    asked for through a symbolic link. `own_code`: what runs outside, the interpreter and
    us. `protected`: entries of a writable workspace which stay read-only. `extra_env`: variables that the caller gives
    this one call.
    """

    paths: Mapping[str, PathFact] = field(default_factory=dict)
    caller_env: Mapping[str, str] = field(default_factory=dict)
    extra_env: Mapping[str, str] = field(default_factory=dict)
    python_paths: tuple[tuple[str, str], ...] = ()
    runtime_files: tuple[tuple[str, str], ...] = ()
    search_path: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()
    extra_roots: tuple[tuple[str, str, str], ...] = ()
    own_code: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()
    engine: str = ""
    terminal_rows: int = 24
    terminal_columns: int = 80


def decide(manifest: Manifest, call: CallSpec, facts: HostFacts, around: Surroundings) -> LaunchPlan:
    """Turn what is asked into steps and limits.

    Raises Unenforceable naming every control that this host cannot hold and the manifest does not let go.
    """
    choice, lacking, fixes = planner_launcher.choose(manifest, facts)
    declared = DECLARED[choice.launcher]
    table = declared.rows(choice.runtime, facts)
    limits = tuple(_with_scope(limit, manifest, call) for limit in _limits(manifest, table, facts))
    limits += planner_gpu.limits(manifest, facts)
    lacking |= planner_launcher.gaps(choice, manifest, call)
    if choice.launcher == "jail" and (refusal := planner_workspace.refusal(call, facts)):
        lacking["workspace"] = refusal
    lacking |= planner_launcher.refuse_engine(choice, around.engine)
    _refuse_missing(manifest, (limits, table), facts, (lacking, fixes))
    view = declared.needs_image
    plan = LaunchPlan(
        launcher=choice.launcher,
        steps=(_image_steps if view else _jail_steps)(choice, manifest, call, (facts, around, limits)),
        limits=limits,
        argv=call.argv,
        env=_environment(manifest, call, around, own_search=not view),
        cwd=_directory(manifest, call),
        tty=call.tty,
        notes=planner_workspace.notes(call, facts) if choice.launcher == "jail" else (),
        template=_template(manifest, call, around),
        egress=planner_egress.policy(manifest, around.extra_roots),
        seccomp={"name": "default", "deny_set_affinity": _mechanism(limits, "cpus") == "cpu affinity"},
        isolation={
            "namespaces": [name for name in NAMESPACES if name != "user" or not view],
            **planner_launcher.isolation(choice, facts),
            **({"image": manifest.isolation.image} if view else {}),
            **({"extra_roots": dict(pair[:2] for pair in around.extra_roots)} if around.extra_roots else {}),
        },
    )
    return planner_gpu.complete(plan, manifest, facts)


_Rest = tuple[HostFacts, Surroundings, tuple[Limit, ...]]


def _jail_steps(choice: Choice, manifest: Manifest, call: CallSpec, rest: _Rest) -> tuple[Step, ...]:
    facts, around, limits = rest
    if not has_landlock(choice):
        facts = replace(facts, landlock_abi=0)
    return (
        *_view_steps(manifest, call, around),
        *_call_steps(manifest, call, facts, around, limits),
        Step("exec", "tool"),
    )


def _image_steps(choice: Choice, manifest: Manifest, call: CallSpec, rest: _Rest) -> tuple[Step, ...]:
    """The image is the system view, its /proc and /dev are the engine's; what is granted comes into it by name."""
    facts, around, limits = rest
    settings = Step("etc_files", "view", _etc_files(manifest))
    runtime_files = [list(pair) for pair in around.runtime_files]
    mounted = (
        settings,
        Step("scratch", "view", _scratch(manifest, call)),
        Step("system_view", "view", {"runtime_files": runtime_files}),
        *planner_http.steps(manifest),
        *_granted_steps(manifest, call, around),
        *((Step("terminals", "view", _terminal(call, around)),) if call.tty else ()),
    )
    sealed = (
        Step("hostname", "view", {"name": HOSTNAME}),
        Step("rlimits", "view", _rlimits(manifest, limits)),
        Step("proc", "view", _proc(manifest)),
    )
    container = {
        "image": manifest.isolation.image,
        "runtime": choice.runtime,
        "engine": around.engine,
        "function": call.kind == "function",
    }
    return planner_launcher.container_steps(container, mounted, sealed, planner_egress.steps(manifest, facts))


def _limits(manifest: Manifest, table: Mapping[str, Control], facts: HostFacts) -> tuple[Limit, ...]:
    resources = manifest.resources
    asked: dict[str, int | float | str | None] = {
        "memory": resources.memory_bytes,
        "pids": resources.pids,
        "cpus": resources.cpus,
        "cpu_time": resources.cpu_time_s,
        "io": resources.io_bytes_per_s,
        "disk": resources.disk_bytes,
        "inodes": resources.inodes,
        "wall_time": resources.wall_time_s,
        "output": resources.output_bytes,
        "open_files": resources.open_files,
        "filesystem": "granted paths only",
        "network": manifest.network.mode,
        "processes": "own namespaces",
        "syscalls": "default",
        "gpu": manifest.gpu.count or len(manifest.gpu.devices),
    }
    limits = {name: _limit(name, value, table[name]) for name, value in asked.items() if value is not None}
    limits["network"] = planner_egress.limit(manifest, facts, limits["network"])
    limits["gpu"] = planner_gpu.limit(manifest, limits["gpu"])
    return tuple(limits.values())


def _limit(name: str, value: int | float | str | None, control: Control) -> Limit:
    applied = None if control.level == "none" else value
    if control.mechanism == "cpu affinity" and isinstance(value, float | int):
        applied = max(1, math.ceil(value))
    return Limit(name, value, applied, control.level, control.mechanism, control.strength, control.reason)


def _with_scope(limit: Limit, manifest: Manifest, call: CallSpec) -> Limit:
    """Storage limits hold what is the call's own. What it writes to the host's directories is not in them: say so."""
    on_host = [path for path in manifest.filesystem.write if path.startswith("/")]
    if limit.control in ("disk", "inodes") and (on_host or call.workspace.mode == "rw"):
        return replace(limit, reason="private places only: in a writable host directory each file is bounded, not all")
    return limit


def _mechanism(limits: tuple[Limit, ...], control: str) -> str:
    return next((limit.mechanism for limit in limits if limit.control == control), "")


def _refuse_missing(
    manifest: Manifest,
    held: tuple[tuple[Limit, ...], Mapping[str, Control]],
    facts: HostFacts,
    launcher: tuple[dict[str, str], tuple[str, ...]],
) -> None:
    """Collect everything that does not hold here, and raise once with all of it.

    `launcher`: what is wrong with the launcher that was asked for, and what would help.
    """
    limits, table = held
    isolation = manifest.isolation
    missing: dict[str, str] = {}
    for limit in limits:
        strict = limit.control in isolation.required
        if limit.level == "full" or planner_gpu.is_acceptable(limit, manifest):
            continue
        if strict or limit.control not in isolation.best_effort:
            missing[limit.control] = f"{limit.level} here: {limit.reason or limit.mechanism}"
    if refusal := planner_egress.refusal(manifest, facts):
        missing["network"] = refusal
    gpu_refusal, gpu_fix = planner_gpu.refusal(manifest, facts)
    if gpu_refusal:
        missing["gpu"] = gpu_refusal
    missing |= launcher[0]
    if "landlock" in isolation.required and table["landlock"].level != "full":
        missing["landlock"] = table["landlock"].reason
    if manifest.process.allow_exec is not None:
        # Landlock can hold execve to a list, but a listed program's own loader (ld.so PROGRAM) maps any other.
        missing["process.allow_exec"] = "a list of programs can be got round by the dynamic loader on this kernel"
    if missing:
        fixes = [table[name].fix for name in missing if name in table and table[name].fix]
        names = [name for name in missing if name in table and name not in ("network", "gpu")]
        names += ["gpu"] if any(name.startswith("gpu_") for name in missing) else []
        hints = list(dict.fromkeys([*fixes, *launcher[1], *([gpu_fix] if gpu_fix else [])]))
        # Without a jail there is nothing to accept less of.
        if names and "processes" not in missing:
            options = " ".join(f"--best-effort {name}" for name in sorted({*names} - {*isolation.best_effort}))
            hints.append(f"or accept less: best_effort = {sorted({*isolation.best_effort, *names})}, {options}")
        by_reason: dict[str, list[str]] = {}
        for name, reason in missing.items():
            by_reason.setdefault(reason, []).append(name)
        text = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())
        raise Unenforceable(f"this host cannot enforce {text}", controls=missing, hint="; ".join(hints))


def _has_workspace(manifest: Manifest, call: CallSpec) -> bool:
    return bool(call.workspace.host_path) or ":workspace" in manifest.filesystem.write


def _view_steps(manifest: Manifest, call: CallSpec, around: Surroundings) -> tuple[Step, ...]:
    scratch = Step("scratch", "view", _scratch(manifest, call))
    steps = [
        Step("private_propagation", "view"),
        Step("new_root", "view", {"places": list(scratch.args["directories"])}),
        Step("etc_files", "view", {**_etc_files(manifest), "host_paths": list(ETC_PATHS)}),
        Step("devices", "view", {"nodes": list(DEVICE_NODES)}),
        # Before what may lie below a private place, such as an environment under /tmp.
        *(() if _is_general(manifest, call, around) else (scratch,)),
        Step(
            "system_view",
            "view",
            {
                "directories": list(SYSTEM_DIRECTORIES),
                "copied_files": list(COPIED_FILES),
                "python_paths": [list(pair) for pair in around.python_paths],
                "runtime_files": [list(pair) for pair in around.runtime_files],
            },
        ),
        *planner_http.steps(manifest),
        *_granted_steps(manifest, call, around),
        Step("proc_seed", "view"),
        Step("enter_root", "view"),
    ]
    return tuple(steps)


def _etc_files(manifest: Manifest) -> dict[str, Any]:
    return {"hostname": HOSTNAME, "home": HOME, "nameserver": planner_egress.nameserver(manifest)}


def _granted_steps(manifest: Manifest, call: CallSpec, around: Surroundings) -> tuple[Step, ...]:
    """What comes from the host by name, and what is denied of it."""
    outer = _grants(manifest, call, around, below_workspace=False)
    steps = [Step("grants", "view", {"paths": outer, "links": [list(pair) for pair in around.links]})]
    if call.workspace.host_path:
        steps.append(Step("workspace", "view", _workspace(call, around)))
        # The workspace would cover these: what is read-only below a writable workspace is mounted after it.
        steps.append(Step("inner_grants", "view", {"paths": _grants(manifest, call, around, below_workspace=True)}))
    return (*steps, Step("deny", "view", _denials(manifest, call, around)))


def _scratch(manifest: Manifest, call: CallSpec) -> dict[str, Any]:
    directories = dict(PRIVATE_PLACES)
    if _has_workspace(manifest, call) and not call.workspace.host_path:
        directories[call.workspace.jail_path] = "workspace"
    resources = manifest.resources
    return {"disk_bytes": resources.disk_bytes, "inodes": resources.inodes, "directories": directories}


def _is_general(manifest: Manifest, call: CallSpec, around: Surroundings) -> bool:
    """Whether the view holds nothing of this one call, so that it can be built before the call is known.

    With a granted path it is not: its deny rules and sockets are looked for when it is mounted, and a file that
    appears later would be missed.
    """
    below = tuple(f"{place}/" for place in PRIVATE_PLACES)
    shown = (*around.python_paths, *around.runtime_files)
    return not (
        _granted_paths(manifest)
        or call.workspace.host_path
        or any(f"{jail_path}/".startswith(below) for _, jail_path in shown)
    )


def _template(manifest: Manifest, call: CallSpec, around: Surroundings) -> dict[str, Any] | None:
    """A function's template imports with the call's own environment; a program's has neither imports nor any of it."""
    if call.tty or call.is_single or not manifest.process.warm or not _is_general(manifest, call, around):
        return None
    if call.kind == "program":
        return {"function": False}
    env = _environment(manifest, call, around)
    python, preload = call.argv[0], list(call.preload)
    return {"function": True, "python": python, "env": env, "cwd": _directory(manifest, call), "preload": preload}


def _directory(manifest: Manifest, call: CallSpec) -> str:
    """Where the call starts."""
    return call.cwd or (call.workspace.jail_path if _has_workspace(manifest, call) else HOME)


def _granted_paths(manifest: Manifest) -> dict[str, str]:
    """Host path -> access; write implies read."""
    granted = {path: "read" for path in manifest.filesystem.read if path.startswith("/")}
    granted.update({path: "write" for path in manifest.filesystem.write if path.startswith("/")})
    return granted


def _grants(manifest: Manifest, call: CallSpec, around: Surroundings, *, below_workspace: bool) -> list[dict[str, Any]]:
    """What is mounted from the host, with the inode that was seen; those below the workspace, or all others."""
    root = call.workspace.host_path
    granted = _own_code(manifest, call, around) | _granted_paths(manifest)
    return [
        {
            "host_path": path,
            "jail_path": path,
            "access": access,
            "dev": around.paths[path].dev,
            "ino": around.paths[path].ino,
        }
        for path, access in sorted(granted.items())
        if path in around.paths and (bool(root) and path.startswith(f"{root}/")) == below_workspace
    ]


def _own_code(manifest: Manifest, call: CallSpec, around: Surroundings) -> dict[str, str]:
    """The interpreter's and our own files, read-only wherever a grant makes the directory around them writable.

    They run outside, as the caller and as the supervisor: who may write them is out of the jail with the next start.
    """
    trees = tuple(f"{tree}/" for tree in _writable_trees(manifest, call))
    return {path: "read" for path in around.own_code if path.startswith(trees)}


def _workspace(call: CallSpec, around: Surroundings) -> dict[str, Any]:
    workspace = call.workspace
    args: dict[str, Any] = {"mode": workspace.mode, "jail_path": workspace.jail_path}
    if workspace.host_path:
        fact = around.paths[workspace.host_path]
        args |= {"host_path": workspace.host_path, "dev": fact.dev, "ino": fact.ino}
        args["protected"] = list(around.protected) if workspace.mode == "rw" else []
    return args


def _denials(manifest: Manifest, call: CallSpec, around: Surroundings) -> dict[str, Any]:
    deny = manifest.filesystem.deny
    literal = [path for path in deny if path.startswith("/") and not any(char in path for char in "*?[")]
    patterns = [path for path in deny if path not in literal]
    trees = sorted(path for path in _granted_paths(manifest) if path in around.paths)
    if call.workspace.host_path:
        trees.append(call.workspace.jail_path)
    return {
        "paths": [*literal, *around.hidden],
        "patterns": patterns,
        "trees": trees,
        "writable": _writable_trees(manifest, call),
        "pinned": sorted({*manifest.filesystem.read, *_own_code(manifest, call, around)}),
        "entries_max": DENY_ENTRIES_MAX,
    }


def _writable_trees(manifest: Manifest, call: CallSpec) -> list[str]:
    """Host directories in which the jail may rename things."""
    trees = [path for path, access in _granted_paths(manifest).items() if access == "write"]
    if call.workspace.host_path and call.workspace.mode != "ro":
        trees.append(call.workspace.jail_path)
    return sorted(trees)


def _call_steps(
    manifest: Manifest, call: CallSpec, facts: HostFacts, around: Surroundings, limits: tuple[Limit, ...]
) -> tuple[Step, ...]:
    steps = [
        *((Step("scratch", "call", _scratch(manifest, call)),) if _is_general(manifest, call, around) else ()),
        Step("proc", "call", _proc(manifest)),
        Step("terminals", "call", _terminal(call, around)),
        Step("namespaces", "call"),
        Step("user_limits", "call", dict(USER_LIMITS)),
        Step("queues", "call"),
        Step("loopback", "call"),
        *planner_egress.steps(manifest, facts),
        Step("hostname", "call", {"name": HOSTNAME}),
        Step("keyring", "call"),
    ]
    if _mechanism(limits, "cpus") == "cpu affinity":
        steps.append(Step("affinity", "call", {"cores": max(1, math.ceil(manifest.resources.cpus))}))
    steps += [Step("capabilities", "call"), Step("no_new_privs", "call")]
    if facts.landlock_abi:
        rules = _landlock_rules(manifest, call)
        steps.append(Step("landlock", "call", {"abi": facts.landlock_abi, "rules": rules}))
    # Open files are limited when nothing is opened any more: the steps themselves may need more than the tool.
    steps += [Step("close_fds", "call"), Step("rlimits", "call", _rlimits(manifest, limits)), Step("seccomp", "call")]
    return tuple(steps)


def _terminal(call: CallSpec, around: Surroundings) -> dict[str, Any]:
    return {"tty": call.tty, "rows": around.terminal_rows, "columns": around.terminal_columns}


def _proc(manifest: Manifest) -> dict[str, Any]:
    masked = PROC_MASKED if planner_gpu.is_on(manifest) else (*PROC_MASKED, PROC_DRIVER)
    return {"masked": list(masked), "read_only": [name for name in PROC_READ_ONLY if name not in masked]}


def _rlimits(manifest: Manifest, limits: tuple[Limit, ...]) -> dict[str, int]:
    resources = manifest.resources
    rlimits = {
        # Not 0: with a pipe in core_pattern that limit is ignored and the host's crash handler runs, as root, on what
        # the tool left for it. 1 alone makes the kernel drop the core (fs/coredump.c).
        "CORE": 1,
        "NOFILE": resources.open_files,
        # A page more than there is room for: in private places the tool is told ENOSPC, not killed by SIGXFSZ.
        "FSIZE": resources.disk_bytes + 4096,
        "MEMLOCK": 8 << 20,
        "RTPRIO": 0,
        "NICE": 0,
    }
    if _mechanism(limits, "pids").startswith("rlimit"):
        # pid 1 is counted with the tool's tasks.
        rlimits["NPROC"] = resources.pids + 1
    if resources.cpu_time_s is not None:
        # A second wall for a single process; the account over all of them is the supervisor's.
        rlimits["CPU"] = math.ceil(resources.cpu_time_s) + 1
    return rlimits


def _landlock_rules(manifest: Manifest, call: CallSpec) -> list[list[Any]]:
    """[path, accesses]: what the mounts grant, said a second time."""
    writable = ["read", "exec", "write"]
    rules: list[list[Any]] = [["/", ["read", "exec"]], ["/dev", ["write", "ioctl"]], ["/proc", ["write"]]]
    rules += [[path, writable] for path in (*PRIVATE_PLACES, "/dev/mqueue")]
    rules += [[path, writable] for path, access in _granted_paths(manifest).items() if access == "write"]
    if _has_workspace(manifest, call) and call.workspace.mode != "ro":
        rules.append([call.workspace.jail_path, writable])
    return rules


def _environment(
    manifest: Manifest, call: CallSpec, around: Surroundings, *, own_search: bool = True
) -> dict[str, str]:
    """`own_search`: the caller's interpreter is in sight, so PATH begins with where it lies."""
    search = [
        *(around.search_path if own_search else ()),
        "/usr/local/bin",
        "/usr/bin",
        "/bin",
        "/usr/local/sbin",
        "/usr/sbin",
        "/sbin",
    ]
    env = {
        "HOME": HOME,
        "LANG": "C.UTF-8",
        "LOGNAME": "user",
        "PATH": ":".join(dict.fromkeys(search)),
        "PWD": call.cwd or "",
        "SHELL": "/bin/sh",
        "USER": "user",
    }
    if not env["PWD"]:
        del env["PWD"]
    if call.tty:
        env["TERM"] = "xterm-256color"
    env |= planner_http.environment(manifest)
    return {**env, **around.caller_env, **manifest.environment.set, **around.extra_env}
