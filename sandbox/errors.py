"""The whole exception tree. Imports nothing, so that every layer can raise from it.

An error is for a person who has to change something: `str(err)` says where, which value and what is
allowed, and `hint` says what to do about it. A run returns an `Outcome` for whatever the tool caused; these
are raised for what the caller, the host or we caused, and by the decorator for a tool's own failure.
"""

from __future__ import annotations

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


class SandboxError(Exception):
    """Base of everything this package raises.

    `record` is the call's record when there is one; `outcome` the whole outcome when the call ran.
    """

    def __init__(self, message: str, *, hint: str = "", record: Any = None, outcome: Any = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.record = record
        self.outcome = outcome

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class ManifestError(SandboxError, ValueError):
    """The manifest is wrong: `where` is a key path (`resources.memory`) or `file:line key`."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class ProfileError(ManifestError):
    """A profile file is missing, broken, or extends something that cannot be followed."""


class Unenforceable(SandboxError):
    """The host cannot enforce what the manifest asks for, so nothing ran.

    `controls` maps each control's name to the reason why it is missing here.
    """

    def __init__(self, message: str, *, controls: dict[str, str] | None = None, hint: str = "", record: Any = None):
        super().__init__(message, hint=hint, record=record)
        self.controls = controls or {}


class LaunchError(SandboxError):
    """Ours or the host's failure before the tool ran: `step` is the plan's step, `errno` the kernel's answer."""

    def __init__(
        self, message: str, *, step: str = "", errno: int | None = None, hint: str = "", record: Any = None
    ) -> None:
        super().__init__(message, hint=hint, record=record)
        self.step = step
        self.errno = errno


class LauncherUnavailable(LaunchError):
    """The launcher itself is not there: no such runtime, no daemon, no user namespaces."""


class CallError(SandboxError):
    """The call ran, or was stopped; `outcome` and `record` say how it ended."""


class ToolFailed(CallError):
    """The tool's own failure: an exception inside (`type_name`, `traceback_text`) or an exit status."""

    def __init__(
        self,
        message: str,
        *,
        type_name: str = "",
        traceback_text: str = "",
        hint: str = "",
        record: Any = None,
        outcome: Any = None,
    ) -> None:
        super().__init__(message, hint=hint, record=record, outcome=outcome)
        self.type_name = type_name
        self.traceback_text = traceback_text


class LimitExceeded(CallError):
    """A limit ended the call; `limit` is the manifest's name for it (`memory`, `disk`, `output`)."""

    def __init__(self, message: str, *, limit: str, hint: str = "", record: Any = None, outcome: Any = None) -> None:
        super().__init__(message, hint=hint, record=record, outcome=outcome)
        self.limit = limit


class CallTimeout(LimitExceeded, TimeoutError):
    """The wall time ran out."""


class Denied(CallError, PermissionError):
    """The call tried what its manifest does not permit, and was ended for it or could not do its work."""


class Revoked(CallError):
    """The tool, session or principal was revoked by an operator or by a rule."""


class CallLost(CallError):
    """No answer came: the supervisor died. Nothing may be concluded about what the tool did."""


class AuditError(SandboxError):
    """The record could not be written or read."""


class ChainBroken(AuditError):
    """The chain does not verify: `index` is the first bad entry, with what was expected and found."""

    def __init__(self, message: str, *, index: int, expected: str = "", found: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.index = index
        self.expected = expected
        self.found = found


class WorkspaceError(SandboxError):
    """A workspace cannot be used, swept or committed; `conflicts` are (path, why) pairs that stand in the way."""

    def __init__(self, message: str, *, conflicts: tuple[tuple[str, str], ...] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.conflicts = conflicts


class InternalError(SandboxError):
    """Our bug. Please report it with the record id."""
