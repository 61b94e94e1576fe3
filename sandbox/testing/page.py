"""The table launcher x promise, from reports of real runs, as Markdown between two marks of a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sandbox.testing.stage import BROKEN, HELD, NOT_TRIED, REFUSED, Finding, Report
from sandbox.testing.suite import CHECKS

BEGIN: Final = "<!-- made by: python -m sandbox.testing --write FILE -->"
END: Final = "<!-- end of what is made -->"
_SIGNS: Final = {HELD: "held", REFUSED: "refused", BROKEN: "**broken**", NOT_TRIED: "not tried"}
_SECTIONS: Final = {
    "promise": "Least privilege and the record",
    "inside": "Inside",
    "egress": "The way out",
    "limits": "Limits",
}


def title(report: Report) -> str:
    """A report's column: the launcher, with the runtime where one was named."""
    runtime = report.isolation.get("runtime")
    return f"{report.launcher} ({runtime})" if runtime else report.launcher


def table(reports: Sequence[Report]) -> str:
    """Markdown. Every refusal has its words below the table."""
    found = [{finding.check.name: finding for finding in report.findings} for report in reports]
    heads = ["promise", *map(title, reports)]
    lines = [_row(heads), _row(["---"] * len(heads))]
    for section, name in _SECTIONS.items():
        lines.append(_row([f"**{name}**", *[""] * len(reports)]))
        for check in CHECKS:
            if check.section == section:
                lines.append(_row([check.title, *(_sign(one.get(check.name)) for one in found)]))
    said = [
        f"- {title(report)}, {finding.check.title}: {_plain(finding.reason)}" for report, finding in _refusals(reports)
    ]
    return "\n".join([*lines, "", *(["Refused by name, or not held:", "", *said] if said else [])])


def _refusals(reports: Sequence[Report]) -> list[tuple[Report, Finding]]:
    return [(report, finding) for report in reports for finding in report.findings if finding.verdict != HELD]


def _sign(finding: Finding | None) -> str:
    return _SIGNS[finding.verdict] if finding is not None else ""


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def caption(versions: Sequence[str]) -> str:
    """On what the runs were made."""
    info = os.uname()
    kernel = ".".join(info.release.split(".")[:2])
    return "; ".join([f"Linux {kernel}, {info.machine}", *versions]) + "."


def write(path: Path, text: str) -> None:
    """Put `text` between the page's two marks. Raises ValueError for a page without them."""
    page = path.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no place for the table: {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")
