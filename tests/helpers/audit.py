"""Small, complete inputs for audit tests: a manifest, a plan, records, and a chain of them on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sandbox.audit.chain import Chain
from sandbox.audit.record import Closing, Opening, closed_record, opened_record, uuid7

MIB = 1 << 20
MANIFEST: dict[str, Any] = {
    "resources": {
        "memory_bytes": 256 * MIB,
        "pids": 64,
        "cpus": 1.0,
        "cpu_time_s": 10.0,
        "wall_time_s": 30.0,
        "disk_bytes": 64 * MIB,
        "output_bytes": 8 * MIB,
        "io_bytes_per_s": None,
    },
    "network": {"mode": "none", "allow": []},
    "filesystem": {"read": ["/data"], "write": [":workspace"]},
    "environment": {"allow": ["LANG"], "set": {"TOKEN": "hunter2-value"}},
    "audit": {"capture": [], "durability": "flush"},
}
PLAN: dict[str, Any] = {
    "launcher": "jail",
    "steps": [{"name": name, "where": "call", "args": {}} for name in ("mount", "mount", "seccomp")],
    "limits": [
        {
            "control": "memory",
            "requested": 256 * MIB,
            "applied": 256 * MIB,
            "level": "full",
            "mechanism": "cgroup v2",
            "strength": "kernel",
            "reason": "",
        },
        {
            "control": "io",
            "requested": None,
            "applied": None,
            "level": "none",
            "mechanism": "",
            "strength": "none",
            "reason": "no io controller",
        },
    ],
    "argv": ["python3", "-c", "print(1)"],
    "env": {"TOKEN": "hunter2-value", "PATH": "/usr/bin"},
    "cwd": "/workspace",
    "isolation": {"namespaces": ["user", "pid"], "missing": ["landlock"]},
}
OK = {"kind": "ok", "fault": "tool", "exit_code": 0}


def record_id(number: int) -> str:
    return uuid7(1_700_000_000_000_000_000 + number * 1_000_000_000, number.to_bytes(10, "big"))


def start(number: int) -> str:
    return f"2026-11-21T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000000Z"


def opening(number: int = 1, **changes: Any) -> Opening:
    call = {"kind": "program", "argv": ["python3"], "tool": "shell", "why": "a test", "agent": "agent-1"}
    call.update(changes.pop("call", {}))
    fields: dict[str, Any] = {
        "record_id": record_id(number),
        "call_id": str(number),
        "time_start": start(number),
        "call": call,
        "policy": {"profile": "python", "manifest": MANIFEST, "manifest_sha256": "sha256:00"},
        "plan": PLAN,
        "host": {"boot_id": "boot-1"},
    }
    return Opening(**{**fields, **changes})


def closing(ending: Mapping[str, Any] = OK, **changes: Any) -> Closing:
    return Closing(**{"time_end": start(59), "duration_s": 0.25, "ending": ending, **changes})


def pair(number: int = 1, ending: Mapping[str, Any] = OK, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The opened and the closed record of one call; `changes` go to the closing."""
    opened = opened_record(opening(number))
    return opened, closed_record(opened, closing(ending, **changes))


def write_chain(state: Path, count: int, *, chain_id: str = "chain-1", segment_max_bytes: int = 1 << 20) -> Chain:
    """A chain of `count` closed records, still open for more."""
    (state / "chains").mkdir(parents=True, exist_ok=True, mode=0o700)
    chain = Chain(state, chain_id, segment_max_bytes=segment_max_bytes)
    for number in range(count):
        opened, closed = pair(number)
        chain.append_opened(opened)
        chain.append_closed(closed)
    return chain


def die(chain: Chain) -> None:
    """What the kernel does when the owner is killed: its descriptors close, nothing else happens."""
    for name in ("_segment_fd", "_dir_fd", "_lock_fd"):
        if getattr(chain, name) >= 0:
            os.close(getattr(chain, name))
        setattr(chain, name, -1)
    chain._closed = True


@pytest.fixture(autouse=True)
def no_chain_stays_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets tests leave a chain as a running supervisor would, without leaking its descriptors."""
    made: list[Chain] = []
    make = Chain.__init__

    def note(self: Chain, *args: Any, **options: Any) -> None:
        made.append(self)
        make(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Chain, "__init__", note)
        yield
    for chain in made:
        die(chain)
