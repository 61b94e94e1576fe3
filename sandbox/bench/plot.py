"""Bars as SVG, by hand: no library to install. Logarithmic, since the slowest takes a thousand times the fastest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 900, 230, 110, 22, 56
_OURS, _OTHERS, _TEXT, _LINES = "#1f6feb", "#8b949e", "#24292f", "#d0d7de"


@dataclass(frozen=True, slots=True)
class Bar:
    """`low` and `high` are drawn as a thin line over the bar: the tenth and the 95th percentile."""

    label: str
    value: float
    low: float
    high: float
    ours: bool


def bars(title: str, unit: str, rows: Sequence[Bar]) -> str:
    """One chart, shortest bar first. Raises ValueError without rows."""
    if not rows:
        raise ValueError("nothing to draw")
    rows = sorted(rows, key=lambda row: row.value)
    low = 10 ** math.floor(math.log10(min(row.low for row in rows)))
    high = 10 ** math.ceil(math.log10(max(row.high for row in rows)))
    span = max(1.0, math.log10(high / low))
    height = TOP + ROW * len(rows) + 34

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log10(max(value, low) / low) / span

    parts = [_text(12, 24, title, size=16, weight="bold")]
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        at = x(10.0**power)
        parts.append(f'<line x1="{at:.1f}" y1="{TOP - 8}" x2="{at:.1f}" y2="{height - 26}" stroke="{_LINES}"/>')
        parts.append(_text(at, height - 10, f"{10.0**power:g} {unit}", size=11, anchor="middle"))
    for number, row in enumerate(rows):
        parts += _row(row, TOP + ROW * number, x, unit)
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _row(row: Bar, y: float, x: object, unit: str) -> list[str]:
    assert callable(x)
    middle, start, end = y + ROW / 2 - 2, x(row.low), x(row.high)
    fill = _OURS if row.ours else _OTHERS
    return [
        _text(LEFT - 8, middle + 4, row.label, anchor="end", weight="bold" if row.ours else "normal"),
        f'<rect x="{LEFT}" y="{y}" width="{max(1.0, x(row.value) - LEFT):.1f}" height="{ROW - 6}" fill="{fill}"/>',
        f'<line x1="{start:.1f}" y1="{middle}" x2="{end:.1f}" y2="{middle}" stroke="{_TEXT}"/>',
        _text(max(end, x(row.value)) + 6, middle + 4, f"{row.value:.3g} {unit}"),
    ]


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{_TEXT}">{escape(text)}</text>'
    )
