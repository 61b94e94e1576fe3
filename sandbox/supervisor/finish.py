"""The end of a call: what is gathered when nothing of it runs any more, the closed record, and the answer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sandbox._linux import cgroup, wire
from sandbox.audit import record as audit_record
from sandbox.audit.chain import Chain
from sandbox.outcome import Ending
from sandbox.plan import LaunchPlan, Step
from sandbox.supervisor.call import Call

_CGROUP_KEYS = {"memory": "memory_bytes", "pids": "pids", "cpus": "cpus", "io": "io_bytes_per_s"}


def cgroup_limits(plan: LaunchPlan) -> dict[str, float | int]:
    """Those limits of the plan that a cgroup carries. pid 1 is counted with the tool's tasks."""
    found: dict[str, float | int] = {}
    for limit in plan.limits:
        if limit.mechanism.startswith("cgroup") and limit.control in _CGROUP_KEYS and limit.applied is not None:
            assert isinstance(limit.applied, int | float)
            found[_CGROUP_KEYS[limit.control]] = limit.applied + (1 if limit.control == "pids" else 0)
    return found


def io_devices(state: Path, plan: LaunchPlan) -> list[str]:
    """The block devices behind what this call can write: an io limit is per device."""
    paths = {str(state)}
    for step in plan.steps:
        if step.name == "workspace" and step.args.get("host_path"):
            paths.add(step.args["host_path"])
        elif step.name == "grants":
            paths.update(grant["host_path"] for grant in step.args["paths"])
    return sorted({device for path in paths if (device := cgroup.block_device(path)) is not None})


@dataclass
class Gathered:
    """What goes out to the caller beside the record: named sections of one memory file."""

    closing: audit_record.Closing
    sections: dict[str, bytes] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def closing(ending: Ending, started: float) -> Gathered:
    """The closing of a call that was never launched."""
    return Gathered(
        audit_record.Closing(
            time_end=audit_record.rfc3339(time.time_ns()),
            duration_s=time.monotonic() - started,
            ending=ending.to_json(),
        )
    )


class Workspace:
    """What the workspace needs before and after a call."""

    def __init__(self, ask: dict[str, Any], plan: LaunchPlan, state: Path, record_id: str) -> None:
        self.collect = tuple(ask["call"]["collect"])
        self.plan = plan
        self.state = state
        self.record_id = record_id
        self.step = next((step for step in plan.steps if step.name == "workspace"), None)
        self.allow_protected = tuple(ask["policy"]["manifest"]["filesystem"]["allow_protected"])

    @property
    def mode(self) -> str:
        return str(self.step.args["mode"]) if self.step else ""

    @property
    def needs_thread(self) -> bool:
        return self.mode == "rw"

    def before(self) -> LaunchPlan:
        return self.plan

    def after(self, call: Call, gathered: Gathered) -> None:
        return None


async def gather(ending: Ending, started: float, call: Call | None, work: Workspace) -> Gathered:
    """Counters, digests, files and changes of a call that is over."""
    gathered = closing(ending, started)
    if call is None:
        return gathered
    output: dict[str, Any] = {}
    for name, pump in call.pumps.items():
        key = "stdout" if name == "terminal" else name
        output[f"{key}_sha256"] = f"sha256:{pump.sha256}"
        output[f"{key}_bytes"] = pump.total_bytes
        output["truncated"] = bool(output.get("truncated")) or pump.truncated
        gathered.sections[key] = bytes(pump.kept)
    stats = call.stats()
    isolation: dict[str, Any] = {"applied": call.steps_applied, "notes": call.notes}
    if call.group is not None:
        isolation["cgroup"] = call.group.name
    gathered.closing = replace(
        gathered.closing,
        usage=stats,
        output=output,
        captured={name: bytes(data[: audit_record.CAPTURE_MAX_BYTES]) for name, data in gathered.sections.items()},
        isolation=isolation,
    )
    work.after(call, gathered)
    return gathered


def close_and_answer(
    chain: Chain, reply: socket.socket, opened: dict[str, Any], gathered: Gathered, durability: Any
) -> None:
    """Write the closed record, then hand the outcome over: never the other way round. Raises AuditError."""
    closed = audit_record.closed_record(opened, gathered.closing)
    appended = chain.append_closed(closed, durability=durability)
    closed["integrity"] = {"seq": appended.seq, "hash": appended.hash, "chain": chain.chain_id}
    sections = {"record": json.dumps(closed).encode(), **gathered.sections}
    layout: dict[str, list[int]] = {}
    body = bytearray()
    for name, data in sections.items():
        layout[name] = [len(body), len(data)]
        body += data
    fd = wire.memfd("outcome", bytes(body))
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            # Nobody waits any more when this fails; the record is written all the same.
            wire.send(
                reply,
                {"ev": "outcome", "ending": gathered.closing.ending, "sections": layout, **gathered.extra},
                [fd],
            )
    finally:
        os.close(fd)


def with_step_args(plan: LaunchPlan, name: str, **args: Any) -> LaunchPlan:
    """The plan with more arguments for one of its steps."""
    steps = tuple(
        Step(step.name, step.where, {**step.args, **args}) if step.name == name else step for step in plan.steps
    )
    return replace(plan, steps=steps)
