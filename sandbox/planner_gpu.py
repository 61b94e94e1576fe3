"""The GPU part of a plan: what is granted, by what each of its limits is held, and why not. Pure.

`sandbox.gpu` is loaded only for a manifest that asks for a GPU.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sandbox.host import HostFacts
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan, Limit

if TYPE_CHECKING:
    from sandbox.gpu.facts import GpuFacts, GpuUnit

NO_GPU = "this host has no NVIDIA GPU: there is no /dev/nvidia0"


def is_on(manifest: Manifest) -> bool:
    return bool(manifest.gpu.count or manifest.gpu.devices)


def refusal(manifest: Manifest, facts: HostFacts) -> tuple[str, str]:
    """Why this host cannot give the call what it asks for, and what would change that; empty when it can."""
    if not is_on(manifest):
        return "", ""
    if facts.gpu is None:
        return NO_GPU, ""
    from sandbox.gpu.choosing import closed

    gpu = _facts(facts)
    if gpu.trouble:
        return f"no GPU can be granted: NVML: {gpu.trouble}", gpu.fix
    try:
        _units(manifest, gpu)
    except ValueError as error:
        return str(error), ""
    return closed(gpu.control_nodes), ""


def limits(manifest: Manifest, facts: HostFacts) -> tuple[Limit, ...]:
    """A row for each limit of the GPU's own, as it would be held on the weakest unit that could be chosen."""
    if not is_on(manifest) or facts.gpu is None or refusal(manifest, facts)[0]:
        return ()
    from sandbox.gpu.limits import Asked, judge

    gpu = _facts(facts)
    return judge(Asked.from_json(manifest.gpu.model_dump()), _units(manifest, gpu), gpu)


def limit(manifest: Manifest, plain: Limit) -> Limit:
    """The control `gpu` as it is held for a call that was granted some: these nodes and no others."""
    if not is_on(manifest) or plain.level != "full":
        return plain
    return replace(plain, mechanism=plain.mechanism.replace("device nodes absent", "no device nodes but the granted"))


def is_acceptable(limit: Limit, manifest: Manifest) -> bool:
    """Whether a GPU limit that is less than full may go on: polled ones do, and those given up by `best_effort`."""
    if not limit.control.startswith("gpu_"):
        return False
    if limit.level == "partial":
        return "gpu" not in manifest.isolation.required
    return "gpu" in manifest.isolation.best_effort


def complete(plan: LaunchPlan, manifest: Manifest, facts: HostFacts) -> LaunchPlan:
    """The plan of a call that asks for GPUs, all but the devices, which are chosen and leased when it is launched."""
    if not is_on(manifest):
        return plan
    # The names are on record before anything is chosen; their values are the supervisor's to fill in.
    env = {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    # What no system directory shows already.
    files = _facts(facts).libraries
    # Into an engine's container they come with the device, as its specification says (CDI).
    if files and plan.launcher != "docker":
        env["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(name.rpartition("/")[0] for _, name in files))
        step = next(step for step in plan.steps if step.name == "system_view")
        shown = [*step.args["runtime_files"], *(list(pair) for pair in files)]
        plan = plan.with_step_args("system_view", runtime_files=shown)
    # Its nodes differ from call to call, so no jail can be made for it beforehand.
    return replace(plan, env={**plan.env, **env}, template=None, gpu=manifest.gpu.model_dump(mode="json"))


def _facts(facts: HostFacts) -> GpuFacts:
    from sandbox.gpu.facts import GpuFacts

    assert facts.gpu is not None
    return GpuFacts.from_json(facts.gpu)


def _units(manifest: Manifest, gpu: GpuFacts) -> tuple[GpuUnit, ...]:
    """The units that might be chosen. Raises ValueError with what is missing."""
    from sandbox.gpu.choosing import candidates
    from sandbox.gpu.limits import Asked

    return candidates(Asked.from_json(manifest.gpu.model_dump()), gpu.units)
