"""What a call takes from this process: its interpreter's places, variables, terminal, user.

Loads next to nothing: a call with a kept plan needs no more than this of the caller's side.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

_VENV_PARTS = ("bin", "include", "lib", "lib64", "pyvenv.cfg", "share", "etc")


def state_of(explicit: str | None) -> str:
    """The state directory, as `audit.store.state_dir` says it; empty where it would take a longer look."""
    path = explicit or os.environ.get("SANDBOX_STATE") or usual_state()
    plain = path.startswith("/") and not path.startswith("//") and os.path.normpath(path) == path
    return path if plain else ""


def usual_state() -> str:
    base = os.environ.get("XDG_STATE_HOME", "")
    return f"{base if os.path.isabs(base) else os.path.expanduser('~/.local/state')}/sandbox"


def shown_prefixes() -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """(real path, path) of every tree of this interpreter that is not in each jail's view, and directories for PATH."""
    prefixes = dict.fromkeys((sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix))
    pairs: dict[tuple[str, str], None] = {}
    for prefix in prefixes:
        for shown in dict.fromkeys((os.path.realpath(prefix), os.path.abspath(prefix))):
            # /usr is in every jail's view already.
            if not f"{shown}/".startswith("/usr/"):
                pairs.update(((os.path.realpath(part), part), None) for part in _parts(shown))
    search = [f"{os.path.abspath(prefix)}/bin" for prefix in prefixes if not f"{prefix}/".startswith("/usr/")]
    return tuple(pairs), tuple(dict.fromkeys(search))


def _parts(prefix: str) -> list[str]:
    """The interpreter's own in a prefix. A virtual environment may be a project's top directory, secrets and all."""
    if not os.path.exists(f"{prefix}/pyvenv.cfg"):
        return [prefix]
    return [f"{prefix}/{name}" for name in _VENV_PARTS if os.path.exists(f"{prefix}/{name}")]


def allowed_variables(names: Iterable[str], source: Mapping[str, str]) -> dict[str, str]:
    """The variables of `source` with these names; `NAME*` names all that begin so."""
    exact = set(names)
    starts = tuple(name[:-1] for name in exact if name.endswith("*"))
    if not starts:
        # One look for each: os.environ makes an exception of every name that it does not have.
        found = ((name, source.get(name)) for name in sorted(exact))
        return {name: value for name, value in found if value is not None}
    return {name: value for name, value in source.items() if name in exact or name.startswith(starts)}


def terminal_size() -> tuple[int, int]:
    """Columns and rows: as COLUMNS and LINES say, else the terminal on standard output, else 80 and 24."""
    asked = [os.environ.get(name, "") for name in ("COLUMNS", "LINES")]
    columns, rows = (int(text) if text.isdecimal() else 0 for text in asked)
    if columns <= 0 or rows <= 0:
        try:
            size = os.get_terminal_size(1)
        except OSError:
            size = os.terminal_size((0, 0))
        columns, rows = columns or size.columns or 80, rows or size.lines or 24
    return columns, rows


@functools.cache
def principal(pid: int) -> dict[str, Any]:
    """Who asks: the user of this process."""
    return {"user": _user(), "uid": os.getuid(), "pid": pid}


def _user() -> str:
    """As getpass.getuser, which loads what reads passwords from a terminal. Empty for a uid without a name."""
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        if name := os.environ.get(variable):
            return name
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return ""
