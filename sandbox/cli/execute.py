"""Carrying out `run` and `shell`: the call with this process's own streams, and what was asked for afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox import kept, prepare_places
from sandbox.cli import FAILED
from sandbox.cli.progress import Progress
from sandbox.cli.terminal import carried, interruptible, is_interactive
from sandbox.context import call_context
from sandbox.errors import ManifestError, SandboxError

if TYPE_CHECKING:
    from sandbox.link import Pending
    from sandbox.outcome import Outcome
    from sandbox.runtime import Sandbox


@dataclass(frozen=True)
class Request:
    """One call as the command line asks for it."""

    command: list[str]
    context: Mapping[str, str] = field(default_factory=dict)
    collect: Sequence[str] = ()
    into: Path | None = None
    commit: bool = False
    record: Path | None = None
    terminal: bool | None = None


def execute(request: Request, profile: str, state: str | None, settings: dict[str, Any]) -> int:
    """Run it and do what was asked for afterwards; returns the exit status."""
    if request.record is not None:
        _check_writable(request.record)
    with interruptible(), Progress("starting") as progress:
        from sandbox.runtime import Sandbox

        tty = is_interactive() if request.terminal is None else request.terminal
        question = kept.ask(profile, settings, prepare_places.state_of(state), tty=tty)
        with Sandbox(profile, state=state, **settings) as box:
            filesystem = box.manifest.filesystem
            if request.commit and not (filesystem.workspace and filesystem.workspace_mode == "cow"):
                raise ManifestError("there is nothing to commit without a cow workspace: -w PATH", where="--commit")
            if question is not None:
                _keep(box, question, kept.ask(profile, settings, question.state, tty=tty), tty=tty)
            try:
                outcome = carry_out(box, request, progress)
            except SandboxError as error:
                if request.record and error.record is not None:
                    _write_record(request.record, error.record)
                raise
            return _after(outcome, request)


def _keep(box: Sandbox, question: kept.Question, again: kept.Question | None, *, tty: bool) -> None:
    """Keep the plan for the next command like this one, if everything was the same before and after it was decided."""
    from sandbox.runtime_keep import answer

    if question == again and (found := answer(box, tty=tty)) is not None:
        kept.keep(question, found)


def carry_out(box: Sandbox, request: Request, progress: Progress) -> Outcome:
    """Run with this process's own streams and signals; tell on standard error what a user should know."""
    from sandbox.cli.tell import tell
    from sandbox.runtime_outcome import program_outcome

    tty = is_interactive() if request.terminal is None else request.terminal

    def hand_over(fds: dict[str, int]) -> Pending:
        with call_context(**request.context):
            return box.passing(request.command, fds, collect=request.collect, tty=tty, is_single=True)

    outcome = program_outcome(carried(hand_over, progress, tty=tty))
    tell(outcome, request.command, box.state)
    return outcome


def _after(outcome: Outcome, request: Request) -> int:
    """Write what was asked for; returns the exit status."""
    status = outcome.exit_code
    if request.record is not None:
        _write_record(request.record, outcome.record)
    if request.into is not None:
        _write_files(request.into, outcome)
    if outcome.changes is not None:
        status = _changes(outcome, commit=request.commit, status=status)
    return status


def _check_writable(path: Path) -> None:
    """Before anything runs: a call whose record cannot be written where it was asked for is better not started."""
    if not path.parent.is_dir() or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ManifestError(f"{path} cannot be written", where="--record")


def _write_record(path: Path, record: Any) -> None:
    try:
        path.write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise SandboxError(f"{path}: {error.strerror}", hint=f"sandbox audit show {record.record_id}") from error


def _write_files(into: Path, outcome: Outcome) -> None:
    from sandbox.cli.tell import say
    from sandbox.workspace.deliver import write_collected

    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SandboxError(f"--into: {into}: {error.strerror}") from error
    written, skipped = write_collected(into, outcome.files)
    say(f"{len(written)} files collected into {into}")
    for path, reason in skipped:
        say(f"{path} was left out: {reason}")


def _changes(outcome: Outcome, *, commit: bool, status: int) -> int:
    from sandbox.cli.tell import say

    changes = outcome.changes
    kept = f"sandbox changes show|commit|discard {outcome.record.record_id}"
    if not commit or not outcome.ok:
        say(f"{_counted(changes)}; kept: {kept}")
        return status
    with Progress("committing"):
        result = changes.commit()
    say(f"{len(result.applied)} changes committed")
    for name, items in (("protected", result.protected), ("failed", result.failed), ("skipped", result.skipped)):
        for path, reason in items:
            say(f"not committed: {path} ({name}: {reason})")
    if result.complete:
        return status
    say(f"the rest is kept: {kept}")
    return FAILED


def _counted(changes: Any) -> str:
    text = f"{len(changes.added)} added, {len(changes.modified)} modified, {len(changes.deleted)} deleted"
    return f"{text}, {len(changes.protected)} of them protected" if changes.protected else text
