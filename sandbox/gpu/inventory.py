"""What this host has of GPUs, as `GpuFacts`: devices and slices, their nodes, the driver's files.

Reads NVML, /dev and /proc/driver/nvidia; changes nothing. Source: the NVML API reference, the driver's README
("Device files", "MIG capabilities"), nvidia-container-toolkit for which files a container needs.
"""

from __future__ import annotations

import glob
import os
import stat
from dataclasses import asdict
from typing import Any

from sandbox._linux import libraries
from sandbox.gpu.facts import GpuFacts, GpuNode, GpuUnit
from sandbox.gpu.nvml import FIXES, LIBRARY, Nvml, NvmlTrouble
from sandbox.host.facts import Feature

# The inode of the first pid namespace's file, the same on every kernel (PROC_PID_INIT_INO).
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
CONTROL_NODES = ("nvidiactl", "nvidia-uvm")
# What programs load of the driver; the tools and the X server's parts stay out.
LIBRARY_NAMES = ("libcuda.so*", "libnvidia-*.so*", "libcudadebugger.so*", "libnvcuvid.so*", "libnvoptix.so*")
SYSTEM_DIRECTORIES = ("/usr/", "/lib/", "/lib32/", "/lib64/", "/bin/", "/sbin/")
_MEMORY_LIMITS_DRIVER = 615


class Places:
    """Where the nodes and the driver's files are; other than the host's own in tests."""

    def __init__(self, dev: str = "/dev", proc: str = "/proc") -> None:
        self.dev = dev
        self.proc = proc


def find(places: Places | None = None) -> dict[str, Any] | None:
    """The facts as JSON data; None on a host without any sign of an NVIDIA GPU."""
    places = places or Places()
    if not any(name.startswith("nvidia") for name in os.listdir(places.dev)):
        return None
    try:
        nvml = Nvml.open()
    except NvmlTrouble as trouble:
        return asdict(GpuFacts(trouble=trouble.name, fix=FIXES.get(trouble.name, "")))
    try:
        return asdict(describe(nvml, places))
    except NvmlTrouble as trouble:
        return asdict(GpuFacts(trouble=f"{trouble.name} ({trouble.function})", fix=FIXES.get(trouble.name, "")))
    finally:
        nvml.close()


def describe(nvml: Nvml, places: Places) -> GpuFacts:
    """Everything that can be known beforehand. Raises NvmlTrouble when the driver as a whole does not answer."""
    driver = str(nvml.must("nvmlSystemGetDriverVersion"))
    units: list[GpuUnit] = []
    lost: list[str] = []
    limits = "no GPU answers"
    for index in range(int(nvml.must("nvmlDeviceGetCount"))):
        try:
            handle = nvml.must("nvmlDeviceGetHandleByIndex", index)
            units += _units(nvml, handle, index, places)
            limits = nvml.has_memory_limits(handle)
        except NvmlTrouble as trouble:
            # The others can still be used; this one is shown with the reason.
            lost.append(f"GPU {index}: {trouble.name}")
    control = [node for name in CONTROL_NODES if (node := find_node(places, name)) is not None]
    missing = [name for name in CONTROL_NODES if name not in {node.name for node in control}]
    return GpuFacts(
        driver=driver,
        trouble=f"/dev/{missing[0]} is missing" if missing else ("no GPU answers" if not units else ""),
        fix="sudo nvidia-modprobe -u -c=0" if missing else "",
        units=tuple(units),
        control_nodes=tuple(control),
        libraries=_libraries(),
        pids=_pids(places),
        memory_limits=_memory_limits(driver, limits),
        unknown=(*lost, *(f"{function}: {name}" for function, name in sorted(nvml.unknown.items()))),
    )


def _units(nvml: Nvml, handle: Any, index: int, places: Places) -> list[GpuUnit]:
    minor = nvml.maybe("nvmlDeviceGetMinorNumber", handle)
    node = find_node(places, f"nvidia{minor if minor is not None else index}")
    nodes = (node,) if node is not None else ()
    uuid = str(nvml.must("nvmlDeviceGetUUID", handle))
    name = str(nvml.must("nvmlDeviceGetName", handle))
    mode = nvml.maybe("nvmlDeviceGetMigMode", handle)
    if mode is not None and mode[0]:
        # With MIG on, programs can use the slices and not the whole.
        return _slices(nvml, handle, GpuUnit(uuid, str(index), name, nodes=nodes), places)
    memory = nvml.maybe("nvmlDeviceGetMemoryInfo", handle)
    # Only root may set it.
    power = nvml.maybe("nvmlDeviceGetPowerManagementLimitConstraints", handle) if os.geteuid() == 0 else None
    return [
        GpuUnit(
            uuid=uuid,
            index=str(index),
            name=name,
            memory_bytes=int(memory.total) if memory is not None else None,
            power_mw=(int(power[0]), int(power[1])) if power is not None else None,
            energy=nvml.maybe("nvmlDeviceGetTotalEnergyConsumption", handle) is not None,
            nodes=nodes,
        )
    ]


def _slices(nvml: Nvml, handle: Any, whole: GpuUnit, places: Places) -> list[GpuUnit]:
    count = int(nvml.must("nvmlDeviceGetMaxMigDeviceCount", handle))
    energy = nvml.maybe("nvmlDeviceGetTotalEnergyConsumption", handle) is not None
    found = []
    for number in range(8):
        try:
            part = nvml.must("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
        except NvmlTrouble as trouble:
            if trouble.name in ("NOT_FOUND", "INVALID_ARGUMENT"):
                continue  # no slice has this number
            raise
        attributes = nvml.maybe("nvmlDeviceGetAttributes", part)
        share = attributes.computeInstanceSliceCount if attributes is not None else None
        caps = _capability_nodes(nvml, part, whole, places)
        found.append(
            GpuUnit(
                uuid=str(nvml.must("nvmlDeviceGetUUID", part)),
                index=f"{whole.index}:{number}",
                name=whole.name,
                parent=whole.uuid,
                memory_bytes=attributes.memorySizeMB << 20 if attributes is not None else None,
                sm_percent=-(-100 * share // count) if share is not None and count else None,
                energy=energy,
                nodes=(*whole.nodes, *caps),
            )
        )
    return found


def _capability_nodes(nvml: Nvml, part: Any, whole: GpuUnit, places: Places) -> list[GpuNode]:
    """The two nodes under /dev/nvidia-caps that open one slice: of its GPU instance and of its compute instance."""
    gi = nvml.maybe("nvmlDeviceGetGpuInstanceId", part)
    ci = nvml.maybe("nvmlDeviceGetComputeInstanceId", part)
    if gi is None or ci is None or not whole.nodes:
        return []
    base = f"{places.proc}/driver/nvidia/capabilities/gpu{whole.nodes[0].minor}/mig/gi{gi}"
    found = []
    for path in (f"{base}/access", f"{base}/ci{ci}/access"):
        minor = _capability_minor(path)
        node = find_node(places, f"nvidia-caps/nvidia-cap{minor}", "r") if minor is not None else None
        if node is not None:
            found.append(node)
    return found


def _capability_minor(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            pairs = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return None
    return int(pairs["DeviceFileMinor"]) if "DeviceFileMinor" in pairs else None


def find_node(places: Places, name: str, accesses: str = "rw") -> GpuNode | None:
    """The character device of that name below /dev; None when it is not there."""
    try:
        info = os.stat(f"{places.dev}/{name}")
    except OSError:
        return None
    if not stat.S_ISCHR(info.st_mode):
        return None
    needed = (4 if "r" in accesses else 0) | (2 if "w" in accesses else 0)
    if os.geteuid() == 0:
        # A jail's uid is nobody's: what counts is what the mode gives to all.
        usable = info.st_mode & needed == needed
    else:
        usable = os.access(f"{places.dev}/{name}", needed)
    return GpuNode(name, os.major(info.st_rdev), os.minor(info.st_rdev), accesses, usable)


def _libraries() -> tuple[tuple[str, str], ...]:
    """The driver's libraries where they lie outside the system's directories, which every jail sees anyway."""
    path = libraries.loaded_path(LIBRARY.partition(".so")[0])
    if not path or path.startswith(SYSTEM_DIRECTORIES):
        return ()
    directory = os.path.dirname(path)
    found = {name for pattern in LIBRARY_NAMES for name in glob.glob(f"{directory}/{pattern}")}
    return tuple((os.path.realpath(name), name) for name in sorted(found) if os.path.isfile(name))


def _pids(places: Places) -> Feature:
    """NVML lists processes by their pids in the first pid namespace: elsewhere they mean nothing, or someone else."""
    try:
        inode = os.stat(f"{places.proc}/self/ns/pid").st_ino
    except OSError as error:
        return Feature(False, f"the pid namespace cannot be told: {error}")
    if inode == INITIAL_PID_NAMESPACE:
        return Feature(True)
    reason = "the supervisor runs in a pid namespace of its own, where NVML's process ids cannot be mapped to calls"
    return Feature(
        False, reason, "run outside the container, or start it in the host's pid namespace (docker: --pid=host)"
    )


def _memory_limits(driver: str, limits: str) -> Feature:
    """Whether the driver limits a cgroup's memory: r615, root, and the version 2 tree at its usual place."""
    major = driver.partition(".")[0]
    if not major.isdigit() or int(major) < _MEMORY_LIMITS_DRIVER:
        return Feature(False, f"driver {driver} is older than {_MEMORY_LIMITS_DRIVER}")
    if limits:
        return Feature(False, f"the driver's memory limits do not answer: {limits}")
    if os.geteuid() != 0:
        return Feature(False, "the driver takes memory limits from root only")
    if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return Feature(False, "the driver wants cgroup version 2 at /sys/fs/cgroup")
    return Feature(True)
