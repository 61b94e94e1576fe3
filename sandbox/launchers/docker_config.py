"""From a plan to what Docker's `create` is told. Pure: nothing is asked of a daemon, nothing of the SDK is loaded.

Source: Docker Engine API v1.41, ContainerCreate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandbox.launchers import gate
from sandbox.launchers.oci_declared import RUNSC_TASKS
from sandbox.plan import LaunchPlan

LABEL: Final = "toolcall-sandbox"
OWNER: Final = f"{LABEL}.owner"
WHERE: Final = f"{LABEL}.where"
# Images for CUDA name all GPUs here, and a daemon whose usual runtime is NVIDIA's gives them what they name. The tool's
# own environment is made anew at the gate.
NO_DEVICES: Final = ("NVIDIA_VISIBLE_DEVICES=void",)
# Docker needs a moment's memory of its own to start anything (its documentation says 6 MiB at least).
MEMORY_MIN_BYTES: Final = 6 << 20
# Of /sys, a container shows the machine's hardware. What remains says how many processors there are and the
# container's own cgroup, which runtimes of languages look for.
SYS_MASKED: Final = ("block", "bus", "class", "dev", "firmware", "fs/bpf", "hypervisor", "kernel", "module", "power")
# Runtimes with a kernel of their own inside.
OWN_KERNEL: Final = ("runsc",)
_ULIMITS: Final = {"CORE": "core", "NOFILE": "nofile", "FSIZE": "fsize", "MEMLOCK": "memlock", "CPU": "cpu"}


# A container's own runtime takes on the limit before it is done, and needs more; the gate lowers it.
ROOM_FILES: Final = 256


@dataclass(frozen=True)
class Wanted:
    """One container: its plan, and what is its own. `gate_path`, `uid`: on the host. `volumes`: of the image.

    `disks`: paths of the host's disks, any of which may lie behind an image.
    """

    plan: LaunchPlan
    gate_path: str
    uid: int
    seccomp: Mapping[str, Any]
    labels: Mapping[str, str]
    cgroup_parent: str = ""
    volumes: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()


def create_body(wanted: Wanted) -> dict[str, Any]:
    """The JSON body of ContainerCreate."""
    plan = wanted.plan
    container = step(plan, "container")
    return {
        "Image": container["image_id"],
        "Entrypoint": list(gate.COMMAND),
        "Cmd": [],
        "User": f"{wanted.uid}:{wanted.uid}",
        "Hostname": step(plan, "hostname")["name"],
        "WorkingDir": "/",
        "Env": list(NO_DEVICES),
        "Labels": dict(wanted.labels),
        "NetworkDisabled": True,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": _host_config(wanted, container),
    }


def _host_config(wanted: Wanted, container: Mapping[str, Any]) -> dict[str, Any]:
    plan, runtime = wanted.plan, container["runtime"]
    proc = step(plan, "proc")
    return {
        "NetworkMode": "none",
        "IpcMode": "private",
        "CgroupnsMode": "private",
        "CapDrop": ["ALL"],
        "SecurityOpt": ["no-new-privileges", f"seccomp={json.dumps(wanted.seccomp)}"],
        "ReadonlyRootfs": True,
        "Privileged": False,
        # With a terminal it is the gate's shell that leads the session, as its first process, and collects the dead.
        "Init": not step(plan, "terminals"),
        "RestartPolicy": {"Name": "no"},
        "LogConfig": {"Type": "none"},
        "MaskedPaths": [*(f"/proc/{name}" for name in proc["masked"]), *(f"/sys/{name}" for name in SYS_MASKED)],
        "ReadonlyPaths": [f"/proc/{name}" for name in proc["read_only"]],
        "Mounts": [bind(source, target) for source, target in mounts(wanted)],
        "Ulimits": _ulimits(plan),
        **_limits(plan),
        **_io_limits(wanted),
        **_devices(container.get("devices", ())),
        **({"CgroupParent": wanted.cgroup_parent} if wanted.cgroup_parent else {}),
        **({"Runtime": runtime} if runtime else {}),
    }


def _limits(plan: LaunchPlan) -> dict[str, int]:
    found: dict[str, int] = {}
    if (memory := _applied(plan, "memory")) is not None:
        # Memory and swap together: no more is to be had by swapping.
        found["Memory"] = found["MemorySwap"] = max(MEMORY_MIN_BYTES, int(memory))
    if (pids := _applied(plan, "pids")) is not None:
        # Its init or the shell is counted with the tool's tasks, and so is a kernel of its own.
        found["PidsLimit"] = int(pids) + 1 + own_tasks(step(plan, "container")["runtime"])
    if (cpus := _applied(plan, "cpus")) is not None:
        found["NanoCpus"] = round(cpus * 1_000_000_000)
    return found


def _devices(names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Devices by the names of the Container Device Interface: the engine makes of them what their vendor wrote down."""
    return {"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": list(names)}]} if names else {}


def _io_limits(wanted: Wanted) -> dict[str, list[dict[str, Any]]]:
    rate = _applied(wanted.plan, "io")
    if rate is None:
        return {}
    devices = [{"Path": path, "Rate": int(rate)} for path in wanted.disks]
    return {"BlkioDeviceReadBps": devices, "BlkioDeviceWriteBps": devices}


def _applied(plan: LaunchPlan, control: str) -> float | None:
    limit = plan.limit(control)
    return float(limit.applied) if limit is not None and isinstance(limit.applied, int | float) else None


def _ulimits(plan: LaunchPlan) -> list[dict[str, Any]]:
    asked = dict(step(plan, "rlimits"))
    asked["NOFILE"] = max(asked["NOFILE"], ROOM_FILES)
    return [{"Name": _ULIMITS[name], "Soft": value, "Hard": value} for name, value in asked.items() if name in _ULIMITS]


def own_tasks(runtime: str) -> int:
    """How many tasks of the runtime's own are counted with the tool's."""
    return RUNSC_TASKS if runtime in OWN_KERNEL else 0


def own_mounts(wanted: Wanted) -> list[tuple[str, str]]:
    """(host path, path inside), all read-only: the gate, what functions need, files of /etc, and covered volumes."""
    base = wanted.gate_path
    found = {gate.AT: base}
    found |= {inside: source for source, inside in step(wanted.plan, "system_view")["runtime_files"]}
    found |= {f"/etc/{name}": f"{base}/etc/{name}" for name in ETC}
    found |= dict.fromkeys(wanted.volumes, f"{base}/{gate.EMPTY}")
    return [(source, target) for target, source in found.items()]


def mounts(wanted: Wanted) -> list[tuple[str, str]]:
    """(host path, path inside), all read-only: our own, and places for what is mounted later.

    A place is an empty directory or file of ours: the image's root is read-only, so only the engine can make it.
    """
    plan, base = wanted.plan, wanted.gate_path
    found = {target: source for source, target in own_mounts(wanted)}
    places = [path for path in step(plan, "scratch")["directories"] if path != "/dev/shm"]  # noqa: S108 - inside
    granted = outermost([path for path, _ in granted_places(plan)])
    directories = dict(granted_places(plan))
    for path in places:
        found[path] = f"{base}/{gate.EMPTY}"
    for path in granted:
        if any(path.startswith(f"{place}/") for place in step(plan, "scratch")["directories"]):
            continue  # made when that place is there, which no engine has seen
        found[path] = f"{base}/{gate.EMPTY if directories[path] else gate.NOTHING}"
    return [(source, target) for target, source in found.items()]


ETC: Final = ("passwd", "group", "hosts", "hostname", "resolv.conf", "nsswitch.conf", "machine-id")


def granted_places(plan: LaunchPlan) -> list[tuple[str, bool]]:
    """(path inside, whether it is a directory) of everything that comes from the host."""
    found = [
        (grant["jail_path"], bool(grant["is_directory"]))
        for name in ("grants", "inner_grants")
        for grant in step(plan, name).get("paths", ())
    ]
    workspace = step(plan, "workspace")
    return found + ([(workspace["jail_path"], True)] if workspace.get("host_path") else [])


def outermost(paths: Sequence[str]) -> list[str]:
    """Those that lie below no other: what lies below another comes with it, and has its place there."""
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]


def step(plan: LaunchPlan, name: str) -> Mapping[str, Any]:
    """The arguments of a step; empty when the plan has no such step."""
    return next((step.args for step in plan.steps if step.name == name), {})


def bind(source: str, target: str, *, read_only: bool = True) -> dict[str, Any]:
    """One mount, with all that is mounted below it. Nothing mounted there later travels in or out."""
    options = {"Propagation": "rprivate"}
    return {"Type": "bind", "Source": source, "Target": target, "ReadOnly": read_only, "BindOptions": options}
