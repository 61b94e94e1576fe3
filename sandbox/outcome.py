"""What a call gives back: an `Outcome` for whatever a tool can cause; `unwrap` turns it into the value or the error."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox.ending import Ending
from sandbox.errors import CallLost, CallTimeout, Denied, LaunchError, LimitExceeded, Revoked, ToolFailed


@dataclass(frozen=True, slots=True)
class Outcome:
    """One call's result: the tool's value or output, how it ended, and the record of it.

    `value`: what a function returned. `stdout`, `stderr`: bytes, bounded by the manifest's `output`. `files`: what
    `collect` asked for, path to bytes. `changes`: a `Changeset` for a `cow` workspace. `denials`: what was tried and
    not permitted. `record`: see `sandbox.audit.view.Record`.
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
