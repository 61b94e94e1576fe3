"""`sandbox audit`: list, show, verify and export records. Parses and prints only.

Text that a tool chose never reaches the terminal raw: tables go through `sandbox.audit.render`, JSON is written in
ASCII. `verify` exits with 1 when a chain is broken; what we cannot do at all exits with 125.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

BROKEN, OURS = 1, 125
SHOWN = 50

app = typer.Typer(name="audit", help="Records of past calls: list, show, verify, export.", no_args_is_help=True)

StateOption = Annotated[
    str | None, typer.Option("--state", envvar="SANDBOX_STATE", help="The state directory that holds the records.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Format(StrEnum):
    """`json`: one array of records. `jsonl`: every entry's bytes as they stand in their chains, for `verify`."""

    json = "json"
    jsonl = "jsonl"


def register(main: typer.Typer) -> None:
    """Add the group to the command line."""
    main.add_typer(app)


def _fail(message: str, code: int = OURS) -> NoReturn:
    typer.echo(f"sandbox audit: {message}", err=True)
    raise typer.Exit(code)


@contextmanager
def _errors() -> Iterator[None]:
    from sandbox.errors import SandboxError

    try:
        yield
    except (SandboxError, OSError) as err:
        _fail(str(err))


def _state(ctx: typer.Context, option: str | None) -> Path:
    """This command's --state, else the main command's, else the default."""
    from sandbox.audit.store import state_dir

    above = ctx.find_root().params.get("state")
    return state_dir(option or (str(above) if above else None))


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=True))


def _since(text: str | None) -> str:
    """A point in time as the records write it: `text` is an age (30m, 4h, 2d) or an ISO 8601 time."""
    import re
    from datetime import UTC, datetime, timedelta

    if not text:
        return ""
    age = re.fullmatch(r"(\d{1,6})([smhdw])", text)
    if age:
        unit = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[age[2]]
        moment = datetime.now(UTC) - timedelta(seconds=int(age[1]) * unit)
    else:
        try:
            moment = datetime.fromisoformat(text).astimezone(UTC)
        except ValueError:
            _fail(f"--since {text!r}: give an age such as 30m, 4h, 2d, or a time such as 2026-05-01T12:00:00Z")
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@app.command("list")
def list_records(
    ctx: typer.Context,
    *,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"At most so many. [default: {SHOWN}; with --json all]")
    ] = None,
    since: Annotated[str | None, typer.Option(help="Started since: 30m, 4h, 2d, or an ISO 8601 time.")] = None,
    kind: Annotated[str | None, typer.Option(help="Ended so: ok, tool_error, limit, limit:memory, ..., open.")] = None,
    tool: Annotated[str | None, typer.Option(help="Of the tool with this name.")] = None,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """List records, newest first. With --json: one array of whole records."""
    from sandbox.audit.store import latest, start_time

    earliest = _since(since)

    def keep(entry: dict[str, Any]) -> bool:
        ending, named = entry.get("ending"), entry.get("tool")
        ended = str(ending.get("kind")) if isinstance(ending, Mapping) else "open"
        name = named.get("name") if isinstance(named, Mapping) else None
        fits = kind is None or ended == kind or ended.startswith(f"{kind}:")
        return fits and (tool is None or name == tool) and start_time(entry) >= earliest

    with _errors():
        path = _state(ctx, state)
        wanted = limit or (0 if as_json else SHOWN + 1)
        records = latest(path, wanted, keep)
    if as_json:
        _print_json(records)
        return
    more = limit is None and len(records) > SHOWN
    _print_list(records[:SHOWN] if limit is None else records)
    if more:
        typer.echo(f"only the newest {SHOWN} are shown; --limit N or --json shows more", err=True)
    if not records:
        typer.echo(f"no such records in {path}", err=True)


def _print_list(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from sandbox.audit.render import group, plain, size, status

    if not records:
        return
    # Into a pipe nothing is shortened: 200 columns hold every row.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    table = Table("record", "started", "tool", "ending", "s", "memory", "why", box=None, padding=(0, 2, 0, 0))
    table.columns[0].no_wrap = True
    for record in records:
        times, context = group(record, "time"), group(record, "context")
        cells = (
            plain(record.get("record_id"), 64),
            plain(times.get("time_start"), 80)[:19],
            plain(group(record, "tool").get("name"), 40),
            status(record),
            plain(times.get("duration_s"), 10),
            size(group(record, "usage").get("memory_peak_bytes")),
            plain(context.get("why"), 60),
        )
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)


@app.command()
def show(
    ctx: typer.Context,
    record_id: Annotated[str, typer.Argument(metavar="RECORD_ID", help="An id, the start of one, or `last`.")],
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Show one record: how it ended and whose fault, what was enforced, used, reached, written."""
    from sandbox.audit.store import find

    with _errors():
        record = find(_state(ctx, state), record_id)
    if as_json:
        _print_json(record)
        return
    from rich.console import Console

    from sandbox.audit.render import as_rich

    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(as_rich(record))


@app.command()
def verify(
    ctx: typer.Context,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATH]...", help="State or chain directories, or files of entries. [default: the state]"
        ),
    ] = None,
    *,
    as_json: JsonOption = False,
    state: StateOption = None,
) -> None:
    """Check chains offline: whole, unchanged, in order. Exit status 1 when one is broken."""
    from sandbox.audit.verify import verify_paths, verify_state

    with _errors():
        reports = verify_paths(paths) if paths else verify_state(_state(ctx, state))
    broken = [report for report in reports if report.broken]
    if as_json:
        _print_json({"ok": not broken, "chains": [report.to_json() for report in reports]})
    else:
        _print_reports(reports)
    if broken:
        raise typer.Exit(BROKEN)


def _print_reports(reports: list[Any]) -> None:
    from sandbox.audit.canonical import visible

    for report in reports:
        name = visible(report.chain_id, 120)
        if report.broken:
            typer.echo(f"BROKEN  {name}: {visible(report.broken.message)}")
        for torn in report.torn:
            typer.echo(f"torn    {name}: {visible(torn)}; an interrupted write, nothing before it is touched")
        for record_id in report.open_records:
            typer.echo(f"open    {name}: record {visible(record_id, 64)} (running, or not yet recovered)")
    entries, records = sum(report.entries for report in reports), sum(report.records for report in reports)
    good = sum(report.broken is None for report in reports)
    typer.echo(f"{good} of {len(reports)} chains verify: {records} records in {entries} entries")
    if good:
        which = "This shows" if good == len(reports) else "Of those that do it shows"
        typer.echo(
            f"{which} that nothing in them was changed, taken out or put in since; not that no chain, and no end "
            "of one, is missing."
        )


@app.command()
def export(
    ctx: typer.Context,
    *,
    form: Annotated[Format, typer.Option("--format", help="json: array of records; jsonl: all entries.")] = Format.json,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of stdout.")] = None,
    state: StateOption = None,
) -> None:
    """Write all records (json) or all entries as they stand in their chains (jsonl), oldest chain first."""
    from sandbox.audit.store import entry_lines, latest

    with _errors():
        path = _state(ctx, state)
        if form is Format.json:
            text = json.dumps(list(reversed(latest(path))), indent=2, ensure_ascii=True) + "\n"
            chunks: Iterator[bytes] = iter([text.encode()])
        else:
            chunks = entry_lines(path)
        if output is None:
            sys.stdout.buffer.writelines(chunks)
            sys.stdout.buffer.flush()
        else:
            _write_file(output, chunks)


def _write_file(path: Path, chunks: Iterator[bytes]) -> None:
    """Replace `path` in one move, so that a failure half-way leaves what was there."""
    import os

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "wb") as file:
            file.writelines(chunks)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
