"""What a caller wants run: frozen data. The planner makes a plan of it; no other process than the caller's loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

WorkspaceMode = Literal["private", "rw", "cow", "ro"]


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where the call works. `host_path` is empty for a private workspace."""

    mode: WorkspaceMode = "private"
    host_path: str = ""
    jail_path: str = "/workspace"


@dataclass(frozen=True, slots=True)
class CallSpec:
    """What the caller wants run under a manifest; the manifest itself says what it may do.

    `kind` "program": `argv` is executed. "function": `argv` is the interpreter with our runner, the function
    and its arguments travel as bytes on the request descriptor. `tool` names it in the record. `is_single`: its caller
    makes no other, so nothing is made ready for a next one.
    """

    kind: Literal["program", "function"]
    argv: tuple[str, ...]
    tool: str
    cwd: str = ""
    workspace: Workspace = Workspace()
    tty: bool = False
    collect: tuple[str, ...] = ()
    why: str = ""
    agent: str = ""
    session: str = ""
    trace_id: str = ""
    span_id: str = ""
    parent_record_id: str = ""
    module: str = ""
    source_sha256: str = ""
    arguments_sha256: str = ""
    arguments: Any = None
    preload: tuple[str, ...] = ()
    is_single: bool = False
