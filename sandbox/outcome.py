"""What a call gives back, and whose fault its ending was.

`classify` decides the ending once, from what the kernel and the supervisor saw, never from what the tool says about
itself. A run returns an `Outcome` for whatever a tool can cause; `unwrap` turns it into the value or the error.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.errors import CallLost, CallTimeout, Denied, LaunchError, LimitExceeded, Revoked, ToolFailed


@dataclass(frozen=True, slots=True)
class Ending:
    """How the call ended. `kind`: ok, tool_error, limit:NAME, denied, revoked, killed, lost, launch_error, refused.

    `fault`: tool, caller, host or us. `signal` is set when the tool was ended by one.
    """

    kind: str
    fault: str
    exit_code: int | None = None
    signal: int | None = None
    error_type: str = ""
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fault": self.fault,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "error_type": self.error_type,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """What was observed of one call's end.

    `exit_status`: the tool's wait status, None when pid 1 never reported one. `stopped`: why the supervisor ended
    the call (`wall_time`, `output`, `memory`, `cpu_time`, `network`, `gateway`, `gpu` without a grant, `gpu_lost:NAME`,
    a limit of its GPU, `caller`, `killed`, `revoked`), if it did. `step_failed`: the launch step that failed with its
    errno. `exec_errno`: the program could not be executed, or `exec_directory`, where it starts, not be entered.
    """

    exit_status: int | None = None
    stopped: str = ""
    step_failed: str = ""
    step_errno: int = 0
    step_message: str = ""
    is_bug: bool = False
    exec_errno: int = 0
    exec_directory: str = ""
    oom_kills: int = 0


_LIMIT_TEXT = {
    "wall_time": "the wall time ran out",
    "output": "more output than the limit allows",
    "memory": "more memory than the limit allows",
    "cpu_time": "the CPU time ran out",
    "network": "more network traffic than the budgets allow",
    "gpu_memory": "more GPU memory than the limit allows",
    "gpu_seconds": "the GPU time ran out",
    "gpu_energy": "more energy on the GPU than the limit allows",
    "gpu_processes": "more processes on the GPU than the limit allows",
}


def classify(seen: Seen) -> Ending:
    """Decide the ending. Order matters: ours before the tool's, the limit before the signal that carried it out."""
    if seen.step_failed:
        message = f"step {seen.step_failed}: {seen.step_message}"
        kind = "InternalError" if seen.is_bug else "LaunchError"
        return Ending("launch_error", "us" if seen.is_bug else "host", error_type=kind, message=message)
    code, number = _split(seen.exit_status)
    if seen.stopped in _LIMIT_TEXT:
        return Ending(f"limit:{seen.stopped}", "tool", code, number, message=_LIMIT_TEXT[seen.stopped])
    if seen.stopped == "caller":
        return Ending("killed", "caller", code, number, message="the caller went away or cancelled the call")
    if seen.stopped == "gateway":
        message = "the egress gateway was lost, and the call with it: nothing passes without it"
        return Ending("lost", "us", code, number, message=message)
    if seen.stopped == "gpu":
        return Ending("denied", "tool", code, number, message="used a GPU that it was not granted")
    if seen.stopped.startswith("gpu_lost:"):
        name = seen.stopped.partition(":")[2]
        return Ending("lost", "host", code, number, message=f"the GPU was lost under the call: NVML: {name}")
    if seen.stopped == "revoked":
        return Ending("revoked", "caller", code, number, message="revoked while it ran")
    if seen.stopped:
        return Ending("killed", "caller", code, number, message=seen.stopped)
    # The kernel's own count says whether memory ended it: an exit by SIGKILL alone proves nothing (cgroups(7)).
    if seen.oom_kills and (number == signal.SIGKILL or seen.exit_status is None or code == 137):
        return Ending("limit:memory", "tool", code, number, message=_LIMIT_TEXT["memory"])
    if seen.exit_status is None:
        return Ending("lost", "host", message="the jail was ended from outside")
    if number == signal.SIGXCPU:
        return Ending("limit:cpu_time", "tool", code, number, message=_LIMIT_TEXT["cpu_time"])
    if seen.exec_errno:
        code = 126 if seen.exec_errno in (13, 8, 20, 21, 40) else 127
        if seen.exec_directory:
            message = f"it cannot start in {seen.exec_directory!r}: {os.strerror(seen.exec_errno)}"
        else:
            message = "the program cannot be executed" if code == 126 else "there is no such program inside"
        return Ending("tool_error", "tool", code, error_type="OSError", message=message)
    if code == 0:
        return Ending("ok", "tool", code)
    return Ending("tool_error", "tool", code, number)


def _split(status: int | None) -> tuple[int | None, int | None]:
    """(exit code, signal) of a wait status."""
    if status is None:
        return None, None
    number = status & 0x7F
    return (None, number) if number else (status >> 8, None)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call's result: the tool's value or output, how it ended, and the record of it.

    `value`: what a function returned. `stdout`, `stderr`: bytes, bounded by the manifest's `output`. `files`: what
    `collect` asked for, path to bytes. `changes`: a `Changeset` for a `cow` workspace. `denials`: what was tried and
    not permitted. `record`: see `sandbox.audit.record.Record`.
    """

    ending: Ending
    record: Any = None
    value: Any = None
    stdout: bytes = b""
    stderr: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    changes: Any = None
    denials: tuple[str, ...] = ()
    error: ToolFailed | None = None

    @property
    def ok(self) -> bool:
        return self.ending.kind == "ok"

    @property
    def exit_code(self) -> int:
        """As a shell would say it: the tool's own, 124 for the wall time, 125 for ours, 128+N for a signal."""
        ending = self.ending
        if ending.kind == "limit:wall_time":
            return 124
        if ending.kind in ("launch_error", "refused", "lost"):
            return 125
        if ending.exit_code is not None:
            return ending.exit_code
        return 128 + (ending.signal or signal.SIGKILL)

    @property
    def text(self) -> str:
        """Standard output as text; bytes that are no UTF-8 are shown as replacement characters."""
        return self.stdout.decode("utf-8", "replace")

    def unwrap(self) -> Any:
        """The value of a function, or this outcome itself for a program that ended well.

        Raises ToolFailed, LimitExceeded, CallTimeout, Denied, Revoked, CallLost or LaunchError, with `.outcome`.
        """
        ending = self.ending
        if self.error is not None:
            raise self.error
        if ending.kind == "ok":
            return self.value if self.record is None or self.record.tool.type == "function" else self
        raise _error(self)

    def __repr__(self) -> str:
        record_id = getattr(self.record, "record_id", "-")
        out = f"stdout={len(self.stdout)}B stderr={len(self.stderr)}B"
        fault = "" if self.ok else f" fault={self.ending.fault}"
        return f"<Outcome {self.ending.kind} exit={self.exit_code}{fault} {out} record={record_id}>"


def _applied(record: Any, limit: str) -> str:
    """What the limit was, by the manifest's name for it."""
    control = record.enforcement.get(limit) if record is not None else None
    amount = control.requested if control is not None else None
    if not isinstance(amount, int | float):
        return ""
    # Only what ends by a limit needs it: it loads decimal numbers.
    from sandbox.units import format_size, format_time

    text = format_time(amount) if limit.endswith("_time") else format_size(int(amount))
    return f"the limit is resources.{limit} = {text}"


def _error(outcome: Outcome) -> Exception:
    ending, record = outcome.ending, outcome.record
    kind, message = ending.kind, ending.message
    if kind == "limit:wall_time":
        return CallTimeout(
            message, limit="wall_time", hint=_applied(record, "wall_time"), record=record, outcome=outcome
        )
    if kind.startswith("limit:"):
        limit = kind.partition(":")[2]
        return LimitExceeded(message, limit=limit, hint=_applied(record, limit), record=record, outcome=outcome)
    if kind == "denied":
        return Denied(message, record=record, outcome=outcome)
    if kind in ("revoked", "killed"):
        return Revoked(message, record=record, outcome=outcome)
    if kind == "lost":
        return CallLost(message, record=record, outcome=outcome)
    if kind == "launch_error":
        return LaunchError(message, record=record)
    tail = outcome.stderr[-2000:].decode("utf-8", "replace").strip()
    text = message or f"exit status {outcome.exit_code}"
    return ToolFailed(f"{text}\n{tail}" if tail else text, record=record, outcome=outcome)
