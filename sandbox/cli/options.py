"""Options that `run`, `shell` and `plan` share: each carries the manifest's own name."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sandbox.errors import ManifestError

_LIMITS = "Limits"
_GRANTS = "Grants"
_RECORD = "Record"

Profile = Annotated[str, typer.Option("--profile", "-p", help="A profile's name or file.")]
Memory = Annotated[str | None, typer.Option(help="Memory and swap, such as 512MiB.", rich_help_panel=_LIMITS)]
Pids = Annotated[int | None, typer.Option(help="Tasks (processes and threads) at once.", rich_help_panel=_LIMITS)]
Cpus = Annotated[float | None, typer.Option(help="Cores, such as 1.5.", rich_help_panel=_LIMITS)]
CpuTime = Annotated[str | None, typer.Option(help="CPU time in all, such as 10s.", rich_help_panel=_LIMITS)]
WallTime = Annotated[str | None, typer.Option(help="Time from start to end, such as 30s.", rich_help_panel=_LIMITS)]
Disk = Annotated[str | None, typer.Option(help="Private storage: /tmp, home, workspace.", rich_help_panel=_LIMITS)]
Output = Annotated[str | None, typer.Option(help="Bytes of output in all.", rich_help_panel=_LIMITS)]
Read = Annotated[list[str] | None, typer.Option(help="A host path to show read-only.", rich_help_panel=_GRANTS)]
Write = Annotated[list[str] | None, typer.Option(help="A host path to show writable.", rich_help_panel=_GRANTS)]
Deny = Annotated[list[str] | None, typer.Option(help="A path or glob to hide.", rich_help_panel=_GRANTS)]
AllowHost = Annotated[list[str] | None, typer.Option(help="A host:port to reach.", rich_help_panel=_GRANTS)]
Env = Annotated[list[str] | None, typer.Option(help="A variable to pass on, by name.", rich_help_panel=_GRANTS)]
SetEnv = Annotated[list[str] | None, typer.Option(help="NAME=VALUE to set inside.", rich_help_panel=_GRANTS)]
Workspace = Annotated[
    str | None,
    typer.Option(
        "--workspace", "-w", help="PATH[:rw|cow|ro]: the directory to work in; cow by default.", rich_help_panel=_GRANTS
    ),
]
AllowProtected = Annotated[
    list[str] | None,
    typer.Option(help="A protected kind of file that may be written (git-hooks, ...).", rich_help_panel=_GRANTS),
]
BestEffort = Annotated[
    list[str] | None,
    typer.Option(help="A control that may be less than full on this host.", rich_help_panel=_LIMITS),
]
Why = Annotated[str, typer.Option(help="The reason for this call, for the record.", rich_help_panel=_RECORD)]
State = Annotated[
    str | None, typer.Option(help="Where records are kept.", envvar="SANDBOX_STATE", rich_help_panel=_RECORD)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_MODES = ("rw", "cow", "ro")


def workspace_setting(value: str | None) -> dict[str, str]:
    """`PATH[:MODE]` as overrides. A path that itself ends in such a suffix needs the mode written out."""
    if value is None:
        return {}
    path, colon, mode = value.rpartition(":")
    if colon and mode in _MODES:
        return {"workspace": path, "workspace_mode": mode}
    if colon and path and "/" not in mode:
        raise ManifestError(f"unknown workspace mode {mode!r}; allowed: {', '.join(_MODES)}", where="--workspace")
    return {"workspace": value, "workspace_mode": "cow"}


def overrides(**given: Any) -> dict[str, Any]:
    """Command line values as overrides in the manifest's file form; what was not given is left out."""
    found = {name: value for name, value in given.items() if value not in (None, [], "")}
    found |= workspace_setting(found.pop("workspace", None))
    if "set_env" in found:
        found["env_set"] = dict(_assignment(item) for item in found.pop("set_env"))
    for ours, theirs in (("env", "env_allow"), ("allow_host", "allow_hosts")):
        if ours in found:
            found[theirs] = found.pop(ours)
    return found


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ManifestError(f"{text!r} is not NAME=VALUE", where="--set-env")
    return name, value
