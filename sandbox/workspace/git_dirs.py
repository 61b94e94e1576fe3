"""Bare repositories in a changeset: no rule over single paths sees them, so they are found by their parts together."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from sandbox._linux import files
from sandbox.workspace.changeset import Change
from sandbox.workspace.names import ancestors, join, parent_of
from sandbox.workspace.protected import GIT_BARE, acts_in_git_dir, is_git_dir


def mark_git_dirs(changes: list[Change], lower_fd: int) -> list[Change]:
    """Protect what acts in bare repositories, and what would make a directory one.

    The parts may arrive in several commits, each harmless alone, so the directory is judged as it would be after.
    """
    after = {change.path: change.kind != "deleted" for change in changes}
    suspects = {parent_of(path) for path in after if path.rpartition("/")[2] in _GIT_DIR_PARTS}
    suspects |= {parent_of(parent_of(path)) for path in after if parent_of(path).rpartition("/")[2] == "hooks"}
    found: dict[str, _GitDir] = {}
    for directory in suspects:
        was = {name: _exists(lower_fd, join(directory, name)) for name in _GIT_DIR_PARTS}
        now = {name: after.get(join(directory, name), was[name]) for name in _GIT_DIR_PARTS}
        if is_git_dir(directory, now.__getitem__):
            is_new = not is_git_dir(directory, was.__getitem__)
            found[directory] = _GitDir(is_new, is_new and join(directory, "HEAD") not in after)
    if not found:
        return changes
    whole = {path for path, git in found.items() if git.whole}
    return [replace(c, protected=GIT_BARE) if _acts(c, found, whole) and not c.protected else c for c in changes]


_GIT_DIR_PARTS = ("HEAD", "objects", "refs", "commondir", "config", "config.worktree", "hooks")


@dataclass(frozen=True, slots=True)
class _GitDir:
    """A directory that git will take for a repository; `whole` when leaving HEAD out would not undo that."""

    is_new: bool
    whole: bool


def _acts(change: Change, found: dict[str, _GitDir], whole: set[str]) -> bool:
    if change.type == "dir":
        return False
    directory, _, name = change.path.rpartition("/")
    if directory in found and (acts_in_git_dir(name) or (name == "HEAD" and found[directory].is_new)):
        return True
    if parent_of(directory) in found and directory.rpartition("/")[2] == "hooks" and not name.endswith(".sample"):
        return True
    return bool(whole) and ("" in whole or any(path in whole for path in ancestors(change.path)))


def _exists(root_fd: int, path: str) -> bool:
    try:
        os.close(files.open_beneath(root_fd, path, os.O_PATH))
    except OSError:
        return False
    return True
