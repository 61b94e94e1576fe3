"""Numbers with units, as a profile writes them: "512MiB", "30s", "50MiB/s".

A bare number is refused on purpose: `memory = 512` could mean bytes or mebibytes, and a limit that is a million
times too small or too large is found only in production. Inside, the unit is part of the field's name instead.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

SIZES: Final = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
TIMES: Final = {
    "ms": Decimal("0.001"),
    "s": Decimal(1),
    "min": Decimal(60),
    "h": Decimal(3600),
    "d": Decimal(86400),
}
UNLIMITED: Final = "unlimited"

SIZE_PATTERN: Final = r"^\d{1,20}(\.\d{1,20})? ?(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)$"
RATE_PATTERN: Final = r"^\d{1,20}(\.\d{1,20})? ?(B|KiB|MiB|GiB|TiB|kB|MB|GB|TB)/s$"
TIME_PATTERN: Final = r"^\d{1,20}(\.\d{1,20})? ?(ms|s|min|h|d)$"

# ASCII only: `\d` alone also takes digits of other scripts, which Decimal would accept silently.
_NUMBER = re.compile(r"([+-]?\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of "512MiB". Raises ValueError with what is allowed, for anything else."""
    number, unit = _split(text, "a size", SIZES)
    size = number * SIZES[unit]
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def parse_rate(text: str) -> int:
    """Bytes per second of "50MiB/s"."""
    if not text.endswith("/s"):
        raise ValueError(f'{text!r} is not a rate; allowed: a size and "/s", such as "50MiB/s"')
    return parse_size(text[:-2])


def parse_time(text: str) -> float:
    """Seconds of "30s"."""
    number, unit = _split(text, "a time", TIMES)
    return float(number * TIMES[unit])


def format_size(size: int) -> str:
    """The shortest exact form: `parse_size` gives the same number back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % SIZES[unit] == 0:
            return f"{size // SIZES[unit]}{unit}"
    return f"{size}B"


def format_rate(size: int) -> str:
    return f"{format_size(size)}/s"


def format_time(seconds: float) -> str:
    """Seconds, exactly: `parse_time` gives the same number back (for anything above a microsecond)."""
    return f"{int(seconds)}s" if seconds == int(seconds) else f"{Decimal(repr(seconds)):f}s"


def _split(text: str, what: str, units: dict[str, int] | dict[str, Decimal]) -> tuple[Decimal, str]:
    allowed = f"allowed: a number and one of {', '.join(units)}"
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not {what}; {allowed}")
    number, unit = match.groups()
    if unit in units:
        return Decimal(number), unit
    if not unit:
        raise ValueError(f"{text!r} has no unit; {allowed}")
    near = next((u for u in units if u.lower() in (unit.lower(), f"{unit.lower()}ib", f"{unit.lower()}b")), "")
    raise ValueError(
        f"{text!r} has an unknown unit {unit!r}; {allowed}" + (f' (did you mean "{near}"?)' if near else "")
    )
