"""`sandbox shell`: a look around inside a profile's jail."""

from __future__ import annotations

import sys

import typer

from sandbox.cli import options
from sandbox.cli.run import carry_out


def register(app: typer.Typer) -> None:
    app.command()(shell)


def shell(
    profile: options.Profile = "shell",
    workspace: options.Workspace = None,
    read: options.Read = None,
    wall_time: options.WallTime = "1h",
    why: options.Why = "a look around",
    state: options.State = None,
) -> None:
    """Open a shell under a profile. Its exit status is ours."""
    from sandbox.runtime import Sandbox

    settings = options.overrides(workspace=workspace, read=read, wall_time=wall_time)
    with Sandbox(profile, state=state, **settings) as box:
        outcome = carry_out(box, ["/bin/sh", "-c", "exec bash --norc -i 2>/dev/null || exec sh -i"], why=why)
    sys.exit(outcome.exit_code)
