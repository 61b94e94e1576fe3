"""`sandbox run`: one program under a profile, streams and signals passed through, its exit status kept."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox.cli import options
from sandbox.errors import ManifestError, SandboxError
from sandbox.workspace.names import printable

if TYPE_CHECKING:
    from sandbox.outcome import Outcome
    from sandbox.runtime import Sandbox

FAILED = 125


def register(app: typer.Typer) -> None:
    app.command(
        context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
        options_metavar="[OPTIONS] --",
    )(run)


def run(
    command: Annotated[list[str], typer.Argument(help="The program and its arguments.", metavar="COMMAND...")],
    profile: options.Profile = "shell",
    memory: options.Memory = None,
    pids: options.Pids = None,
    cpus: options.Cpus = None,
    cpu_time: options.CpuTime = None,
    wall_time: options.WallTime = None,
    disk: options.Disk = None,
    output: options.Output = None,
    read: options.Read = None,
    write: options.Write = None,
    deny: options.Deny = None,
    allow_host: options.AllowHost = None,
    env: options.Env = None,
    set_env: options.SetEnv = None,
    workspace: options.Workspace = None,
    allow_protected: options.AllowProtected = None,
    best_effort: options.BestEffort = None,
    why: options.Why = "",
    state: options.State = None,
    commit: Annotated[bool, typer.Option(help="Commit a cow workspace when the command ends well.")] = False,
    collect: Annotated[list[str] | None, typer.Option(help="Workspace files to bring out, by pattern.")] = None,
    into: Annotated[Path | None, typer.Option(help="Where collected files go.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the record there as JSON.")] = None,
    terminal: Annotated[
        bool | None, typer.Option("--tty/--no-tty", help="A terminal inside; by default when this is one.")
    ] = None,
) -> None:
    """Run a program in a jail of its own.

    Exit status: the program's own; 124 when the wall time ran out, 125 when nothing ran or we failed, 126/127 when it
    cannot be executed, 128+N when a signal ended it.
    """
    settings = options.overrides(
        memory=memory,
        pids=pids,
        cpus=cpus,
        cpu_time=cpu_time,
        wall_time=wall_time,
        disk=disk,
        output=output,
        read=read,
        write=write,
        deny=deny,
        allow_host=allow_host,
        env=env,
        set_env=set_env,
        workspace=workspace,
        allow_protected=allow_protected,
        best_effort=best_effort,
    )
    if collect and into is None:
        raise ManifestError("--collect needs --into DIR", where="--collect")
    from sandbox.runtime import Sandbox

    with Sandbox(profile, state=state, **settings) as box:
        try:
            outcome = carry_out(box, command, why=why, collect=collect or (), terminal=terminal)
        except SandboxError as error:
            if record and error.record is not None:
                _write_record(record, error.record)
            raise
        status = _after(outcome, commit=commit, into=into, record=record)
    sys.exit(status)


def carry_out(
    box: Sandbox, command: list[str], *, why: str, collect: Any = (), terminal: bool | None = None
) -> Outcome:
    """Run with this process's own streams and signals; tell on standard error what a user should know."""
    from sandbox.cli.terminal import Streams, is_interactive

    tty = is_interactive() if terminal is None else terminal
    streams = Streams(terminal=tty)
    try:
        passing = box.passing(command, streams.fds, why=why, collect=collect, tty=tty)
    finally:
        streams.close_theirs()
    with passing:
        streams.carry(passing.pending)
        outcome = passing.outcome()
    _tell(box, outcome)
    return outcome


def _tell(box: Sandbox, outcome: Outcome) -> None:
    ending = outcome.ending
    record_id = outcome.record.record_id
    _tell_once_about_partial_limits(box, outcome)
    for denial in outcome.denials:
        print(f"sandbox: {denial}", file=sys.stderr)
    if ending.kind in ("ok", "tool_error") and not ending.error_type:
        return
    text = ending.message or ending.kind
    print(f"sandbox: {text} ({ending.kind}, fault: {ending.fault}, record {record_id})", file=sys.stderr)


def _tell_once_about_partial_limits(box: Sandbox, outcome: Outcome) -> None:
    """Say it the first time on this state directory; the record says it every time."""
    partial = sorted(
        name for name, control in outcome.record.enforcement.items() if control.level != "full" and control.requested
    )
    marker = box.state / "told-partial"
    if not partial or marker.exists():
        return
    print(
        f"sandbox: here {', '.join(partial)} hold only in part (best_effort); "
        "`sandbox doctor` says how to get the full thing. Said once.",
        file=sys.stderr,
    )
    marker.touch()


def _after(outcome: Outcome, *, commit: bool, into: Path | None, record: Path | None) -> int:
    """Write what was asked for; returns the exit status."""
    status = outcome.exit_code
    if record is not None:
        _write_record(record, outcome.record)
    if into is not None:
        _write_files(into, outcome)
    if outcome.changes is not None:
        status = _changes(outcome, commit=commit, status=status)
    return status


def _write_record(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record.to_json(), indent=2) + "\n", encoding="utf-8")


def _write_files(into: Path, outcome: Outcome) -> None:
    from sandbox.workspace.deliver import write_collected

    into.mkdir(parents=True, exist_ok=True)
    written, skipped = write_collected(into, outcome.files)
    print(f"sandbox: {len(written)} files collected into {into}", file=sys.stderr)
    for path, reason in skipped:
        print(f"sandbox: {path} was left out: {reason}", file=sys.stderr)


def _changes(outcome: Outcome, *, commit: bool, status: int) -> int:
    changes = outcome.changes
    kept = f"sandbox changes show|commit|discard {outcome.record.record_id}"
    if not commit or not outcome.ok:
        print(f"sandbox: {_counted(changes)}; kept: {kept}", file=sys.stderr)
        return status
    result = changes.commit()
    print(f"sandbox: {len(result.applied)} changes committed", file=sys.stderr)
    for name, items in (("protected", result.protected), ("failed", result.failed), ("skipped", result.skipped)):
        for path, reason in items:
            print(f"sandbox: not committed: {printable(path)} ({name}: {reason})", file=sys.stderr)
    if result.complete:
        return status
    print(f"sandbox: the rest is kept: {kept}", file=sys.stderr)
    return FAILED


def _counted(changes: Any) -> str:
    text = f"{len(changes.added)} added, {len(changes.modified)} modified, {len(changes.deleted)} deleted"
    return f"{text}, {len(changes.protected)} of them protected" if changes.protected else text
