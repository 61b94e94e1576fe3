"""`sandbox run`: one program under a profile, streams and signals passed through, its exit status kept."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox.cli import FAILED, Ended, options
from sandbox.cli.progress import Progress
from sandbox.context import call_context
from sandbox.errors import ManifestError, SandboxError

if TYPE_CHECKING:
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


def register(app: typer.Typer) -> None:
    app.command(
        context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
        options_metavar="[OPTIONS] --",
    )(options.with_context(options.with_settings(run)))


def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.", metavar="COMMAND")],
    settings: dict[str, Any],
    context: dict[str, str],
    profile: options.Profile = "shell",
    commit: options.Commit = False,
    collect: Annotated[
        list[str] | None,
        typer.Option(help="Workspace files to bring out, such as 'out/*.json'; may be repeated.", metavar="GLOB"),
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Where collected files go.", metavar="DIR")] = None,
    terminal: Annotated[
        bool | None,
        typer.Option("--tty/--no-tty", help="A terminal inside; by default when this is one.", metavar=""),
    ] = None,
    why: options.Why = "",
    record: options.Record = None,
    state: options.State = None,
) -> None:
    """Run a program in a jail of its own.

    Exit status: the program's own, and

    124 the wall time ran out
    125 nothing ran, or we failed
    126 the program cannot be executed
    127 there is no such program inside
    128+N signal N ended it (137: also for too much memory)
    """
    if bool(collect) != (into is not None):
        raise ManifestError("--collect GLOB and --into DIR belong together", where="--collect" if collect else "--into")
    kept = Path(record) if record else None
    request = Request(command, {**context, "why": why}, collect or (), into, commit, kept, terminal)
    raise Ended(execute(request, profile, state, settings))


def execute(request: Request, profile: str, state: str | None, settings: dict[str, Any]) -> int:
    """Run it and do what was asked for afterwards; returns the exit status."""
    if request.record is not None:
        _check_writable(request.record)
    with _interruptible(), Progress("starting") as progress:
        from sandbox.runtime import Sandbox

        with Sandbox(profile, state=state, **settings) as box:
            filesystem = box.manifest.filesystem
            if request.commit and not (filesystem.workspace and filesystem.workspace_mode == "cow"):
                raise ManifestError("there is nothing to commit without a cow workspace: -w PATH", where="--commit")
            try:
                outcome = carry_out(box, request, progress)
            except SandboxError as error:
                if request.record and error.record is not None:
                    _write_record(request.record, error.record)
                raise
            return _after(outcome, request)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt where no tool runs ends us as it would end any program, and the call with us."""
    try:
        yield
    except KeyboardInterrupt:
        raise Ended(128 + signal.SIGINT) from None


def carry_out(box: Sandbox, request: Request, progress: Progress) -> Outcome:
    """Run with this process's own streams and signals; tell on standard error what a user should know."""
    from sandbox.cli.tell import tell
    from sandbox.cli.terminal import Streams, is_interactive

    tty = is_interactive() if request.terminal is None else request.terminal
    streams = Streams(terminal=tty)
    try:
        with call_context(**request.context):
            passing = box.passing(request.command, streams.fds, collect=request.collect, tty=tty)
    finally:
        streams.close_theirs()
    with passing:
        streams.carry(passing.pending, progress.stop)
        with Progress("finishing"):
            outcome = passing.outcome()
    progress.stop()
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
