"""The unchanged `nvidia-ml-py` over a stand-in library, in child processes: layouts, errors by name, unknown as None.

What this shows is that we read NVML's interface right. It says nothing about how a driver behaves.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import nvml

pytestmark = [pytest.mark.needs("gcc", "python:pynvml")]

ROOT = str(Path(nvml.__file__).resolve().parents[2])


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nvml")
    nvml.build(directory)
    return directory


@pytest.fixture
def world(tmp_path: Path) -> nvml.Scenario:
    return nvml.Scenario(tmp_path / "scenario").device(0).device(1, used=9000, sm=40, mem=10, pcie=300).write()


def ask(library: Path, world: nvml.Scenario, source: str) -> Any:
    """Run the source in a process that finds the stand-in; its `found` comes back as JSON."""
    code = f"import sys; sys.path.insert(0, {ROOT!r})\n{textwrap.dedent(source)}\nimport json; print(json.dumps(found))"
    env = {**os.environ, "LD_LIBRARY_PATH": str(library), "NVML_STANDIN_SCENARIO": str(world.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


OPEN = "from sandbox.gpu.nvml import Nvml, NvmlTrouble; nvml = Nvml.open()\n"


def test_layouts_are_those_of_the_binding() -> None:
    """The C side asserts the same numbers when it is compiled."""
    import pynvml

    sizes = {
        "c_nvmlMemory_t": 24,
        "c_nvmlMemory_v2_t": 40,
        "c_nvmlUtilization_t": 8,
        "c_nvmlProcessInfo_v3_t": 24,
        "c_nvmlProcessUtilizationSample_t": 32,
        "c_nvmlDeviceAttributes": 40,
        "nvmlPciInfo_t": 68,
        "c_nvmlSetMemoryLimits_v1_t": 24,
        "c_nvmlGetMemoryLimits_v1_t": 32,
    }
    there = {name: ctypes.sizeof(getattr(pynvml, name)) for name in sizes if hasattr(pynvml, name)}
    assert there == {name: size for name, size in sizes.items() if name in there}
    assert len(there) >= 6
    source = nvml.SOURCE.read_text()
    for size in sizes.values():
        assert f"== {size}" in source, f"the stand-in does not assert {size}"


def test_values_come_through_the_binding(library: Path, world: nvml.Scenario) -> None:
    world.process(1, 4242, 700, sm=30).process(1, 4343, -1, type="G").process(1, 4242, 650, type="G").write()
    source = """
    import pynvml
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 1)
    found = {
        "driver": nvml.must("nvmlSystemGetDriverVersion"),
        "count": nvml.must("nvmlDeviceGetCount"),
        "uuid": nvml.must("nvmlDeviceGetUUID", handle),
        "used": nvml.must("nvmlDeviceGetMemoryInfo", handle).used >> 20,
        "used_v2": pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used >> 20,
        "sm": nvml.must("nvmlDeviceGetUtilizationRates", handle).gpu,
        "processes": sorted(nvml.processes(handle).items()),
        "process_sm": sorted(sample[::2] for sample in nvml.utilisation_of_processes(handle, 0)),
        "by_uuid": nvml.must("nvmlDeviceGetIndex", nvml.must("nvmlDeviceGetHandleByUUID", "GPU-standin-1")),
        "pci": nvml.must("nvmlDeviceGetPciInfo", handle).busId,
    }
    """
    assert ask(library, world, OPEN + textwrap.dedent(source)) == {
        "driver": "575.57.08",
        "count": 2,
        "uuid": "GPU-standin-1",
        "used": 9000,
        "used_v2": 9000,
        "sm": 40,
        "processes": [[4242, 700 << 20], [4343, None]],
        "process_sm": [[4242, 0], [4242, 30], [4343, 0]],
        "by_uuid": 1,
        "pci": "00000000:02:00.0",
    }


@pytest.mark.parametrize(
    ("code", "name", "hint"),
    [
        (9, "DRIVER_NOT_LOADED", "modprobe nvidia"),
        (18, "LIB_RM_VERSION_MISMATCH", "upgraded"),
        (4, "NO_PERMISSION", "root"),
        (999, "UNKNOWN", ""),
    ],
)
def test_trouble_at_the_start_has_its_name(
    library: Path, world: nvml.Scenario, code: int, name: str, hint: str
) -> None:
    world.fail("nvmlInitWithFlags", code).write()
    source = """
    from sandbox.gpu.nvml import Nvml, NvmlTrouble
    try:
        Nvml.open(); found = "opened"
    except NvmlTrouble as trouble:
        found = [trouble.name, trouble.function, trouble.hint]
    """
    found = ask(library, world, source)
    assert found[:2] == [name, "nvmlInit"]
    assert hint in found[2]


def test_a_missing_library_and_a_missing_binding_are_told_apart(tmp_path: Path, world: nvml.Scenario) -> None:
    source = """
    import sys
    from sandbox.gpu.nvml import Nvml, NvmlTrouble
    found = []
    for hide in (False, True):
        if hide:
            sys.modules["pynvml"] = None
        try:
            Nvml.open(); found.append("opened")
        except NvmlTrouble as trouble:
            found.append([trouble.name, trouble.hint.split()[0]])
    """
    found = ask(tmp_path, world, source)
    if found[0] == "opened":
        pytest.skip("this host has the real library")
    assert found == [["LIBRARY_NOT_FOUND", "install"], ["BINDING_NOT_FOUND", "pip"]]


@pytest.mark.parametrize(("code", "name"), [(3, "NOT_SUPPORTED"), (4, "NO_PERMISSION"), (21, "NO_DATA")])
def test_what_is_not_answered_is_unknown_and_never_zero(
    library: Path, world: nvml.Scenario, code: int, name: str
) -> None:
    for function in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetUtilizationRates", "nvmlDeviceGetProcessUtilization"):
        world.fail(function, code)
    for kind in ("Compute", "Graphics", "MPSCompute"):
        world.fail(f"nvmlDeviceGet{kind}RunningProcesses_v3", code)
    world.write()
    source = """
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 0)
    found = [nvml.maybe("nvmlDeviceGetPowerUsage", handle), nvml.maybe("nvmlDeviceGetUtilizationRates", handle),
             nvml.processes(handle), nvml.utilisation_of_processes(handle, 0), nvml.unknown]
    """
    *values, unknown = ask(library, world, OPEN + textwrap.dedent(source))
    assert values == [None, None, None, None]
    assert unknown["nvmlDeviceGetPowerUsage"] == name


@pytest.mark.parametrize(
    ("code", "name", "lost"), [(15, "GPU_IS_LOST", True), (16, "RESET_REQUIRED", True), (10, "TIMEOUT", False)]
)
def test_trouble_in_between_is_raised_by_name(
    library: Path, world: nvml.Scenario, code: int, name: str, lost: bool
) -> None:
    world.fail("nvmlDeviceGetMemoryInfo", code).write()
    source = """
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 0)
    try:
        found = nvml.maybe("nvmlDeviceGetMemoryInfo", handle)
    except NvmlTrouble as trouble:
        found = [trouble.name, trouble.is_lost]
    """
    assert ask(library, world, OPEN + textwrap.dedent(source)) == [name, lost]


def test_no_samples_are_an_empty_list(library: Path, world: nvml.Scenario) -> None:
    """The driver says NOT_FOUND when no process used the device: that is an answer."""
    source = """
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 0)
    found = [nvml.utilisation_of_processes(handle, 0), nvml.processes(handle)]
    """
    assert ask(library, world, OPEN + textwrap.dedent(source)) == [[], {}]


def test_a_function_that_the_library_lacks_is_unknown(library: Path, world: nvml.Scenario) -> None:
    source = """
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 0)
    found = [nvml.maybe("nvmlDeviceGetTemperature", handle, 0), nvml.maybe("nvmlNoSuchFunction"), nvml.unknown]
    """
    found = ask(library, world, OPEN + textwrap.dedent(source))
    assert found[:2] == [None, None]
    assert set(found[2].values()) == {"FUNCTION_NOT_FOUND"}


INVENTORY = """
import os
from dataclasses import asdict
from sandbox.gpu import inventory
from sandbox.gpu.nvml import Nvml
place = os.environ["NVML_STANDIN_SCENARIO"].rpartition("/")[0]
found = inventory.find(inventory.Places(place + "/dev", place + "/proc"))
"""


def places(world: nvml.Scenario) -> Path:
    """A /dev and a /proc to be looked at. Character devices can be made by root only."""
    dev, proc = world.path.parent / "dev", world.path.parent / "proc"
    (dev / "nvidia-caps").mkdir(parents=True)
    numbers = {"nvidia0": (195, 0), "nvidia1": (195, 1), "nvidiactl": (195, 255), "nvidia-uvm": (510, 0)}
    old = os.umask(0)
    for name, (major, minor) in numbers.items():
        os.mknod(dev / name, 0o020666, os.makedev(major, minor))
    for gi, minors in ((1, (12, 13)), (2, (21, 22))):
        for minor in minors:
            os.mknod(dev / f"nvidia-caps/nvidia-cap{minor}", 0o020444, os.makedev(237, minor))
        base = proc / f"driver/nvidia/capabilities/gpu1/mig/gi{gi}"
        (base / "ci0").mkdir(parents=True)
        (base / "access").write_text(f"DeviceFileMinor: {minors[0]}\nDeviceFileMode: 292\n")
        (base / "ci0/access").write_text(f"DeviceFileMinor: {minors[1]}\nDeviceFileMode: 292\n")
    os.umask(old)
    (proc / "self/ns").mkdir(parents=True)
    (proc / "self/ns/pid").symlink_to("/proc/self/ns/pid")
    return dev


@pytest.mark.needs("root")
def test_the_inventory_finds_devices_slices_and_their_nodes(library: Path, world: nvml.Scenario) -> None:
    world.devices.clear()
    world.device(0).device(1, mig=1).slice(1, 0, slices=1, total=4864).slice(1, 1, slices=3, total=20096).write()
    places(world)
    found = ask(library, world, INVENTORY)
    assert (found["trouble"], found["driver"]) == ("", "575.57.08")
    whole, small, large = found["units"]
    assert (whole["index"], whole["uuid"], whole["sm_percent"]) == ("0", "GPU-standin-0", 100)
    assert (whole["power_mw"], whole["energy"]) == ([100000, 400000], True)
    assert [node["name"] for node in whole["nodes"]] == ["nvidia0"]
    assert (small["index"], small["parent"], small["sm_percent"]) == ("1:0", "GPU-standin-1", 15)
    assert (large["memory_bytes"], large["sm_percent"]) == (20096 << 20, 43)
    names = [(node["name"], node["minor"], node["accesses"], node["usable"]) for node in large["nodes"]]
    assert names == [
        ("nvidia1", 1, "rw", True),
        ("nvidia-caps/nvidia-cap21", 21, "r", True),
        ("nvidia-caps/nvidia-cap22", 22, "r", True),
    ]
    assert [node["name"] for node in found["control_nodes"]] == ["nvidiactl", "nvidia-uvm"]
    assert found["libraries"] == [[str(library / nvml.LIBRARY)] * 2]
    assert found["memory_limits"]["reason"] == "driver 575.57.08 is older than 615"


@pytest.mark.needs("root")
@pytest.mark.parametrize(
    ("change", "trouble", "fix"),
    [
        (lambda world, dev: (dev / "nvidia-uvm").unlink(), "/dev/nvidia-uvm is missing", "nvidia-modprobe"),
        (lambda world, dev: world.fail("nvmlInitWithFlags", 18), "LIB_RM_VERSION_MISMATCH", "reload"),
        (lambda world, dev: world.fail("nvmlDeviceGetUUID", 15), "no GPU answers", ""),
        (lambda world, dev: world.fail("nvmlDeviceGetCount_v2", 999), "UNKNOWN (nvmlDeviceGetCount)", ""),
    ],
)
def test_the_inventory_names_what_stands_in_the_way(
    library: Path, world: nvml.Scenario, change: Any, trouble: str, fix: str
) -> None:
    change(world, places(world))
    world.write()
    found = ask(library, world, INVENTORY)
    assert found["trouble"] == trouble
    assert fix in found["fix"]


@pytest.mark.needs("root")
def test_one_lost_gpu_does_not_take_the_others_away(library: Path, world: nvml.Scenario) -> None:
    world.devices.append("device 2 uuid= minor=2 mig=1")
    places(world)
    world.fail("nvmlDeviceGetMaxMigDeviceCount", 15).write()
    found = ask(library, world, INVENTORY)
    assert [unit["index"] for unit in found["units"]] == ["0", "1"]
    assert found["unknown"][0] == "GPU 2: GPU_IS_LOST"


@pytest.mark.needs("root")
def test_the_drivers_memory_limit_is_found_and_set(library: Path, world: nvml.Scenario) -> None:
    """r615: that the calls arrive as they should. Whether a driver keeps the limit was never seen."""
    world.driver = "615.10"
    world.write()
    places(world)
    source = """
    handle = nvml.must("nvmlDeviceGetHandleByIndex", 1)
    nvml.set_memory_limit(handle, "/sys/fs/cgroup/some/group", 5 << 30)
    found = [nvml.has_memory_limits(handle)]
    """
    import pynvml

    if not hasattr(pynvml, "nvmlDeviceSetMemoryLimits_v1"):
        pytest.skip("this binding is older than the function")
    assert ask(library, world, OPEN + textwrap.dedent(source)) == [""]
    assert world.log == [f"memory 1 {5 << 30} /sys/fs/cgroup/some/group"]
    found = ask(library, world, INVENTORY)["memory_limits"]
    assert found["ok"] or found["reason"] == "the driver wants cgroup version 2 at /sys/fs/cgroup"


def test_a_host_without_nodes_has_no_gpu_facts(library: Path, world: nvml.Scenario) -> None:
    (world.path.parent / "dev").mkdir()
    assert ask(library, world, INVENTORY) is None
    world.path.unlink()
