"""Where a symbolic link's text leads, judged without touching a file system."""

from __future__ import annotations


def leads_outside(path: str, target: str) -> bool:
    """Whether a link at `path` (relative to the workspace) with this text can lead out of the workspace.

    ".." counts only at the start, where it climbs real directories; behind a name, that name may be a link itself
    and ".." then climbs from wherever it points to, so such a text counts as leading out.
    """
    if not target or target.startswith("/"):
        return True
    parts = [part for part in target.split("/") if part not in ("", ".")]
    climbs = 0
    while climbs < len(parts) and parts[climbs] == "..":
        climbs += 1
    return climbs > path.count("/") or ".." in parts[climbs:]
