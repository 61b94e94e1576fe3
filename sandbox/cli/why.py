"""`sandbox why`: would a profile permit this, by which rule, and where is that written?"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sandbox.cli import options

if TYPE_CHECKING:
    from sandbox.why import Answer

DENIED = 1

Connect = Annotated[list[str] | None, typer.Option(help="A destination.", metavar="HOST:PORT")]
Read = Annotated[list[str] | None, typer.Option(help="A path to read.", metavar="PATH")]
Write = Annotated[list[str] | None, typer.Option(help="A path to write.", metavar="PATH")]
Exec = Annotated[list[str] | None, typer.Option("--exec", help="A program to execute.", metavar="COMMAND")]
Http = Annotated[tuple[str, str] | None, typer.Option(help="An HTTP request.", metavar="METHOD URL")]


def register(app: typer.Typer) -> None:
    app.command()(why)


def why(
    profile: options.Profile = "shell",
    connect: Connect = None,
    read: Read = None,
    write: Write = None,
    execute: Exec = None,
    http: Http = None,
    as_json: options.AsJson = False,
) -> None:
    """Say whether a profile permits something, by which rule, and where that is written. Nothing is run or sent.

    Exit status: 0 when all of it is permitted, 1 when something is not, 125 when the profile or a question is wrong.
    """
    from sandbox.errors import ManifestError
    from sandbox.profiles import resolve
    from sandbox.why import Judge

    judge = Judge(resolve(profile))
    answers = [judge.connect(text) for text in connect or ()]
    answers += [judge.read(path) for path in read or ()]
    answers += [judge.write(path) for path in write or ()]
    answers += [judge.execute(command) for command in execute or ()]
    answers += [judge.request(*http)] if http else []
    if not answers:
        raise ManifestError("nothing is asked", hint="--connect HOST:PORT, --read PATH, --write PATH, --exec COMMAND, "
                            "--http METHOD URL")  # fmt: skip
    if as_json:
        typer.echo(json.dumps([answer.to_json() for answer in answers], indent=2))
    else:
        for answer in answers:
            _show(answer)
    if not all(answer.allowed for answer in answers):
        raise typer.Exit(DENIED)


def _show(answer: Answer) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    verdict = Text("allowed", style="green") if answer.allowed else Text("denied", style="red")
    console.print(Text.assemble(verdict, "  ", Text(answer.question, style="bold")))
    console.print(Text(f"  {answer.reason}"))
    if answer.rule:
        console.print(Text(f"  by {answer.rule}" + (f"  ({answer.origin})" if answer.origin else "")))
    for note in answer.notes:
        console.print(Text(f"  note: {note}", style="dim"))
