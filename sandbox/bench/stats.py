"""What is said about a list of measurements. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `count` measurements, in their unit."""

    count: int
    least: float
    p10: float
    median: float
    p95: float
    p99: float
    most: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the (sorted) measurements lie, interpolated between neighbours.

    Raises ValueError for none, and for a share outside 0 to 1.
    """
    if not ordered or not 0 <= share <= 1:
        raise ValueError(f"no quantile {share} of {len(ordered)} measurements")
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summarise(values: Sequence[float]) -> Summary:
    """Raises ValueError for none."""
    ordered = sorted(values)
    p10, median, p95, p99 = (quantile(ordered, share) for share in (0.10, 0.50, 0.95, 0.99))
    return Summary(len(ordered), ordered[0], p10, median, p95, p99, ordered[-1])


def ratios(medians: Mapping[str, float], to: str) -> dict[str, float]:
    """How many times as long as `to` each takes. Empty when `to` was not measured."""
    base = medians.get(to, 0.0)
    return {name: value / base for name, value in medians.items()} if base > 0 else {}
