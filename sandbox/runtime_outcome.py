"""The outcome of a program from what the supervisor says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sandbox.audit.view import Record
from sandbox.ending import Ending
from sandbox.outcome import Outcome


def program_outcome(message: Mapping[str, Any], *, value: Any = None) -> Outcome:
    """Build the outcome from what the supervisor sent: bytes and JSON, nothing that could run.

    `value`: what a function returned, decoded.
    """
    sections = message["sections"]
    return Outcome(
        ending=Ending(**{name: message["ending"][name] for name in Ending.__slots__}),
        record=Record.of_line(sections["record"]),
        value=value,
        stdout=sections.get("stdout", b""),
        stderr=sections.get("stderr", b""),
        files={name.removeprefix("file:"): data for name, data in sections.items() if name.startswith("file:")},
        changes=_changes(message),
        denials=tuple(message.get("denials", ())),
    )


def _changes(message: Mapping[str, Any]) -> Any:
    if not message.get("changes"):
        return None
    from sandbox.workspace import Changeset

    return Changeset.load(Path(message["changes"]))
