"""`sandbox gpu`: devices and slices, who holds and uses them, and what limits of a call would be held by here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

PERIOD_S = 1.0


def register(app: typer.Typer) -> None:
    app.command(name="gpu")(gpu)


def gpu(
    *,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object; with --watch one a line.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until interrupted.")] = False,
) -> None:
    """Show the GPUs of this host, their leases and use, and what each limit would be enforced by.

    Exit status: 0 GPUs can be granted, 1 they cannot or there are none.
    """
    from sandbox.gpu.report import Report

    report = Report()
    try:
        seen = _watch(report.look, json_output=json_output) if watch else _once(report.look(), json_output=json_output)
    finally:
        report.close()
    raise typer.Exit(0 if seen["gpu"] and not seen["trouble"] else 1)


def _once(seen: dict[str, Any], *, json_output: bool) -> dict[str, Any]:
    if json_output:
        import json

        typer.echo(json.dumps(seen, indent=2))
    else:
        from rich.console import Console

        Console().print(_page(seen), soft_wrap=True)
    return seen


def _watch(look: Any, *, json_output: bool) -> dict[str, Any]:
    import json
    import time

    from rich.live import Live

    seen: dict[str, Any] = look()
    try:
        if json_output:
            while True:
                typer.echo(json.dumps(seen))
                time.sleep(PERIOD_S)
                seen = look()
        with Live(_page(seen), auto_refresh=False) as live:
            while True:
                time.sleep(PERIOD_S)
                seen = look()
                live.update(_page(seen), refresh=True)
    except KeyboardInterrupt:
        return seen


def _page(seen: dict[str, Any]) -> Group:
    from rich.console import Group
    from rich.text import Text

    if not seen["gpu"]:
        return Group(Text("this host has no NVIDIA GPU: there is no /dev/nvidia0"))
    lines: list[Any] = [Text(f"driver {seen['driver'] or 'unknown'}")]
    if seen["trouble"]:
        lines.append(Text(f"no GPU can be granted: {seen['trouble']}", style="red"))
        lines += [Text(f"  fix: {seen['fix']}")] if seen["fix"] else []
    if seen["units"]:
        lines += [_units(seen["units"]), Text(), _limits(seen["units"])]
    if not seen["pids"]["ok"]:
        lines.append(Text(f"limits cannot be polled: {seen['pids']['reason']}\n  fix: {seen['pids']['fix']}"))
    lines += [Text(f"unknown: {item}", style="dim") for item in seen["unknown"]]
    return Group(*lines)


def _units(units: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("gpu", "uuid", "name", "memory", "SM", "power", "lease", "processes"):
        grid.add_column(heading, overflow="fold")
    for unit in units:
        share = f" ({unit['sm_percent']} %)" if unit["parent"] else ""
        grid.add_row(
            f"{unit['index']}{share}",
            unit["uuid"],
            unit["trouble"] or unit["name"],
            f"{_size(unit['memory_used_bytes'])} of {_size(unit['memory_bytes'])}",
            _known(unit["sm_used_percent"], "%"),
            _known(unit["power_watts"], "W"),
            _lease(unit["lease"]),
            _processes(unit["processes"]),
        )
    return grid


def _limits(units: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    grid.add_column("limit held by")
    for unit in units:
        grid.add_column(f"gpu {unit['index']}")
    for name in units[0]["limits"]:
        grid.add_row(name.removeprefix("gpu_"), *(unit["limits"][name]["strength"] for unit in units))
    return grid


def _size(value: int | None) -> str:
    return "unknown" if value is None else f"{value >> 20} MiB"


def _known(value: float | None, suffix: str) -> str:
    return "unknown" if value is None else f"{value:.0f} {suffix}"


def _lease(lease: dict[str, Any] | None) -> str:
    return "free" if lease is None else f"call {lease.get('call_id', '?')}"


def _processes(processes: list[dict[str, Any]] | None) -> str:
    if processes is None:
        return "unknown"
    return ", ".join(f"{item['pid']} ({item['call'] or 'not ours'})" for item in processes) or "none"
