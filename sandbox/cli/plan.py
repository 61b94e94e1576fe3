"""`sandbox plan`: what a call under a profile would do on this host, decided without any privilege."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sandbox.cli import options

if TYPE_CHECKING:
    from sandbox.plan import LaunchPlan
    from sandbox.profiles import Resolved


def register(app: typer.Typer) -> None:
    app.command()(plan)


def plan(
    command: Annotated[list[str] | None, typer.Argument(help="The program and its arguments.")] = None,
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
    workspace: options.Workspace = None,
    best_effort: options.BestEffort = None,
    as_json: options.AsJson = False,
) -> None:
    """Print the steps and limits of a call, without running it."""
    from sandbox import host, prepare
    from sandbox.audit.store import state_dir
    from sandbox.plan import CallSpec
    from sandbox.planner import decide
    from sandbox.profiles import resolve

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
        workspace=workspace,
        best_effort=best_effort,
    )
    resolved = resolve(profile, overrides=settings or None)
    argv = tuple(command or ("true",))
    spec = CallSpec("program", argv, argv[0], workspace=prepare.workspace(resolved.manifest))
    around = prepare.surroundings(resolved.manifest, spec, state_dir(), {})
    decided = decide(resolved.manifest, spec, host.probe(), around)
    if as_json:
        data = {"profile": resolved.profile, "manifest_sha256": resolved.digest, "plan": decided.to_json()}
        typer.echo(json.dumps(data, indent=2))
        return
    _show(resolved, decided)


def _show(resolved: Resolved, decided: LaunchPlan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"[bold]{resolved.profile or 'manifest'}[/]  {resolved.digest}", soft_wrap=True)
    limits = Table("control", "asked", "applied", "holds", "by", box=None, pad_edge=False, header_style="dim")
    colours = {"full": "green", "partial": "yellow", "none": "red"}
    for limit in decided.limits:
        applied = "-" if limit.applied is None else str(limit.applied)
        holds = f"[{colours[limit.level]}]{limit.level}[/]"
        limits.add_row(limit.control, str(limit.requested), applied, holds, limit.mechanism)
    console.print(limits)
    console.print()
    for index, step in enumerate(decided.steps, 1):
        detail = _detail(step.args)
        console.print(f"{index:3}. [bold]{step.name}[/] [dim]{step.where}[/] {detail}", soft_wrap=True, markup=True)
    for note in resolved.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _detail(args: object) -> str:
    from rich.markup import escape

    text = json.dumps(args) if args else ""
    return escape(text if len(text) <= 160 else f"{text[:157]}...")
