"""Budgets of a call, and of each host in it: bytes each way, rate, connections. Pure: the clock is passed in.

Byte budgets are exact: what may be read from a socket is asked first and spent afterwards, in one thread, so that not
one byte more than the budget passes, over all flows together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

UP = "upload"
DOWN = "download"
UNLIMITED = 1 << 62


class Limits(NamedTuple):
    """What a policy sets; None is no limit of that kind. The rate counts both ways together."""

    upload_max_bytes: int | None = None
    download_max_bytes: int | None = None
    rate_bytes_per_s: int | None = None
    connections_max: int | None = None
    connections_at_once: int | None = None
    flow_time_s: float | None = None
    idle_time_s: float | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Limits:
        return cls(**data)


class Meter:
    """The counters of one call, or of one host within it."""

    __slots__ = ("_bucket", "at_once", "connections", "down", "down_max", "limits", "up", "up_max", "whose")

    def __init__(self, limits: Limits, whose: str = "") -> None:
        """`whose`: what stands before its budgets' names, "host_" for one host's."""
        self.limits = limits
        self.whose = whose
        self.up = self.down = 0
        self.connections = self.at_once = 0
        self.up_max = UNLIMITED if limits.upload_max_bytes is None else limits.upload_max_bytes
        self.down_max = UNLIMITED if limits.download_max_bytes is None else limits.download_max_bytes
        self._bucket = TokenBucket(limits.rate_bytes_per_s) if limits.rate_bytes_per_s else None

    def left(self, direction: str) -> int:
        return self.up_max - self.up if direction is UP else self.down_max - self.down

    def spend(self, direction: str, count: int) -> None:
        if direction is UP:
            self.up += count
        else:
            self.down += count
        if self._bucket is not None:
            self._bucket.take(count)

    @property
    def has_rate(self) -> bool:
        return self._bucket is not None

    @property
    def chunk_bytes(self) -> int:
        """How much to read at once, so that a slow rate is a trickle and no stop-and-go."""
        return max(512, (self.limits.rate_bytes_per_s or UNLIMITED) // 16)

    def wait_s(self, now: float) -> float:
        """How long until the rate permits another read; 0 for at once."""
        return self._bucket.wait_s(now) if self._bucket is not None else 0.0

    def refusal(self) -> str:
        """The budget that forbids one more connection; empty when none does."""
        limits = self.limits
        if limits.connections_max is not None and self.connections >= limits.connections_max:
            return f"{self.whose}connections_max"
        if limits.connections_at_once is not None and self.at_once >= limits.connections_at_once:
            return f"{self.whose}connections_at_once"
        return used_up((self,), UP) or used_up((self,), DOWN)


def used_up(meters: Iterable[Meter], direction: str) -> str:
    """The budget of bytes that leaves nothing in this direction; empty when none does."""
    spent = next((meter for meter in meters if meter.left(direction) <= 0), None)
    return "" if spent is None else f"{spent.whose}{direction}_max"


class TokenBucket:
    """A rate with a burst of a quarter of a second; debt is allowed, so that reads need not be cut to the rate."""

    def __init__(self, per_s: float, burst_s: float = 0.25) -> None:
        self._per_s = per_s
        self._burst = max(per_s * burst_s, 1.0)
        self._tokens = self._burst
        self._at: float | None = None

    def take(self, count: float) -> None:
        self._tokens -= count

    def wait_s(self, now: float) -> float:
        """Seconds until there are tokens again."""
        if self._at is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        return 0.0 if self._tokens > 0 else (1.0 - self._tokens) / self._per_s
