"""The options of `run` as data, and what a plain command line says. Loads next to nothing.

`options.py` makes typer's options of this table, so there is one list. `parse` understands the plain form of a command
line and nothing else: whatever is wrong or out of the ordinary is typer's to read, and its words to the user stay its.
"""

from __future__ import annotations

from sandbox.errors import ManifestError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_MODES = ("rw", "cow", "ro")
_LIMITS = "Limits"
_GRANTS = "Grants (each may be given several times)"
_RECORD = "Record"


class Option:
    """One option. `kind`: text, int, float or words (may be given several times); flag, or switch with its opposite.

    `flags` are its spellings where they are not just `--name`; a switch has its opposite as the last.
    """

    __slots__ = ("environment", "flags", "help", "kind", "metavar", "name", "panel")

    def __init__(self, name: str, kind: str, metavar: str, help: str, **rest: Any) -> None:
        self.name, self.kind, self.metavar, self.help = name, kind, metavar, help
        self.flags: tuple[str, ...] = rest.get("flags", (f"--{name.replace('_', '-')}",))
        self.panel: str | None = rest.get("panel")
        self.environment: str | None = rest.get("environment")


def _limit(name: str, kind: str, metavar: str, help: str) -> Option:
    return Option(name, kind, metavar, help, panel=_LIMITS)


def _grant(name: str, metavar: str, help: str) -> Option:
    return Option(name, "words", metavar, help, panel=_GRANTS)


def _told(name: str, metavar: str, help: str, environment: str | None) -> Option:
    return Option(name, "text", metavar, help, panel=_RECORD, environment=environment)


# Setting names as in a profile; `_RENAMED` has those that differ.
SETTINGS = (
    Option(
        "workspace",
        "text",
        "PATH[:MODE]",
        "The directory to work in, as a copy-on-write view (cow, the default), writable (rw) or read-only (ro). "
        "Without it the call starts in an empty private one.",
        flags=("--workspace", "-w"),
    ),
    _limit("memory", "text", "SIZE", "RAM, swap and private files together."),
    _limit("pids", "int", "N", "Processes and threads at one time."),
    _limit("cpus", "float", "N", "Cores' worth of CPU time, such as 1.5."),
    _limit("cpu_time", "text", "TIME", "CPU time in all, such as 10s."),
    _limit("wall_time", "text", "TIME", "Time from start to end, such as 5min."),
    _limit("disk", "text", "SIZE", "Private files: /tmp, home, private workspace."),
    _limit("output", "text", "SIZE", "Bytes of output in all."),
    _limit("best_effort", "words", "CONTROL", "A control that may be less than full here."),
    _grant("read", "PATH", "A host path to show read-only."),
    _grant("write", "PATH", "A host path to show writable."),
    _grant("deny", "PATH", "A path or glob to hide, such as '**/.env'."),
    _grant("allow_host", "HOST:PORT", "A network destination, such as pypi.org:443."),
    _grant("env", "NAME", "A variable to pass on."),
    _grant("set_env", "NAME=VALUE", "A variable to set."),
    _grant("allow_protected", "RULE", "A protected kind of file that may be written: git-hooks, ..."),
)
OWN = (
    Option("profile", "text", "NAME", "A profile's name or file.", flags=("--profile", "-p")),
    Option("commit", "flag", "", "Commit a cow workspace when the command ends well."),
    Option("collect", "words", "GLOB", "Workspace files to bring out, such as 'out/*.json'; may be repeated."),
    Option("into", "text", "DIR", "Where collected files go."),
    Option("terminal", "switch", "", "A terminal inside; by default when this is one.", flags=("--tty", "--no-tty")),
    _told("why", "TEXT", "The reason for this call, for the record.", None),
    _told("record", "FILE", "Write the record there as JSON.", None),
    _told("state", "DIR", "Where records are kept.", "SANDBOX_STATE"),
)
# Whose call it is (`cli/context.py`).
CONTEXT = (
    _told("agent", "NAME", "Which agent asks.", "SANDBOX_AGENT"),
    _told("session", "ID", "Which session of it.", "SANDBOX_SESSION"),
    _told("parent", "RECORD", "The record of the call that this one belongs to.", "SANDBOX_PARENT"),
    # Its variable is looked at where it is parsed: what others left in the environment is no mistake of the user's.
    _told("traceparent", "TEXT", "W3C trace context; else that of $TRACEPARENT.", None),
)
BY_NAME = {option.name: option for option in (*OWN, *CONTEXT, *SETTINGS)}
_RENAMED = {"env": "env_allow", "allow_host": "allow_hosts"}
_BY_FLAG = {flag: option for option in BY_NAME.values() for flag in option.flags}
_CONVERT = {"text": str, "int": int, "float": float, "words": str}


def parse(words: list[str]) -> tuple[dict[str, Any], list[str]] | None:
    """Options by name, and the command; None for what is not plainly `[OPTION [VALUE]]... [--] COMMAND...`."""
    found: dict[str, Any] = {}
    at = 0
    while at < len(words) and words[at].startswith("-") and len(words[at]) > 1:
        if words[at] == "--":
            at += 1
            break
        flag, equals, value = words[at].partition("=")
        at += 1
        option = _BY_FLAG.get(flag)
        if option is None or (equals and not flag.startswith("--")):
            return None
        if option.kind in ("flag", "switch"):
            if equals:
                return None
            found[option.name] = option.kind == "flag" or flag != option.flags[-1]
            continue
        if not equals:
            if at == len(words):
                return None
            value = words[at]
            at += 1
        if not _take(found, option, value):
            return None
    command = words[at:]
    return (found, command) if command else None


def _take(found: dict[str, Any], option: Option, text: str) -> bool:
    try:
        value = _CONVERT[option.kind](text)
    except ValueError:
        return False
    if option.kind == "words":
        found.setdefault(option.name, []).append(value)
    else:
        found[option.name] = value
    return True


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
    for ours, theirs in _RENAMED.items():
        if ours in found:
            found[theirs] = found.pop(ours)
    return found


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
    return f"--{name.replace('_', '-')}" if any(option.name == name for option in SETTINGS) else ""
