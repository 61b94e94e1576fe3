"""`sandbox plan`: what a call under a profile would do on this host, decided without any privilege."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sandbox.cli import options
from sandbox.errors import LauncherUnavailable, Unenforceable

if TYPE_CHECKING:
    from sandbox.manifest import Manifest
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
    from sandbox.profiles import resolve

    resolved = resolve(profile, overrides=settings or None)
    decide = _decider(resolved, tuple(command or ("true",)), state)
    refusal, decided = None, None
    try:
        decided = decide(resolved.manifest)
    except Unenforceable as error:
        refusal = error
        with contextlib.suppress(Unenforceable):
            decided = decide(_accepting(resolved.manifest, error.controls))
    if as_json:
        typer.echo(json.dumps(_as_json(resolved, decided, refusal), indent=2))
    else:
        _show(resolved, decided, refusal)
    if refusal is not None:
        raise refusal


def _decider(resolved: Resolved, argv: tuple[str, ...], state: str | None) -> Callable[[Manifest], LaunchPlan]:
    """What decides a plan for a manifest, with everything that is looked up for that looked up."""
    import subprocess

    from sandbox import host, prepare
    from sandbox.audit.store import state_dir
    from sandbox.planner import decide
    from sandbox.spec import CallSpec

    spec = CallSpec("program", argv, argv[0], workspace=prepare.workspace(resolved.manifest), is_single=True)
    around = prepare.surroundings(resolved, spec, state_dir(state), {})
    try:
        facts = host.probe_apart()
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise LauncherUnavailable(str(error), hint="`sandbox doctor` looks closer") from error
    return lambda manifest: decide(manifest, spec, facts, around)


def _accepting(manifest: Manifest, short: Iterable[str]) -> Manifest:
    """The manifest as it would be if what does not hold here were accepted, to show a plan that is refused."""
    from sandbox.manifest import CONTROLS

    isolation = manifest.isolation
    known = [name for name in CONTROLS if name in {*short, *isolation.best_effort}]
    known += ["gpu"] if any(name.startswith("gpu_") for name in short) and "gpu" not in known else []
    accepting = isolation.model_copy(update={"best_effort": tuple(known), "required": ()})
    return manifest.model_copy(update={"isolation": accepting})


def _as_json(resolved: Resolved, decided: LaunchPlan | None, refusal: Unenforceable | None) -> dict[str, Any]:
    """`refused` is null, or why this plan would not be carried out; `plan` then is what it would be otherwise."""
    refused = refusal and {"message": refusal.message, "hint": refusal.hint, "controls": refusal.controls}
    plan = decided.to_json() if decided is not None else None
    return {"profile": resolved.profile, "manifest_sha256": resolved.digest, "refused": refused, "plan": plan}


def _show(resolved: Resolved, decided: LaunchPlan | None, refusal: Unenforceable | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    console.print(f"[bold]{resolved.profile or 'manifest'}[/]  {resolved.digest}", soft_wrap=True)
    if refusal is not None:
        rest = ": what this host does not hold is marked in the plan" if decided is not None else ""
        console.print(Text(f"refused here{rest}", "red"), soft_wrap=True)
    console.print()
    if decided is None:
        for name, reason in (refusal.controls if refusal is not None else {}).items():
            console.print(Text(f"{name}: ", "bold").append(reason, "not bold"), soft_wrap=True)
        return
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
        level = Text(limit.level, colours[limit.level])
        if refusal is not None and limit.control in refusal.controls:
            level.append(" refused", "red")
        limits.add_row(limit.control, asked, applied, level, by)
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
