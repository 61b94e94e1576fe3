"""What only a GPU can show: the driver inside a jail, and NVML's limits on real processes. No setting is changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import Outcome, Sandbox

pytestmark = [pytest.mark.needs("jail", "nvml")]
PROGRAM = (Path(__file__).parents[2] / "bench" / "gpu_program.py").read_text()


@pytest.fixture(scope="module")
def gpu_box(state_root: Path) -> Iterator[Sandbox]:
    with Sandbox("shell", state=state_root, wall_time="90s", memory="8GiB", best_effort=["io"]) as box:
        yield box


def cuda(box: Sandbox, *argv: str, **gpu: Any) -> Outcome:
    return box.run(["python3", "-c", PROGRAM, *argv], **{f"gpu.{name}": value for name, value in gpu.items()})


def events(outcome: Outcome) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in outcome.text.splitlines() if line.startswith("{")]
    return {event["event"]: event for event in found}


def account(outcome: Outcome) -> dict[str, Any]:
    units = outcome.record.to_json()["usage"]["gpu"]
    assert len(units) == 1
    return dict(units[0])


def test_cuda_works_with_a_grant_and_finds_nothing_without(gpu_box: Sandbox) -> None:
    granted, bare = cuda(gpu_box, "open", count=1), cuda(gpu_box, "open")
    assert granted.ok, granted.stderr
    assert events(granted)["open"]["devices"] == 1
    assert (bare.exit_code, set(events(bare))) == (3, {"failed"})


def test_only_the_leased_nodes_exist(gpu_box: Sandbox) -> None:
    script = "ls -1 /dev | grep -c '^nvidia[0-9]'; ls -d /dev/dri /dev/kfd"
    assert gpu_box.run(["sh", "-c", script], **{"gpu.count": 1}).text == "1\n"
    assert gpu_box.run(["sh", "-c", "ls /dev/nvidia*"]).exit_code != 0


def test_the_process_on_the_gpu_is_known_for_the_calls(gpu_box: Sandbox) -> None:
    outcome = cuda(gpu_box, "fill", "256", "2", count=1)
    assert outcome.ok, outcome.stderr
    used = account(outcome)
    assert used["processes_peak"] == 1
    assert used["memory_peak_bytes"] >= 256 << 20


def test_memory_over_the_limit_ends_the_call(gpu_box: Sandbox) -> None:
    over = cuda(gpu_box, "fill", "2048", "60", count=1, memory="1GiB")
    # A hard limit refuses the allocation itself: CUDA_ERROR_OUT_OF_MEMORY is 2.
    refused = events(over).get("failed", {}).get("why") == "cuMemAlloc_v2: 2"
    assert over.ending.kind == "limit:gpu_memory" or (over.exit_code == 3 and refused), over
    within = cuda(gpu_box, "fill", "64", "1", count=1, memory="1GiB")
    assert within.ok, within.stderr


def test_a_hash_loop_ends_with_its_gpu_time(gpu_box: Sandbox) -> None:
    over = cuda(gpu_box, "hash", "60", count=1, time="3s")
    assert (over.ending.kind, over.ending.fault) == ("limit:gpu_seconds", "tool")
    assert account(over)["seconds"] >= 3
    assert cuda(gpu_box, "hash", "1", count=1, time="30s").ok
