"""Judges what the canaries saw and prints it. Outside the world; text from inside is only ever shown as text."""

from __future__ import annotations

import sys
from typing import Any

NO_ATTACK = "it did not work without the jail, so the run inside proves nothing"
FAILURES_OF_OURS = {"refused", "launch_error", "lost"}


def record_id(record: dict[str, Any]) -> str:
    return str(record.get("record_id", ""))


def faults_of(row: dict[str, Any], *, inside: bool) -> list[str]:
    """Why this row is no success: an attack that was none, a wall that did not hold, or a check that saw nothing."""
    faults = []
    if not row["without"]["happened"]:
        faults.append(NO_ATTACK)
    if not inside:
        return faults
    half = row["inside"]
    ending = half["record"].get("ending", {}).get("kind", "")
    if not half["record"]:
        faults.append(f"the call inside left no record (exit status {half['exit_code']})")
    elif ending in FAILURES_OF_OURS:
        faults.append(f"the call inside never ran: {ending}")
    elif not half["attempted"]:
        faults.append("the command inside never started")
    if half["happened"] or not half["clean"]:
        faults.append("NOT CONTAINED")
    return faults


def show(answer: dict[str, Any], *, inside: bool) -> int:
    """Print the table, one record and the reasons of every failure; returns the exit status."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    faults = {row["name"]: faults_of(row, inside=inside) for row in answer["rows"]}
    console.print(table_of(answer["rows"], faults, inside=inside))
    broken = show_audit(console, answer["audit"]) if inside else 0
    for row in answer["rows"]:
        for fault in faults[row["name"]]:
            half = row["without"] if fault == NO_ATTACK or not inside else row["inside"]
            print(f"{row['name']}: {fault}\n  its output: {half['output'][-600:]!a}", file=sys.stderr)
    total, real = len(faults), sum(row["without"]["happened"] for row in answer["rows"])
    contained = f", {sum(not each for each in faults.values())} of {total} were contained inside it" if inside else ""
    console.print(f"{real} of {total} were real without the jail{contained}.")
    return 1 if broken or any(faults.values()) or not faults else 0


def table_of(rows: list[dict[str, Any]], faults: dict[str, list[str]], *, inside: bool) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What ROME did, without our jail and inside it", show_lines=True)
    for heading in ("behaviour", "without", *(("inside", "what stopped it", "record") if inside else ())):
        table.add_column(heading, overflow="fold")
    for row in rows:
        without = row["without"]
        cells = [Text(row["title"]), Text(without["text"], style="red" if without["happened"] else "yellow")]
        if inside:
            half, wrong = row["inside"], faults[row["name"]]
            cells.append(Text("\n".join([half["text"], *wrong]), style="bold red" if wrong else "green"))
            cells += [Text(half["stopped_by"]), Text(record_id(half["record"])[:13])]
        table.add_row(*cells)
    return table


def show_audit(console: Any, audit: dict[str, Any]) -> int:
    """Print one record in full; returns how many of the two checks failed."""
    from rich.rule import Rule
    from rich.text import Text

    console.print(Rule(f"one record in full: sandbox audit show {audit['id']}"))
    console.print(Text(audit["shown"] or f"no record to show: {audit['show_error']}"))
    verdict = "verifies" if audit["verified"] else "DOES NOT VERIFY"
    console.print(Text(f"the chain of all records {verdict}: {audit['verify_text']}"))
    return (not audit["shown"]) + (not audit["verified"])
