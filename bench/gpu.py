"""Measure the GPU part on a real device: `python bench/gpu.py [--quick] [--repeat N] [--json FILE]`.

Needs a GPU; as root best.

What NVML calls cost and what the guard costs; whether its pids lead to calls; how long it takes from an allocation over
the limit until the process is dead and until the memory is free; that CUDA works inside with the granted nodes and
not without; that a hash loop ends with its GPU time; how the energy counter compares with the power integral.
Changes no setting of the device. Nothing of it has been run on hardware yet: see docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sandbox import Sandbox
from sandbox.gpu import inventory
from sandbox.gpu.facts import GpuFacts
from sandbox.gpu.limits import PERIOD_S
from sandbox.gpu.sampling import Sampler

PROGRAM = Path(__file__).with_name("gpu_program.py").read_text()
LIMIT_MIB = 1024
FREE_TIMEOUT_S = 30
CALLS = (
    "nvmlDeviceGetMemoryInfo",
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetTotalEnergyConsumption",
)


def spread(values: Sequence[float], unit: str = "ms") -> dict[str, Any]:
    """Median and 95th percentile."""
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(len(ordered) * 0.95))]
    return {"p50": round(statistics.median(ordered), 4), "p95": round(p95, 4), "n": len(ordered), "unit": unit}


def call_costs(sampler: Sampler, uuid: str) -> dict[str, Any]:
    """What one NVML call takes, and what a whole look takes."""
    found: dict[str, Any] = {}
    nvml, handle = sampler.nvml(), sampler.handle(uuid)
    for function in CALLS:
        found[function] = spread([timed(lambda: nvml.maybe(function, handle)) for _ in range(200)])  # noqa: B023
    for detailed in (False, True):
        name = "look, detailed" if detailed else "look"
        found[name] = spread([timed(lambda: sampler.look([uuid], detailed=detailed, jails={})) for _ in range(30)])  # noqa: B023
    return found


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def guard_cpu(sampler: Sampler, uuid: str, seconds: float = 10.0) -> dict[str, Any]:
    """CPU of the loop at the guard's own pace."""
    wall, cpu, number = time.monotonic(), time.process_time(), 0
    while time.monotonic() - wall < seconds:
        sampler.look([uuid], detailed=number % 10 == 0, jails={})
        number += 1
        time.sleep(max(0.0, wall + number * PERIOD_S - time.monotonic()))
    return {"cpu_percent": round((time.process_time() - cpu) / (time.monotonic() - wall) * 100, 3), "looks": number}


def program(box: Sandbox, *argv: str, **gpu: Any) -> Any:
    return box.run(["python3", "-c", PROGRAM, *argv], **{f"gpu.{name}": value for name, value in gpu.items()})


def events(outcome: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in outcome.text.splitlines() if line.startswith("{")]


def inside(box: Sandbox, uuid: str) -> dict[str, Any]:
    """CUDA with the granted nodes, without any, and whether the guard saw the process as the call's."""
    granted, bare = program(box, "fill", "256", "2", devices=[uuid]), program(box, "open")
    nodes = ["sh", "-c", "cd /dev && find . \\( -name 'nvidia*' -o -name dri -o -name kfd \\) | sort"]
    used = (granted.record.to_json()["usage"]["gpu"] or [{}])[0]
    return {
        "with a grant": [granted.ending.kind, events(granted)],
        "without": [bare.ending.kind, bare.exit_code, events(bare)],
        "nodes with a grant": box.run(nodes, **{"gpu.devices": [uuid]}).text.split(),
        "nodes without": box.run(nodes).text.split(),
        "pids were mapped": bool(used.get("processes_peak")),
        "account": used,
    }


def reaction(box: Sandbox, sampler: Sampler, uuid: str, repeat: int) -> dict[str, Any]:
    """From asking for the memory over the limit to the end of the call, and to the memory being free again."""
    dead, freed, seen = [], [], []
    must = sampler.nvml().must
    for _ in range(repeat):
        before = must("nvmlDeviceGetMemoryInfo", sampler.handle(uuid)).used
        outcome = program(box, "fill", str(LIMIT_MIB * 2), "20", devices=[uuid], memory=f"{LIMIT_MIB}MiB")
        ended_s = time.monotonic()
        asked = [event["at_s"] for event in events(outcome) if event["event"] == "allocating"]
        if outcome.ending.kind != "limit:gpu_memory" or not asked:
            seen.append(str(outcome))
            continue
        # CLOCK_MONOTONIC is the same inside: jails have no time namespace.
        dead.append((ended_s - asked[0]) * 1000)
        while (used := must("nvmlDeviceGetMemoryInfo", sampler.handle(uuid)).used) > before + (64 << 20):
            if time.monotonic() > ended_s + FREE_TIMEOUT_S:
                break
            time.sleep(0.001)
        if used > before + (64 << 20):
            seen.append(f"{used - before >> 20} MiB not free after {FREE_TIMEOUT_S} s, somebody else's perhaps")
            continue
        freed.append((time.monotonic() - asked[0]) * 1000)
    result: dict[str, Any] = {"other endings": seen}
    return result | ({"to the outcome": spread(dead), "to memory free": spread(freed)} if dead and freed else {})


def hash_loop(box: Sandbox, uuid: str, limit_s: float) -> dict[str, Any]:
    """A miner's load, bounded by GPU time; and one that is not, for energy against power."""
    limited = program(box, "hash", "30", devices=[uuid], time=f"{limit_s}s")
    free = program(box, "hash", str(limit_s * 3), devices=[uuid])
    used = (free.record.to_json()["usage"]["gpu"] or [{}])[0]
    duration_s = free.record.to_json()["time"]["duration_s"]
    integral = None if used.get("power_watts_avg") is None else round(used["power_watts_avg"] * duration_s, 1)
    return {
        f"limited to {limit_s} s": [limited.ending.kind, round(limited.record.to_json()["time"]["duration_s"], 2)],
        "account": limited.record.to_json()["usage"]["gpu"],
        "energy": {"counter_j": used.get("energy_j"), "power_integral_j": integral, "account": used},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="every part once and shortly: does it run at all?")
    options = parser.parse_args()
    data = inventory.find()
    facts = GpuFacts.from_json(data) if data is not None else None
    if facts is None or facts.trouble:
        raise SystemExit(f"no GPU to measure: {facts.trouble if facts is not None else 'no /dev/nvidia*'}")
    unit = facts.units[0]
    sampler = Sampler(facts.units)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "card": unit.name,
        "driver": facts.driver,
        "period_ms": PERIOD_S * 1000,
        "memory_limits": facts.memory_limits.reason or "answers",
        "nvml": call_costs(sampler, unit.uuid),
        "guard": guard_cpu(sampler, unit.uuid, 1.0 if options.quick else 10.0),
    }
    with (
        tempfile.TemporaryDirectory() as state,
        Sandbox("shell", state=state, wall_time="60s", memory="8GiB", best_effort=["io"]) as box,
    ):
        found["inside"] = inside(box, unit.uuid)
        found["reaction"] = reaction(box, sampler, unit.uuid, 1 if options.quick else options.repeat)
        found["hash"] = hash_loop(box, unit.uuid, 1.0 if options.quick else 3.0)
    text = json.dumps(found, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text)


if __name__ == "__main__":
    main()
