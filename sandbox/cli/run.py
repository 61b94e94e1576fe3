"""`sandbox run`: one program under a profile, streams and signals passed through, its exit status kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sandbox.cli import Ended, options
from sandbox.cli.execute import Request, execute
from sandbox.errors import ManifestError


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
    collect: options.Collect = None,
    into: options.Into = None,
    terminal: options.Terminal = None,
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
    target = Path(into) if into is not None else None
    kept = Path(record) if record else None
    request = Request(command, {**context, "why": why}, collect or (), target, commit, kept, terminal)
    raise Ended(execute(request, profile, state, settings))
