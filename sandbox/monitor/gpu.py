"""Findings about GPUs: used without a grant, steady duty as of a miner, a miner's command line. Pure.

A long matrix product or a simulation has the same steady duty as a miner, and a miner can be told to pause: these
rules are evidence for people. What keeps a miner from earning is the network allowlist.
Technique ids: MITRE ATT&CK T1496.001 (compute hijacking), ATLAS AML.T0034.002 (agentic resource consumption).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

# A miner's device works at a flat rate; programs that load data, wait for each other or print vary more.
SM_DEVIATION_MAX: Final = 2.0
# Beyond its start a miner moves next to nothing: work units of some hundred bytes.
PCIE_BYTES_PER_S_MAX: Final = 1 << 20
# Fewer points than this say nothing about a deviation.
POINTS_MIN: Final = 10
_TEXT_MAX: Final = 200

_MINERS: Final = re.compile(
    r"(?:^|/)(?:xmrig|ethminer|t-rex|trex|lolminer|nbminer|gminer|phoenixminer|teamredminer|cpuminer|minerd|bfgminer"
    r"|cgminer|ccminer|srbminer(?:-multi)?|rigel|bzminer|wildrig(?:-multi)?|kawpowminer|onezerominer)(?:\.exe)?$",
    re.IGNORECASE,
)
_POOLS: Final = re.compile(r"(?:^|=)(?:stratum[12]?\+(?:tcp|ssl|tls|udp)|stratum|ethproxy)://", re.IGNORECASE)
_ALGORITHMS: Final = re.compile(
    r"^--?(?:a|algo|algorithm|coin)[= ]?(?:randomx|rx/0|ethash|etchash|kawpow|autolykos2?|octopus|kheavyhash|progpow"
    r"|equihash\S*|cuckatoo\S*|cryptonight\S*|verthash|zelhash|blake3|sha256d)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen and what it may mean. `severity`: "breach" of the manifest, or "suspicious"."""

    rule: str
    severity: str
    title: str
    evidence: dict[str, Any]
    response: str = "note"
    is_mining: bool = True

    def to_json(self) -> dict[str, Any]:
        """As the record has it. Technique ids are our reading of the public lists."""
        return {
            "id": self.rule,
            "title": self.title,
            "severity": self.severity,
            "confidence": "high" if self.severity == "breach" else "low",
            "evidence": [self.evidence],
            "attack": ["T1496.001"] if self.is_mining else [],
            "atlas": ["AML.T0034.002"] if self.is_mining else [],
            "owasp": ["ASI02", "ASI10"] if self.is_mining else [],
            "fault": "tool",
            "response": self.response,
        }


@dataclass(frozen=True, slots=True)
class DutyPoint:
    """One moment of a unit that a call holds."""

    at_s: float
    sm_percent: float
    pcie_bytes_per_s: int | None = None


def gpu_used_without_grant(pid: int, uuid: str, granted: Sequence[str]) -> Finding:
    """A process of a call was seen on a GPU that the call does not hold."""
    held = "no GPU" if not granted else f"{len(granted)} other"
    return Finding(
        "gpu_used_without_grant",
        "breach",
        f"a process of the call was seen on a GPU although it was granted {held}",
        {"pid": pid, "uuid": uuid, "granted": list(granted)},
        response="kill",
    )


def gpu_limit(limit: str, seen: float, allowed: float, evidence: dict[str, Any]) -> Finding:
    """A limit of the GPU's own was crossed, and the call was ended for it."""
    message = f"{limit}: {_number(seen)} seen, {_number(allowed)} allowed"
    return Finding("gpu_limit", "breach", message, evidence, response="freeze, kill", is_mining=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else f"{value:.3f}"


def gpu_steady_duty(points: Sequence[DutyPoint], uuid: str, *, percent: int, time_s: float) -> Finding | None:
    """Whether the last `time_s` were flat at or above `percent` with a quiet bus; None when not, or not yet."""
    if not points:
        return None
    recent = [point for point in points if point.at_s >= points[-1].at_s - time_s]
    if len(recent) < POINTS_MIN or points[-1].at_s - points[0].at_s < time_s:
        return None
    mean = sum(point.sm_percent for point in recent) / len(recent)
    deviation = math.sqrt(sum((point.sm_percent - mean) ** 2 for point in recent) / len(recent))
    pcie = [point.pcie_bytes_per_s for point in recent if point.pcie_bytes_per_s is not None]
    pcie_mean = sum(pcie) / len(pcie) if pcie else None
    if mean < percent or deviation >= SM_DEVIATION_MAX or (pcie_mean is not None and pcie_mean > PCIE_BYTES_PER_S_MAX):
        return None
    return Finding(
        "gpu_steady_duty",
        "suspicious",
        f"the GPU was at {mean:.0f} % without a break for {time_s:.0f} s; mining looks like this, and so do some jobs",
        {
            "uuid": uuid,
            "time_s": time_s,
            "points": len(recent),
            "sm_mean": round(mean, 2),
            "sm_deviation": round(deviation, 2),
            "pcie_bytes_per_s": None if pcie_mean is None else round(pcie_mean),
        },
    )


def miner_argv(argv: Sequence[str], pid: int | None = None) -> Finding | None:
    """Whether a command line is that of a known miner or names a mining pool. Easily evaded by renaming."""
    if not argv:
        return None
    seen = [argv[0]] if _MINERS.search(argv[0]) else []
    seen += [word for word in argv[1:] if _POOLS.search(word) or _ALGORITHMS.match(word)]
    seen += [
        f"{flag} {value}"
        for flag, value in itertools.pairwise(argv)
        if flag.startswith("-") and _ALGORITHMS.match(f"{flag}={value}")
    ]
    if not seen:
        return None
    evidence = {"pid": pid, "matched": [word[:_TEXT_MAX] for word in seen[:8]]}
    return Finding("miner_argv", "suspicious", "a command line looks like a miner's", evidence)
