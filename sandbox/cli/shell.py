"""`sandbox shell`: a look around inside a profile's jail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from sandbox.cli import Ended, options
from sandbox.cli.execute import Request, execute

# Its argument is the profile's name. Bash where there is one, without the start files of the system.
_SCRIPT = """
test -t 0 || exec sh
echo "sandbox: profile $0, everything not granted is absent; ^D or exit leaves" >&2
PS1="(sandbox $0) \\$PWD \\$ "; export PS1
command -v bash >/dev/null && PS1="(sandbox $0) \\\\w \\\\$ " exec bash --norc --noprofile -i
exec sh -i
"""


def register(app: typer.Typer) -> None:
    app.command()(options.with_context(options.with_settings(shell)))


def shell(
    settings: dict[str, Any],
    context: dict[str, str],
    profile: options.Profile = "shell",
    commit: options.Commit = False,
    why: options.Why = "a look around",
    record: options.Record = None,
    state: options.State = None,
) -> None:
    """Open a shell under a profile, for an hour unless --wall-time says otherwise. Its exit status is the shell's."""
    settings.setdefault("wall_time", "1h")
    command = ["/bin/sh", "-c", _SCRIPT, profile]
    request = Request(command, {**context, "why": why}, commit=commit, record=Path(record) if record else None)
    raise Ended(execute(request, profile, state, settings))
