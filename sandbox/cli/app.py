"""The application: finds the command, imports only what it needs, makes our errors one clear message and exit 125."""

from __future__ import annotations

import importlib
import sys

import typer

from sandbox import __version__
from sandbox.cli import FAILED, Ended
from sandbox.cli.complain import complain
from sandbox.errors import SandboxError

# Command -> module; a module has `register(app)` for a command or `app` for a group.
COMMANDS = {
    "run": "run",
    "shell": "shell",
    "plan": "plan",
    "doctor": "doctor",
    "profile": "profile",
    "audit": "audit",
    "changes": "changes",
    "gpu": "gpu",
    "why": "why",
    "bench": "bench",
    "pull": "pull",
}
# Their exit status is a tool's: what we refuse has to be told apart from whatever a tool can say.
RUNNING = ("run", "shell")
USAGE = 2


def _show_version(*, value: bool) -> None:
    if value:
        typer.echo(f"toolcall-sandbox {__version__}")
        raise typer.Exit


def build(names: list[str]) -> typer.Typer:
    """The application with these commands in it."""
    app = typer.Typer(
        name="sandbox",
        help="Run each tool call of an AI agent in its own single-use container, and keep a record of it.",
        epilog="Start with: sandbox doctor; sandbox run -- id; sandbox audit list",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def top(
        version: bool = typer.Option(
            False,
            "--version",
            callback=lambda value: _show_version(value=value),
            is_eager=True,
            help="Show the version.",
            metavar="",
        ),
    ) -> None:
        """Run each tool call of an AI agent in its own single-use container, and keep a record of it."""

    for name in names:
        module = importlib.import_module(f"sandbox.cli.{COMMANDS[name]}")
        if hasattr(module, "register"):
            module.register(app)
        else:
            app.add_typer(module.app, name=name)
    return app


def load(argv: list[str]) -> typer.Typer:
    """The application with what this command line needs of it."""
    asked = argv[1] if len(argv) > 1 else ""
    return build([asked] if asked in COMMANDS else list(COMMANDS))


def run(app: typer.Typer, argv: list[str]) -> None:
    """Do what the command line asks for, and end with its exit status."""
    asked = argv[1] if len(argv) > 1 else ""
    try:
        app(argv[1:], prog_name="sandbox")
    except Ended:
        raise
    except SystemExit as end:
        if end.code == USAGE and asked in RUNNING:
            sys.exit(FAILED)
        raise
    except SandboxError as error:
        complain(error)
        sys.exit(FAILED)
