"""A record for people: one line, a terminal view (rich, imported when used) and a small HTML table.

Everything that a tool, an agent or a path could have chosen goes through `visible` and reaches rich as Text, never as
markup: escape codes, newlines and characters that hide or reorder text come out as what they are.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sandbox.audit.canonical import visible

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

SHOWN_MAX = 20
TEXT_MAX_CHARS = 400
_STYLES = {"full": "green", "partial": "yellow", "none": "red", "within": "green", "exceeded": "red"}


def group(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A group of the record, empty when it has none: also entries that are not ours must be shown."""
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def plain(value: Any, max_chars: int = TEXT_MAX_CHARS) -> str:
    """Any value as one safe line; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return visible(str(value), max_chars)


def size(value: Any) -> str:
    """A number of bytes in the largest unit that leaves at least one."""
    if not isinstance(value, (int, float)):
        return plain(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def amount(name: str, value: Any) -> str:
    """A value in the unit that its control or field has."""
    if name in ("memory", "disk", "output", "io") or name.endswith("_bytes"):
        return size(value)
    if isinstance(value, (int, float)) and (name in ("wall_time", "cpu_time") or name.endswith("_s")):
        return f"{plain(float(value))} s"
    if isinstance(value, Mapping):
        return ", ".join(f"{plain(key)} {plain(item)}" for key, item in value.items())
    return plain(value)


def status(record: Mapping[str, Any]) -> str:
    """How it ended and whose fault that was, in a few words."""
    ending = group(record, "ending")
    if not ending:
        return "open (running, or not yet recovered)"
    words = [plain(ending.get("kind"), 80)]
    if ending.get("kind") != "ok":
        words.append(f"fault={plain(ending.get('fault'), 20)}")
    if ending.get("exit_code") is not None:
        words.append(f"exit={plain(ending['exit_code'], 20)}")
    if ending.get("signal") is not None:
        words.append(f"signal={plain(ending['signal'], 20)}")
    return " ".join(words)


def facts(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The label and text lines at the top of every view; those without a value are left out."""
    context, tool, policy = group(record, "context"), group(record, "tool"), group(record, "policy")
    command, times, agent = group(record, "command"), group(record, "time"), group(record, "agent")
    duration = times.get("duration_s")
    lines = {
        "ending": status(record),
        "message": plain(group(record, "ending").get("message")),
        "tool": " ".join(filter(None, (plain(tool.get("name")), plain(tool.get("type"))))),
        "command": " ".join(plain(word, 120) for word in _list(command.get("argv"))[:SHOWN_MAX]),
        "why": plain(context.get("why")),
        "agent": plain(agent.get("name")),
        "session": plain(context.get("session")),
        "trace": " ".join(filter(None, (plain(context.get("trace_id")), plain(context.get("span_id"))))),
        "parent": plain(context.get("parent_record_id")),
        "started": plain(times.get("time_start")) + (f", took {plain(duration)} s" if duration is not None else ""),
        "profile": " ".join(filter(None, (plain(policy.get("profile")), plain(policy.get("manifest_sha256"))))),
        "usage": _usage(group(record, "usage")),
        "degraded": ", ".join(plain(name) for name in _list(group(record, "isolation").get("degraded"))),
        "left out": amount("", group(record, "truncated")),
    }
    return ((label, text) for label, text in lines.items() if text)


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _usage(usage: Mapping[str, Any]) -> str:
    # What was in use at the very end of a call says nothing, and the sum of both kinds of CPU time stands there twice.
    skip = ("sources", "gpu", "memory_current_bytes", "pids_current", "cpu_usage_s")
    return ", ".join(
        f"{plain(name.removesuffix('_bytes').removesuffix('_s'))} {amount(name, value)}"
        for name, value in usage.items()
        if name not in skip and value not in (None, 0, {})
    )


def digests(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The digests of what went in and came out, and where the record stands in its chain."""
    tool, output, integrity = group(record, "tool"), group(record, "output"), group(record, "integrity")
    lines = {
        "arguments": tool.get("arguments_sha256"),
        "result": output.get("result_sha256"),
        "stdout": _sized(output, "stdout"),
        "stderr": _sized(output, "stderr"),
        "entry": f"sha256:{integrity['hash']}" if integrity.get("hash") else None,
        "chain": f"{integrity['chain']} entry {integrity.get('seq')}" if integrity.get("chain") else None,
    }
    return ((label, plain(text)) for label, text in lines.items() if text)


def _sized(output: Mapping[str, Any], name: str) -> str | None:
    value, length = output.get(f"{name}_sha256"), output.get(f"{name}_bytes")
    return f"{value} ({size(length)})" if value else None


def as_rich(record: Mapping[str, Any]) -> RenderableType:
    """The terminal view: facts, enforcement beside what was seen, network, files, digests."""
    from rich.console import Group
    from rich.panel import Panel

    parts: list[RenderableType] = [_pairs(facts(record)), *_tables(record), _pairs(digests(record))]
    good = group(record, "ending").get("kind") == "ok"
    title = _text(f"record {plain(record.get('record_id'), 64)}")
    return Panel(Group(*parts), title=title, title_align="left", border_style="green" if good else "yellow")


def _text(value: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(value, style=style, overflow="fold")


def _pairs(lines: Iterator[tuple[str, str]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(_text(label, "bold"), _text(text))
    return table


def _tables(record: Mapping[str, Any]) -> Iterator[Table]:
    yield from _enforcement(record)
    columns = ("host", "resolved_ip", "port", "decision", "rule", "reason", "bytes_out", "bytes_in")
    yield from _listing("network", _list(record.get("network")), columns)
    for name, items in group(record, "files").items():
        yield from _listing(f"files {plain(name, 40)}", _list(items), ("path", "kind", "size_bytes", "sha256"))
    units = (
        "index",
        "uuid",
        "memory_peak_bytes",
        "seconds",
        "seconds_by",
        "energy_j",
        "energy_shared",
        "processes_peak",
    )
    yield from _listing("gpu", _list(group(record, "usage").get("gpu")), units)
    yield from _listing("findings", _list(record.get("findings")), ("id", "severity", "title", "confidence"))
    yield from _listing("decisions", _list(record.get("decisions")), ("kind", "subject", "decision", "rule", "reason"))


def _enforcement(record: Mapping[str, Any]) -> Iterator[Table]:
    from rich.table import Table

    controls, verdicts = group(record, "enforcement"), group(record, "attestation")
    if not controls:
        return
    table = Table("control", "asked", "applied", "level", "by", "seen", "verdict", box=None, padding=(0, 1, 0, 0))
    for name in controls:
        control, verdict = group(controls, name), group(verdicts, name)
        level, judged = plain(control.get("level")), plain(verdict.get("verdict"))
        by = plain(control.get("mechanism")) + (f" ({plain(control['reason'])})" if control.get("reason") else "")
        table.add_row(
            _text(plain(name, 40)),
            _text(_rate(name, control.get("requested"))),
            _text(_rate(name, control.get("applied"))),
            _text(level, _STYLES.get(level, "")),
            _text(by),
            _text(amount(name, verdict.get("observed"))),
            _text(judged, _STYLES.get(judged, "")),
        )
    yield table


def _rate(name: str, value: Any) -> str:
    """A limit's amount; the one on io is per second, what was seen of it is a total."""
    return f"{amount(name, value)}/s" if name == "io" and value is not None else amount(name, value)


def _listing(title: str, items: list[Any], columns: tuple[str, ...]) -> Iterator[Table]:
    from rich.table import Table

    rows = [item for item in items if isinstance(item, Mapping)]
    used = [name for name in columns if any(row.get(name) is not None for row in rows)]
    if not rows or not used:
        return
    more = f" (first {SHOWN_MAX} of {len(rows)})" if len(rows) > SHOWN_MAX else ""
    table = Table(*used, title=_text(title + more), title_justify="left", box=None, padding=(0, 1, 0, 0))
    for row in rows[:SHOWN_MAX]:
        table.add_row(*(_text(amount(name, row.get(name))) for name in used))
    yield table


def as_html(record: Mapping[str, Any]) -> str:
    """A small table for notebooks."""
    lines = [("record", plain(record.get("record_id"), 64)), *facts(record), *digests(record)]
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(label)}</th><td>{html.escape(text)}</td></tr>"
        for label, text in lines
    )
    return f"<table>{rows}</table>"
