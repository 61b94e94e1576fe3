"""Options that stand for the manifest's settings, shared by `run`, `shell` and `plan`: each has the setting's name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from sandbox.errors import ManifestError

_LIMITS = "Limits"
_GRANTS = "Grants (each may be given several times)"
_RECORD = "Record"
_MODES = ("rw", "cow", "ro")


def complete_profiles(incomplete: str) -> list[str]:
    """For shell completion; a file's path completes as the shell itself does it."""
    from sandbox.profiles import load_names

    return [name for name in load_names() if name.startswith(incomplete)]


def _limit(help: str, metavar: str) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=_LIMITS)


def _grant(help: str, metavar: str) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=_GRANTS)


def _told(help: str, metavar: str, variable: str) -> Any:
    return typer.Option(help=help, metavar=metavar, envvar=variable or None, rich_help_panel=_RECORD)


Profile = Annotated[
    str,
    typer.Option("--profile", "-p", help="A profile's name or file.", metavar="NAME", autocompletion=complete_profiles),
]
Why = Annotated[
    str, typer.Option(help="The reason for this call, for the record.", metavar="TEXT", rich_help_panel=_RECORD)
]
State = Annotated[
    str | None,
    typer.Option(help="Where records are kept.", metavar="DIR", envvar="SANDBOX_STATE", rich_help_panel=_RECORD),
]
Record = Annotated[
    str | None, typer.Option(help="Write the record there as JSON.", metavar="FILE", rich_help_panel=_RECORD)
]
Commit = Annotated[
    bool, typer.Option("--commit", help="Commit a cow workspace when the command ends well.", metavar="")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.", metavar="")]

Workspace = Annotated[
    str | None,
    typer.Option(
        "--workspace",
        "-w",
        help="The directory to work in, as a copy-on-write view (cow, the default), writable (rw) or read-only (ro). "
        "Without it the call starts in an empty private one.",
        metavar="PATH[:MODE]",
    ),
]
Words = list[str] | None
# Name of the parameter -> its option. Setting names as in a profile; `_renamed` has the two that differ.
SETTINGS: dict[str, Any] = {
    "workspace": Workspace,
    "memory": Annotated[str | None, _limit("RAM, swap and private files together.", "SIZE")],
    "pids": Annotated[int | None, _limit("Processes and threads at one time.", "N")],
    "cpus": Annotated[float | None, _limit("Cores' worth of CPU time, such as 1.5.", "N")],
    "cpu_time": Annotated[str | None, _limit("CPU time in all, such as 10s.", "TIME")],
    "wall_time": Annotated[str | None, _limit("Time from start to end, such as 5min.", "TIME")],
    "disk": Annotated[str | None, _limit("Private files: /tmp, home, private workspace.", "SIZE")],
    "output": Annotated[str | None, _limit("Bytes of output in all.", "SIZE")],
    "best_effort": Annotated[Words, _limit("A control that may be less than full here.", "CONTROL")],
    "read": Annotated[Words, _grant("A host path to show read-only.", "PATH")],
    "write": Annotated[Words, _grant("A host path to show writable.", "PATH")],
    "deny": Annotated[Words, _grant("A path or glob to hide, such as '**/.env'.", "PATH")],
    "allow_host": Annotated[Words, _grant("A network destination, such as pypi.org:443.", "HOST:PORT")],
    "env": Annotated[Words, _grant("A variable to pass on.", "NAME")],
    "set_env": Annotated[Words, _grant("A variable to set.", "NAME=VALUE")],
    "allow_protected": Annotated[Words, _grant("A protected kind of file that may be written: git-hooks, ...", "RULE")],
}


# Name of the parameter -> its option: whose call it is, for the record (`cli/context.py`).
CONTEXT: dict[str, Any] = {
    "agent": Annotated[str, _told("Which agent asks.", "NAME", "SANDBOX_AGENT")],
    "session": Annotated[str, _told("Which session of it.", "ID", "SANDBOX_SESSION")],
    "parent": Annotated[str, _told("The record of the call that this one belongs to.", "RECORD", "SANDBOX_PARENT")],
    # Its variable is looked at where it is parsed: what others left in the environment is no mistake of the user's.
    "traceparent": Annotated[str, _told("W3C trace context; else that of $TRACEPARENT.", "TEXT", "")],
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` every option in SETTINGS; it gets them as one argument `settings`: a manifest's overrides."""
    return _with_options(command, "settings", SETTINGS, overrides)


def with_context(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` every option in CONTEXT; it gets them as one argument `context`."""
    from sandbox.cli.context import gather

    return _with_options(command, "context", CONTEXT, gather)


def _with_options(
    command: Callable[..., None], argument: str, table: dict[str, Any], gather: Callable[..., Any]
) -> Callable[..., None]:
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def wrapper(**values: Any) -> None:
        given = {name: values.pop(name) for name in table}
        command(**{argument: gather(**given)}, **values)

    kind = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, kind, default=None, annotation=option) for name, option in table.items()]
    mine = [parameter.replace(kind=kind) for name, parameter in own.items() if name != argument]
    wrapper.__signature__ = inspect.Signature([*mine, *added])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {}
    # What it wraps has other parameters: nobody is to look through to that.
    del wrapper.__wrapped__
    return wrapper


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
    found = {name: value for name, value in given.items() if value not in (None, [])}
    for name, value in found.items():
        # Such as a script's "$SIZE" that is not set: to leave it out would be to weaken in silence.
        if value == "":
            raise ManifestError("the value is empty", where=f"--{name.replace('_', '-')}")
    found |= workspace_setting(found.pop("workspace", None))
    if "set_env" in found:
        found["env_set"] = dict(_assignments(found.pop("set_env")))
    for ours, theirs in (("env", "env_allow"), ("allow_host", "allow_hosts")):
        if ours in found:
            found[theirs] = found.pop(ours)
    return found


def _assignments(texts: Iterable[str]) -> Iterable[tuple[str, str]]:
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            hint = f"--env {text} passes on the variable that you have" if text and not equals else ""
            raise ManifestError(f"{text!r} is not NAME=VALUE", where="--set-env", hint=hint)
        yield name, value


def option_of(key: str) -> str:
    """The option that stands for a manifest's key (`resources.memory`); empty where there is none."""
    renamed = {"environment.allow": "env", "environment.set": "set_env", "network.allow": "allow_host"}
    renamed["filesystem.workspace_mode"] = "workspace"
    if key.startswith("environment.set."):
        key = "environment.set"
    name = renamed.get(key, key.partition(".")[2])
    return f"--{name.replace('_', '-')}" if name in SETTINGS else ""
