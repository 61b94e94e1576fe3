"""The end of a call: what is gathered when nothing of it runs any more, the closed record, and the answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

from sandbox._linux import wire
from sandbox.audit import record as audit_record
from sandbox.audit.chain import Chain
from sandbox.ending import Ending
from sandbox.errors import SandboxError
from sandbox.supervisor.call import Call
from sandbox.supervisor.work import Left, Work

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


class Gathered:
    """What goes out to the caller beside the record: named sections of one memory file."""

    __slots__ = ("closing", "extra", "sections")

    def __init__(
        self,
        closing: audit_record.Closing,
        sections: dict[str, bytes] | None = None,
        extra: dict[str, Any] | None = None,
    ) -> None:
        self.closing = closing
        self.sections = sections or {}
        self.extra = extra or {}


def closing(ending: Ending, started: float) -> Gathered:
    """The closing of a call that was never launched."""
    return Gathered(audit_record.Closing(**_when(started), ending=ending.to_json()))


def _when(started: float) -> dict[str, Any]:
    return {"time_end": audit_record.rfc3339(time.time_ns()), "duration_s": time.monotonic() - started}


async def gather(
    ending: Ending, started: float, call: Call | None, work: Work, *, own_user_namespace: bool
) -> Gathered:
    """Counters, digests, files and changes of a call that is over."""
    if call is None:
        return closing(ending, started)
    when = _when(started)
    sections: dict[str, bytes] = {}
    output: dict[str, Any] = {}
    for name, pump in call.pumps.items():
        key = "stdout" if name == "terminal" else name
        output[f"{key}_sha256"] = f"sha256:{pump.sha256}"
        output[f"{key}_bytes"] = pump.total_bytes
        output["truncated"] = bool(output.get("truncated")) or pump.truncated
        sections[key] = bytes(pump.kept)
    stats: dict[str, Any] = dict(call.final_stats or call.stats())
    gpu = await call.gpu.finish() if call.gpu is not None else {}
    stats["gpu"] = gpu.get("usage")
    isolation: dict[str, Any] = {**call.jail.details, "applied": call.jail.steps_applied, "notes": call.jail.notes}
    if call.jail.group is not None:
        isolation["cgroup"] = call.jail.group.name
    try:
        if work.is_quick:
            left = work.after(call.jail.fds, own_user_namespace=own_user_namespace)
        else:
            left = await asyncio.to_thread(work.after, call.jail.fds, own_user_namespace=own_user_namespace)
    except (OSError, SandboxError) as error:
        # The call is over and gets its record. It did not end well: what it left was not looked through.
        left = Left()
        ending = _unseen(ending, error)
    journal = await call.egress.finish(drain=not call.stopped) if call.egress is not None else None
    if journal is not None:
        stats.update({f"network_{name}": value for name, value in journal["totals"].items()})
    closed = audit_record.Closing(
        **when,
        ending=ending.to_json(),
        usage=stats,
        output=output,
        captured={name: data[: audit_record.CAPTURE_MAX_BYTES] for name, data in sections.items()},
        isolation=isolation,
        network=journal["items"] if journal is not None else None,
        files=left.files,
        decisions=left.decisions,
        findings=gpu.get("findings", ()),
        enforcement=gpu.get("enforcement", {}),
    )
    sections.update({f"file:{path}": data for path, data in left.collected.items()})
    denials = [f"{item['subject']}: {item['reason']}" for item in left.decisions]
    denials += journal["denials"] if journal is not None else []
    return Gathered(closed, sections, {"changes": left.changes, "denials": denials})


def _unseen(ending: Ending, error: Exception) -> Ending:
    message = f"what the call left could not be gathered: {error}"
    return Ending("launch_error", "host", ending.exit_code, ending.signal, type(error).__name__, message)


async def close_and_answer(
    chain: Chain, reply: socket.socket, opened: dict[str, Any], gathered: Gathered, durability: str
) -> None:
    """Write the closed record, then hand the outcome over: never the other way round. Raises AuditError."""
    closed = audit_record.closed_record(opened, gathered.closing)
    appended = chain.append_closed(closed, durability="flush")
    if durability == "fsync":
        await asyncio.to_thread(chain.sync)
    sections = {"record": appended.line, **gathered.sections}
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        # Nobody waits any more when this fails; the record is written all the same.
        message = {"ev": "outcome", "ending": gathered.closing.ending, **gathered.extra}
        wire.send_with_parts(reply, message, sections)
