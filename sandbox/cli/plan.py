"""`sandbox plan`: what a call under a profile would do on this host, decided without any privilege."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox.cli import options

if TYPE_CHECKING:
    from sandbox.plan import LaunchPlan, Limit
    from sandbox.profiles import Resolved

_DETAIL_MAX_CHARS = 160


def register(app: typer.Typer) -> None:
    app.command(context_settings={"allow_interspersed_args": False})(options.with_settings(plan))


def plan(
    settings: dict[str, Any],
    command: Annotated[
        list[str] | None, typer.Argument(help="The program and its arguments; by default true.", metavar="COMMAND")
    ] = None,
    profile: options.Profile = "shell",
    as_json: options.AsJson = False,
    state: options.State = None,
) -> None:
    """Print the steps and limits of a call, without running it and without any privilege.

    Exit status: 0; 125 when this host cannot hold the profile, with what is missing and how to get it.
    """
    from sandbox import host, prepare
    from sandbox.audit.store import state_dir
    from sandbox.plan import CallSpec
    from sandbox.planner import decide
    from sandbox.profiles import resolve

    resolved = resolve(profile, overrides=settings or None)
    argv = tuple(command or ("true",))
    spec = CallSpec("program", argv, argv[0], workspace=prepare.workspace(resolved.manifest))
    around = prepare.surroundings(resolved, spec, state_dir(state), {})
    decided = decide(resolved.manifest, spec, host.probe(), around)
    if as_json:
        data = {"profile": resolved.profile, "manifest_sha256": resolved.digest, "plan": decided.to_json()}
        typer.echo(json.dumps(data, indent=2))
        return
    _show(resolved, decided)


def _show(resolved: Resolved, decided: LaunchPlan) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"[bold]{resolved.profile or 'manifest'}[/]  {resolved.digest}", soft_wrap=True)
    console.print()
    limits = Table("control", "asked", "applied", "holds", box=None, pad_edge=False, header_style="dim")
    limits.add_column("by", overflow="fold")
    colours = {"full": "green", "partial": "yellow", "none": "red"}
    for limit in decided.limits:
        applied = "-" if limit.applied is None else _amount(limit, limit.applied)
        if limit.applied == limit.requested:
            applied = "="
        by = Text(limit.mechanism)
        if limit.level != "full" and limit.reason:
            by.append(f" ({limit.reason})", style="dim")
        asked = _amount(limit, limit.requested)
        limits.add_row(limit.control, asked, applied, Text(limit.level, colours[limit.level]), by)
    console.print(limits)
    console.print()
    for index, step in enumerate(decided.steps, 1):
        line = Text(f"{index:3}. ").append(step.name, "bold").append(f" {step.where}", "dim")
        console.print(line.append(f" {_detail(step.args)}"), soft_wrap=True)
    for note in resolved.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _amount(limit: Limit, value: int | float | str | None) -> str:
    from sandbox.units import format_rate, format_size, format_time

    if isinstance(value, str) or value is None:
        return str(value)
    if limit.control in ("memory", "disk", "output"):
        return format_size(int(value))
    if limit.control == "io":
        return format_rate(int(value))
    return format_time(value) if limit.control.endswith("_time") else f"{value:g}"


def _detail(args: object) -> str:
    text = json.dumps(args) if args else ""
    return text if len(text) <= _DETAIL_MAX_CHARS else f"{text[: _DETAIL_MAX_CHARS - 3]}..."
