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
    if row["permitted"]:
        if not half["happened"]:
            faults.append("what is permitted did not work inside")
        if not [line for line in network_of(half) if line["decision"] == "allow" and line["rule"]]:
            faults.append("the rule that permitted it is not on record")
    elif half["happened"] or not half["clean"]:
        faults.append("NOT CONTAINED")
    denied = {line["host"] for line in network_of(half) if line["decision"] == "deny"}
    # Without nf_tables the kernel refuses what no rule names, and nobody sees it.
    is_seen = "tproxy" in str(half["record"].get("enforcement", {}).get("network"))
    if (missing := sorted(set(row["refused"]) - denied)) and is_seen:
        faults.append(f"not on record as denied: {', '.join(missing)}")
    return faults


def network_of(half: dict[str, Any]) -> list[dict[str, Any]]:
    """The attempts on a call's record. Empty, too, where nobody could see."""
    found: list[dict[str, Any]] = half["record"].get("network") or []
    return found


def show(answer: dict[str, Any], *, inside: bool) -> int:
    """Print the table, one record and the reasons of every failure; returns the exit status."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 132)
    faults = {row["name"]: faults_of(row, inside=inside) for row in answer["rows"]}
    console.print(table_of(answer["rows"], faults, inside=inside))
    if inside:
        console.print(table_of_attempts(answer["rows"]))
    broken = show_audit(console, answer["audit"]) if inside else 0
    for row in answer["rows"]:
        for fault in faults[row["name"]]:
            half = row["without"] if fault == NO_ATTACK or not inside else row["inside"]
            print(f"{row['name']}: {fault}\n  its output: {half['output'][-600:]!a}", file=sys.stderr)
    attacks = [row for row in answer["rows"] if not row["permitted"]]
    total, real = len(attacks), sum(row["without"]["happened"] for row in attacks)
    held = sum(not faults[row["name"]] for row in attacks)
    contained = f", {held} of {total} were contained inside it" if inside else ""
    console.print(f"{real} of {total} attacks were real without the jail{contained}.")
    if inside and (twins := [row for row in answer["rows"] if row["permitted"]]):
        worked = sum(not faults[row["name"]] for row in twins)
        console.print(f"{worked} of {len(twins)} permitted uses of the network worked inside it.")
    return 1 if broken or any(faults.values()) or not faults else 0


def table_of(rows: list[dict[str, Any]], faults: dict[str, list[str]], *, inside: bool) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What ROME did, without our jail and inside it", show_lines=True)
    for heading in ("behaviour", "without", *(("inside", "what stopped it", "record") if inside else ())):
        table.add_column(heading, overflow="fold")
    for row in rows:
        without = row["without"]
        colour = "yellow" if not without["happened"] else "green" if row["permitted"] else "red"
        cells = [Text(row["title"]), Text(without["text"], style=colour)]
        if inside:
            half, wrong = row["inside"], faults[row["name"]]
            cells.append(Text("\n".join([half["text"], *wrong]), style="bold red" if wrong else "green"))
            cells += [
                Text("permitted" if row["permitted"] else half["stopped_by"]),
                Text(record_id(half["record"])[:13]),
            ]
        table.add_row(*cells)
    return table


def table_of_attempts(rows: list[dict[str, Any]]) -> Any:
    """What the records say of the network: attempts that differ in nothing but address and port are one line."""
    from rich.table import Table

    table = Table(title="The network on record: every attempt, by name or address, and by rule")
    for heading in ("call", "where", "port", "looks like", "attempts", "decision", "rule", "reason"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for line in network_of(row["inside"]):
            alike = "" if line["reason"] == "address_not_named" else line["host"]
            facts = (str(line[name] or "") for name in ("transport", "proto", "decision", "rule", "reason", "detail"))
            groups.setdefault((alike, *facts), []).append(line)
        for (_, transport, proto, decision, rule, reason, detail), lines in groups.items():
            hosts, ports = dict.fromkeys(line["host"] for line in lines), sorted({line["port"] for line in lines})
            where = next(iter(hosts)) + (f" … {list(hosts)[-1]} ({len(hosts)})" if len(hosts) > 1 else "")
            count = sum(line.get("count", 1) for line in lines)
            why = f"{reason}: {detail}" if detail and reason else reason
            cells = [row["name"], where, ", ".join(map(str, ports)), proto or transport or "-", str(count), decision]
            table.add_row(*cells, rule or "-", why)
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
