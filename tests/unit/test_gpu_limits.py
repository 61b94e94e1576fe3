"""What holds each limit, which unit is chosen, and what a plan says of it: pure, from facts that are made up here."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from sandbox.errors import Unenforceable
from sandbox.gpu.choosing import Use, candidates, cdi_names, environment, order, unusable
from sandbox.gpu.facts import GpuFacts, GpuNode, GpuUnit
from sandbox.gpu.limits import Asked, judge
from sandbox.host import CgroupControl, Feature, HostFacts
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan
from sandbox.planner import Surroundings, decide
from sandbox.spec import CallSpec

GIB = 1 << 30
CONTROL = (GpuNode("nvidiactl", 195, 255), GpuNode("nvidia-uvm", 510, 0))


def whole(index: int, **values: Any) -> GpuUnit:
    known: dict[str, Any] = {
        "memory_bytes": 80 * GIB,
        "power_mw": (100_000, 400_000),
        "energy": True,
        "nodes": (GpuNode(f"nvidia{index}", 195, index),),
    }
    return GpuUnit(f"GPU-{index}", str(index), "H", **{**known, **values})


def part(index: int, number: int, gib: int = 10, share: int = 15) -> GpuUnit:
    caps = tuple(GpuNode(f"nvidia-caps/nvidia-cap{minor}", 237, minor, "r") for minor in (number * 2, number * 2 + 1))
    return GpuUnit(
        f"MIG-{index}-{number}",
        f"{index}:{number}",
        "H",
        parent=f"GPU-{index}",
        memory_bytes=gib * GIB,
        sm_percent=share,
        energy=True,
        nodes=(GpuNode(f"nvidia{index}", 195, index), *caps),
    )


FACTS = GpuFacts(driver="575.57", units=(whole(0), whole(1)), control_nodes=CONTROL)
MIG = replace(FACTS, units=(part(0, 0), part(0, 1, gib=40, share=43)))
R615 = replace(FACTS, driver="615.1", memory_limits=Feature(True))
APART = replace(FACTS, pids=Feature(False, "a pid namespace of its own", "--pid=host"))
OLD = replace(FACTS, units=(whole(0, power_mw=None, energy=False, memory_bytes=None),))


def means(facts: GpuFacts, **asked: Any) -> dict[str, tuple[str, str]]:
    wish = Asked(count=1, **asked)
    return {limit.control: (limit.level, limit.strength) for limit in judge(wish, facts.units, facts)}


@pytest.mark.parametrize(
    ("facts", "asked", "row", "expected"),
    [
        (FACTS, {"memory_bytes": 4 * GIB}, "gpu_memory", ("partial", "polled")),
        (R615, {"memory_bytes": 4 * GIB}, "gpu_memory", ("full", "driver")),
        (APART, {"memory_bytes": 4 * GIB}, "gpu_memory", ("none", "none")),
        (MIG, {"memory_bytes": 40 * GIB}, "gpu_memory", ("full", "hardware")),
        (MIG, {"memory_bytes": 10 * GIB}, "gpu_memory", ("partial", "polled")),
        (FACTS, {"sm_percent": 50}, "gpu_sm", ("none", "none")),
        (FACTS, {"sm_percent": 100}, "gpu_sm", ("full", "hardware")),
        (MIG, {"sm_percent": 43}, "gpu_sm", ("full", "hardware")),
        (MIG, {"sm_percent": 42}, "gpu_sm", ("none", "none")),
        (FACTS, {"power_watts": 200}, "gpu_power", ("full", "driver")),
        (FACTS, {"power_watts": 50}, "gpu_power", ("none", "none")),
        (OLD, {"power_watts": 200}, "gpu_power", ("none", "none")),
        (MIG, {"power_watts": 200}, "gpu_power", ("none", "none")),
        (FACTS, {"energy_j": 100.0}, "gpu_energy", ("partial", "polled")),
        (OLD, {"energy_j": 100.0}, "gpu_energy", ("none", "none")),
        (FACTS, {"seconds": 10.0}, "gpu_seconds", ("partial", "polled")),
        (APART, {"seconds": 10.0}, "gpu_seconds", ("none", "none")),
        (FACTS, {"processes_max": 1}, "gpu_processes", ("partial", "polled")),
    ],
)
def test_each_limit_is_held_by_the_hardest_means_that_every_candidate_has(
    facts: GpuFacts, asked: dict[str, Any], row: str, expected: tuple[str, str]
) -> None:
    assert means(facts, **asked) == {row: expected}


def test_every_row_says_what_was_applied_and_why_not() -> None:
    for limit in judge(Asked(count=1, sm_percent=50, power_watts=9, energy_j=1.0), OLD.units, OLD):
        assert (limit.level, limit.applied, limit.mechanism) == ("none", None, "")
        assert len(limit.reason) > 20


def test_no_limit_no_row() -> None:
    assert means(FACTS) == {}


def test_facts_survive_json() -> None:
    for facts in (FACTS, MIG, R615, APART, OLD, GpuFacts(trouble="LIBRARY_NOT_FOUND", libraries=(("/a", "/b"),))):
        assert GpuFacts.from_json(json.loads(json.dumps(asdict(facts)))) == facts


# -- choosing ----------------------------------------------------------------------------------------------------


def chosen(asked: Asked, use: dict[str, Use], facts: GpuFacts = FACTS) -> list[str]:
    return [unit.index for unit in order(asked, candidates(asked, facts.units), use)]


def test_the_least_used_unit_comes_first() -> None:
    idle, busy = Use(GIB, 0, 0), Use(40 * GIB, 1, 90)
    assert chosen(Asked(count=1), {"GPU-0": busy, "GPU-1": idle}) == ["1", "0"]
    assert chosen(Asked(count=1), {"GPU-0": idle, "GPU-1": busy}) == ["0", "1"]
    assert chosen(Asked(count=1), {"GPU-0": idle, "GPU-1": idle}) == ["0", "1"]
    assert chosen(Asked(count=1), {"GPU-1": Use(GIB, 0, 0)}) == ["1", "0"], "unknown counts as busy"
    assert chosen(Asked(count=1), {"GPU-0": Use(GIB, 0, 50), "GPU-1": Use(GIB, 0, 1)}) == ["1", "0"]


def test_what_does_not_fit_is_left_out_and_named() -> None:
    full = Use(79 * GIB, 1, 0)
    asked = Asked(count=1, memory_bytes=8 * GIB)
    assert chosen(asked, {"GPU-0": full, "GPU-1": Use(GIB, 3, 0)}) == ["1"]
    with pytest.raises(ValueError, match="GPU 0: 1024 MiB free of 81920, 8192 asked for; GPU 1: "):
        chosen(asked, {"GPU-0": full, "GPU-1": full})
    with pytest.raises(ValueError, match="an MPS server uses it"):
        chosen(Asked(devices=("0",)), {"GPU-0": Use(mps=True)})
    assert chosen(Asked(devices=("0",), allow_mps=True), {"GPU-0": Use(mps=True)}) == ["0"]


def test_named_units_are_taken_as_named() -> None:
    assert chosen(Asked(devices=("1", "GPU-0")), {}) == ["1", "0"]
    assert chosen(Asked(devices=("MIG-0-1",)), {}, MIG) == ["0:1"]
    with pytest.raises(ValueError, match=r"there is no GPU '7' that can be given; there are: 0 \(GPU-0\), 1 \(GPU-1\)"):
        candidates(Asked(devices=("7",)), FACTS.units)
    with pytest.raises(ValueError, match="3 GPUs are asked for, and this host has 2"):
        candidates(Asked(count=3), FACTS.units)
    with pytest.raises(ValueError, match="1 GPUs are asked for, and this host has 0 of 2"):
        candidates(Asked(count=1, memory_bytes=80 * GIB), MIG.units)


def test_a_slice_sold_as_ten_is_large_enough_for_ten() -> None:
    just_below = replace(part(0, 0), memory_bytes=int(9.5 * GIB))
    asked = Asked(count=1, memory_bytes=10 * GIB)
    assert candidates(asked, (just_below,)) == (just_below,)
    assert order(asked, (just_below,), {just_below.uuid: Use(20 << 20, 0)}) == (just_below,)


def test_nodes_that_a_jail_cannot_open_are_named() -> None:
    shut = whole(0, nodes=(GpuNode("nvidia0", 195, 0, "rw", usable=False),))
    assert unusable(whole(0)) == unusable(part(0, 0)) == ""
    assert "/dev/nvidia0 is not open to everyone, and so not to a jail's user" in unusable(shut)
    assert "missing below /dev" in unusable(whole(0, nodes=()))
    assert "missing below /dev" in unusable(replace(part(0, 0), nodes=part(0, 0).nodes[:2]))


def test_a_unit_that_cannot_be_opened_leaves_the_others() -> None:
    lame = replace(part(0, 0), nodes=part(0, 0).nodes[:1])
    assert candidates(Asked(count=1), (lame, whole(1))) == (whole(1),)
    with pytest.raises(ValueError, match="has 1 of 2 that can be given: device nodes of GPU 0:0 are missing"):
        candidates(Asked(count=2), (lame, whole(1)))
    with pytest.raises(ValueError, match="device nodes of GPU 0:0 are missing"):
        candidates(Asked(devices=("0:0",)), (lame, whole(1)))


def test_names_for_programs_and_runtimes() -> None:
    assert environment(FACTS.units) == {"CUDA_VISIBLE_DEVICES": "GPU-0,GPU-1", "NVIDIA_VISIBLE_DEVICES": "GPU-0,GPU-1"}
    assert environment(())["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert cdi_names(MIG.units[:1]) == ("nvidia.com/gpu=MIG-0-0",)


# -- the plan ----------------------------------------------------------------------------------------------------

YES = Feature(True)
HOST = HostFacts(
    cpu_count=4,
    user_namespaces=YES,
    namespaces=dict.fromkeys(("mount", "net", "pid", "ipc", "uts", "cgroup"), YES),
    proc_mount=YES,
    nproc_in_userns=YES,
    cgroup_kind="v2",
    cgroups=dict.fromkeys(("memory", "pids", "cpu", "io"), CgroupControl("v2")),
    cpu_accounting=True,
    swap_accounted=True,
    landlock_abi=4,
    seccomp_actions=("errno",),
    libseccomp="2.5.4",
    device_rule="bpf",
)
CALL = CallSpec("program", ("true",), "true")


def planned(gpu: GpuFacts | None, isolation: dict[str, Any] | None = None, **wishes: Any) -> LaunchPlan:
    host = replace(HOST, gpu=asdict(gpu) if gpu is not None else None)
    # As it travels from the supervisor.
    host = HostFacts.from_json(json.loads(json.dumps(host.to_json())))
    return decide(Manifest(gpu=wishes, isolation=isolation or {}), CALL, host, Surroundings())


def refused(gpu: GpuFacts | None, isolation: dict[str, Any] | None = None, **wishes: Any) -> Unenforceable:
    with pytest.raises(Unenforceable) as caught:
        planned(gpu, isolation, **wishes)
    return caught.value


def test_a_call_without_a_gpu_is_planned_as_ever() -> None:
    for facts in (None, FACTS, GpuFacts(trouble="LIBRARY_NOT_FOUND")):
        plan = planned(facts)
        gpu = plan.limit("gpu")
        assert plan.gpu is None
        assert plan.template is not None
        assert gpu is not None
        assert (gpu.level, gpu.mechanism) == ("full", "device nodes absent, cgroup device program")
        assert not {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"} & set(plan.env)


def test_a_call_with_a_gpu_is_planned_for_itself_alone() -> None:
    libraries = (("/opt/driver/libcuda.so.575", "/opt/driver/libcuda.so.1"),)
    plan = planned(replace(FACTS, libraries=libraries), count=1, memory_bytes=GIB)
    assert plan.gpu is not None
    assert (plan.gpu["count"], plan.gpu["memory_bytes"]) == (1, GIB)
    assert plan.template is None, "no jail is made for it beforehand"
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "", "the supervisor fills in what was leased"
    assert plan.env["LD_LIBRARY_PATH"] == "/opt/driver"
    view = next(step for step in plan.steps if step.name == "system_view")
    assert list(libraries[0]) in view.args["runtime_files"]
    gpu, memory = plan.limit("gpu"), plan.limit("gpu_memory")
    assert gpu is not None
    assert memory is not None
    assert gpu.mechanism == "no device nodes but the granted, cgroup device program"
    assert (memory.level, memory.strength) == ("partial", "polled")
    assert LaunchPlan.from_json(json.loads(plan.dumps())).gpu == plan.gpu


@pytest.mark.parametrize(
    ("facts", "wishes", "message", "hint"),
    [
        (None, {"count": 1}, "this host has no NVIDIA GPU", ""),
        (GpuFacts(trouble="BINDING_NOT_FOUND", fix="pip install it"), {"count": 1}, "BINDING_NOT_FOUND", "pip install"),
        (GpuFacts(trouble="LIB_RM_VERSION_MISMATCH", fix="reload"), {"count": 1}, "LIB_RM_VERSION_MISMATCH", "reload"),
        (FACTS, {"count": 3}, "3 GPUs are asked for", ""),
        (FACTS, {"devices": ["GPU-x"]}, "there is no GPU 'GPU-x'", ""),
        (replace(FACTS, units=(whole(0, nodes=()),)), {"count": 1}, "missing below /dev", ""),
        (
            replace(FACTS, control_nodes=(replace(CONTROL[0], usable=False), CONTROL[1])),
            {"count": 1},
            "/dev/nvidiactl is not open to everyone, and so not to a jail's user: chmod a+rw",
            "",
        ),
    ],
)
def test_a_host_that_cannot_grant_a_gpu_refuses_with_what_is_missing(
    facts: GpuFacts | None, wishes: dict[str, Any], message: str, hint: str
) -> None:
    error = refused(facts, **wishes)
    assert message in error.controls["gpu"]
    assert hint in error.hint
    # A GPU that is not there cannot be given up for less of one.
    assert "gpu" in refused(facts, {"best_effort": ["gpu"]}, **wishes).controls


def test_limits_that_nothing_holds_are_refused_unless_given_up() -> None:
    error = refused(FACTS, count=1, sm_percent=50)
    assert list(error.controls) == ["gpu_sm"]
    assert "best_effort = ['gpu']" in error.hint
    row = planned(FACTS, {"best_effort": ["gpu"]}, count=1, sm_percent=50).limit("gpu_sm")
    assert row is not None
    assert (row.level, row.applied) == ("none", None)


def test_polled_limits_go_on_unless_the_gpu_is_required_in_full() -> None:
    assert planned(FACTS, count=1, memory_bytes=GIB)
    assert list(refused(FACTS, {"required": ["gpu"]}, count=1, memory_bytes=GIB).controls) == ["gpu_memory"]
    assert planned(R615, {"required": ["gpu"]}, count=1, memory_bytes=GIB)
    assert planned(FACTS, {"required": ["gpu"]}, count=1)


def test_polled_limits_are_refused_where_pids_cannot_be_mapped() -> None:
    error = refused(APART, count=1, memory_bytes=GIB, seconds=5.0)
    assert set(error.controls) == {"gpu_memory", "gpu_seconds"}
    assert "pid namespace" in str(error)
    assert planned(APART, count=1), "the grant itself needs no pids"
