"""Looks through the stand-in: slices, lost devices, a library that has to be opened anew, what a choice goes by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import nvml
from tests.unit.test_gpu_nvml import ask, library, world

pytestmark = [pytest.mark.needs("gcc", "python:pynvml")]
__all__ = ["library", "world"]  # fixtures

HEAD = """
import os
from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.sampling import Sampler
from tests.helpers.nvml import Scenario
from pathlib import Path
units = [GpuUnit("GPU-standin-0", "0", energy=True),
         GpuUnit("MIG-standin-1-0", "1:0", parent="GPU-standin-1", energy=True),
         GpuUnit("MIG-standin-1-1", "1:1", parent="GPU-standin-1", energy=True)]
sampler = Sampler(units)
def look(detailed=True):
    return sampler.look([unit.uuid for unit in units], detailed=detailed, jails={})
def rewrite(*add):
    path = Path(os.environ["NVML_STANDIN_SCENARIO"])
    lines = [line for line in path.read_text().splitlines() if not line.startswith("fail")]
    path.with_suffix(".new").write_text("\\n".join([*lines, *add]) + "\\n")
    os.replace(path.with_suffix(".new"), path)
"""


@pytest.fixture
def slices(world: nvml.Scenario) -> nvml.Scenario:
    world.devices.clear()
    world.device(0, sm=40, mem=5, pcie=100).device(1, mig=1, energy=5000)
    return world.slice(1, 0, gi=1).slice(1, 1, gi=2, used=3000).write()


def test_a_slice_shows_its_own_processes_and_its_gpus_energy(library: Path, slices: nvml.Scenario) -> None:
    slices.process(0, 10, 100, sm=40).process(1, 11, 200, gi=1).process(1, 12, 300, gi=2).write()
    source = """
    found = {r.uuid: [r.memory_used_bytes >> 20, sorted((pid, used >> 20) for pid, used in r.processes.items()),
                      r.detail.sm_percent, r.detail.energy_mj, r.detail.power_mw, r.detail.process_sm,
                      r.detail.pcie_bytes_per_s] for r in look().readings}
    """
    found = ask(library, slices, HEAD + source.replace("\n    ", "\n"))
    assert found == {
        "GPU-standin-0": [500, [[10, 100]], 40, 1000000, 60000, {"10": 40.0}, 204800],
        "MIG-standin-1-0": [12, [[11, 200]], None, 5000, 60000, None, 0],
        "MIG-standin-1-1": [3000, [[12, 300]], None, 5000, 60000, None, 0],
    }


def test_a_lost_device_is_named_and_the_others_are_read(library: Path, slices: nvml.Scenario) -> None:
    slices.device(2, uuid="GPU-gone").fail("nvmlDeviceGetAttributes_v2", 15).write()
    source = """
    units.append(GpuUnit("GPU-not-there", "7"))
    sampler = Sampler(units)
    found = [[r.uuid, r.trouble, r.memory_used_bytes is None] for r in look(False).readings]
    """
    assert ask(library, slices, HEAD + source.replace("\n    ", "\n"))[-2:] == [
        ["MIG-standin-1-1", "", False],
        ["GPU-not-there", "NOT_FOUND", True],
    ]


def test_after_a_mismatch_the_library_is_opened_anew(library: Path, slices: nvml.Scenario) -> None:
    source = """
    found = [look(False).readings[0].trouble]
    rewrite("fail nvmlDeviceGetMemoryInfo 18", "fail nvmlInitWithFlags 18")
    found += [look(False).readings[0].trouble, look(False).trouble]
    rewrite()
    found += [look(False).readings[0].trouble, look(False).trouble]
    """
    assert ask(library, slices, HEAD + source.replace("\n    ", "\n")) == [
        "",
        "LIB_RM_VERSION_MISMATCH",
        "LIB_RM_VERSION_MISMATCH",
        "",
        "",
    ]


def test_a_choice_goes_by_what_everybody_uses(library: Path, slices: nvml.Scenario) -> None:
    slices.process(0, 10, 100).process(1, 11, 200, gi=1, type="M").write()
    source = """
    use = sampler.use(unit.uuid for unit in units)
    found = [[u.memory_used_bytes >> 20, u.processes, u.sm_percent, u.mps] for u in use.values()]
    """
    assert ask(library, slices, HEAD + source.replace("\n    ", "\n")) == [
        [500, 1, 40, False],
        [12, 1, None, True],
        [3000, 0, None, False],
    ]
