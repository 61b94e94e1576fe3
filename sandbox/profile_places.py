"""Where profiles and ceilings are looked for. Loads nothing: a kept plan is checked with it."""

from __future__ import annotations

import os

FILE_BYTES_MAX = 1 << 20
SYSTEM_CEILING = "/etc/sandbox/ceiling.toml"
CEILING_VARIABLE = "SANDBOX_CEILING"


def is_path(source: str) -> bool:
    """Whether a string means a file rather than a profile's name."""
    return "/" in source or source.endswith((".toml", ".json"))


def directories(project: str) -> tuple[tuple[str, str], ...]:
    """(directory, kind) of profiles that have a name, as seen from a project's directory; the project's own first."""
    return (
        (f"{project.rstrip('/')}/.sandbox/profiles", "project"),
        (_user_dir(), "user"),
        (shipped_dir(), "shipped"),
    )


def _user_dir() -> str:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return f"{base}/sandbox/profiles"


def shipped_dir() -> str:
    """Profiles travel inside the wheel; in a checkout they lie at the top of the tree."""
    here = os.path.dirname(__file__)
    inside = f"{here}/shipped_profiles"
    return inside if os.path.isdir(inside) else f"{os.path.dirname(here)}/profiles"
