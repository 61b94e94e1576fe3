"""After a call with a writable host directory: what changed, and nothing left behind that others would run or trust.

Compares the tree with the scan from before the call. New or changed protected paths are set aside (and the earlier
version put back where it was kept), devices, fifos and sockets are removed, set-uid and set-gid bits and file
capabilities are stripped, and trees too deep to look into are set aside whole. What existed before and is unchanged
is never touched. A protected file that the host's owner changed meanwhile is set aside too: who wrote it cannot be
told from outside, and it can be had back from the quarantine.
Does not defend against: what another process runs from the workspace while the call is still writing to it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox._linux import files
from sandbox.workspace.collect import write_all
from sandbox.workspace.links import leads_outside
from sandbox.workspace.names import join, to_json
from sandbox.workspace.protected import (
    GIT_BARE,
    acts_in_git_dir,
    is_allowed,
    is_git_dir,
    is_protected,
)
from sandbox.workspace.quarantine import Quarantine, Quarantined
from sandbox.workspace.scan import Kept, Scan, entry_type, pack
from sandbox.workspace.walk import Directory, Entry, Unreadable, walk

_LISTED_MAX = 10_000
_TAKEN_MAX = 1_000


@dataclass(slots=True)
class PathList:
    """Paths, as many as are kept; `count` says how many there were."""

    paths: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, path: str) -> None:
        self.count += 1
        if len(self.paths) < _LISTED_MAX:
            self.paths.append(path)

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "paths": [to_json(path) for path in self.paths]}


@dataclass(slots=True)
class Changes:
    """What a call changed in a directory it could write. Directories count as modified when their mode changed."""

    added: PathList = field(default_factory=PathList)
    modified: PathList = field(default_factory=PathList)
    deleted: PathList = field(default_factory=PathList)


@dataclass(slots=True)
class SweepResult:
    """The changes, and what was done about them. `unswept` could not be looked at: (path, reason).

    Lists are bounded; the quarantine's own index has every entry that was set aside.
    """

    changes: Changes = field(default_factory=Changes)
    quarantined: list[Quarantined] = field(default_factory=list)
    quarantined_more: int = 0
    stripped: list[tuple[str, str]] = field(default_factory=list)
    links_outside: PathList = field(default_factory=PathList)
    unswept: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing had to be set aside or stripped, and everything could be looked at."""
        return not (self.quarantined or self.stripped or self.unswept)

    def to_json(self) -> dict[str, Any]:
        return {
            "added": self.changes.added.to_json(),
            "modified": self.changes.modified.to_json(),
            "deleted": self.changes.deleted.to_json(),
            "links_outside": self.links_outside.to_json(),
            "quarantined": [taken.to_json() for taken in self.quarantined],
            "quarantined_more": self.quarantined_more,
            "stripped": [{"path": to_json(path), "what": what} for path, what in self.stripped],
            "unswept": [{"path": to_json(path), "reason": reason} for path, reason in self.unswept],
        }


def sweep(root_fd: int, before: Scan, allow: Sequence[str], quarantine_dir_fd: int) -> SweepResult:
    """Set aside, remove and strip what the call must not leave behind below `root_fd`; list what it changed.

    Nothing of the call may run any more. `quarantine_dir_fd` is an empty directory of ours, mode 0700, best on the
    same file system. Costs one lstat per entry, and one open per new or changed file.
    """
    sweeper = _Sweeper(before, tuple(allow), Quarantine(quarantine_dir_fd))
    sweeper.sweep_root(root_fd)
    for directory in walk(root_fd, unlock=sweeper.may_unlock):
        if isinstance(directory, Unreadable):
            sweeper.note_unreadable(directory)
        else:
            sweeper.sweep_directory(directory)
    sweeper.note_deleted_directories()
    return sweeper.result


class _Sweeper:
    def __init__(self, before: Scan, allow: tuple[str, ...], quarantine: Quarantine) -> None:
        self.result = SweepResult()
        self._before = before
        self._allow = allow
        self._quarantine = quarantine
        self._visited: set[str] = set()
        self._git_hooks: set[str] = set()  # the hooks directories of bare repositories
        self._unchanged: set[str] = set()  # unreadable before, and the same directory now

    def may_unlock(self, path: str) -> bool:
        return path not in self._unchanged

    def sweep_root(self, root_fd: int) -> None:
        status = os.fstat(root_fd)
        if pack(status) == self._before.root:
            return
        self.result.changes.modified.add(".")
        if status.st_mode & stat.S_ISUID:
            os.chmod(files.proc_path(root_fd), stat.S_IMODE(status.st_mode) & ~stat.S_ISUID)
            self.result.stripped.append((".", "set-uid"))

    def note_unreadable(self, directory: Unreadable) -> None:
        self._visited.add(directory.path)
        if directory.path not in self._unchanged:
            self._note_unswept(directory.path, directory.reason)

    def _note_unswept(self, path: str, reason: str) -> None:
        if len(self.result.unswept) < _LISTED_MAX:
            self.result.unswept.append((path, reason))

    def sweep_directory(self, directory: Directory) -> None:
        old = self._before.directories.get(directory.path, {})
        self._visited.add(directory.path)
        names: set[str] = set()
        acting: list[Entry] = []
        for entry in directory.entries():
            names.add(entry.name)
            if directory.stay_out(entry, self._before.apart):
                continue
            earlier = old.get(entry.name)
            if entry.name == "HEAD" or (acts_in_git_dir(entry.name) and earlier != pack(entry.status)):
                acting.append(entry)
            if earlier == pack(entry.status):
                self._note_unchanged(entry)
                continue
            (self.result.changes.modified if earlier else self.result.changes.added).add(entry.path)
            self._handle(directory, entry)
        for name in old.keys() - names:
            self.result.changes.deleted.add(join(directory.path, name))
        if is_git_dir(directory.path, names.__contains__):
            self._handle_git_dir(directory, acting, is_new=not is_git_dir(directory.path, old.__contains__))

    def note_deleted_directories(self) -> None:
        for path in self._before.directories.keys() - self._visited:
            for name in self._before.directories[path]:
                self.result.changes.deleted.add(join(path, name))

    def _note_unchanged(self, entry: Entry) -> None:
        if entry.is_dir and entry.path in self._before.unreadable:
            self._unchanged.add(entry.path)

    def _handle(self, directory: Directory, entry: Entry) -> None:
        if entry.is_dir:
            self._handle_directory(directory, entry)
            return
        rule = self._rule_for(directory, entry)
        if rule:
            self._take(directory, entry, rule)
        elif stat.S_ISLNK(entry.status.st_mode):
            target = _link_target(directory.fd, entry.name)
            if target is not None and leads_outside(entry.path, target):
                self.result.links_outside.add(entry.path)
        else:
            self._strip(directory, entry)

    def _rule_for(self, directory: Directory, entry: Entry) -> str | None:
        kind = entry_type(entry.status)
        if kind == "special":
            return "special-file"
        if directory.path in self._git_hooks and not entry.name.endswith(".sample"):
            return None if is_allowed(GIT_BARE, entry.path, self._allow) else GIT_BARE
        return is_protected(entry.path, self._allow, type_=kind)

    def _handle_directory(self, directory: Directory, entry: Entry) -> None:
        if (entry.status.st_dev, entry.status.st_ino) == self._quarantine.identity:
            directory.do_not_enter(entry.name)
        elif entry.too_deep:
            self._take(directory, entry, "too-deep")
        else:
            self._strip(directory, entry)

    def _handle_git_dir(self, directory: Directory, acting: list[Entry], *, is_new: bool) -> None:
        """Set aside what acts in a bare repository; of one that was none before, HEAD too, which makes it one.

        Its parts may have come in earlier calls, each harmless then: so HEAD goes even if this call left it alone.
        """
        self._git_hooks.add(join(directory.path, "hooks"))
        for entry in acting:
            wanted = is_new if entry.name == "HEAD" else not entry.is_dir
            if wanted and not is_allowed(GIT_BARE, entry.path, self._allow):
                self._take(directory, entry, GIT_BARE)

    def _take(self, directory: Directory, entry: Entry, rule: str) -> None:
        directory.do_not_enter(entry.name)
        taken = self._quarantine.take(directory.fd, entry.name, entry.path, rule)
        if taken.action == "gone":
            return
        kept = self._before.kept.get(entry.path)
        if kept is not None and not taken.action.startswith("failed"):
            restored = _put_back(directory.fd, entry.name, kept)
            taken = Quarantined(taken.path, taken.rule, taken.action, taken.stored, restored)
        self._quarantine.note(taken, entry.status)
        if len(self.result.quarantined) < _TAKEN_MAX:
            self.result.quarantined.append(taken)
        else:
            self.result.quarantined_more += 1

    def _strip(self, directory: Directory, entry: Entry) -> None:
        """Take privilege bits away. A directory keeps set-gid when its parent has it: there it only inherits."""
        if entry.is_dir:
            inherits = os.fstat(directory.fd).st_mode & stat.S_ISGID
            if not entry.status.st_mode & (stat.S_ISUID | (0 if inherits else stat.S_ISGID)):
                return
        try:
            path_fd = files.open_beneath(directory.fd, entry.name, os.O_PATH)
            try:
                dropped = files.drop_privilege_bits(path_fd)
            finally:
                os.close(path_fd)
        except FileNotFoundError:
            return
        except PermissionError:
            self._take(directory, entry, "privilege-bits")
            return
        except OSError as error:
            self._note_unswept(entry.path, errno.errorcode.get(error.errno or 0, "EIO"))
            return
        if len(self.result.stripped) < _LISTED_MAX:
            self.result.stripped.extend((entry.path, what) for what in dropped)


def _link_target(dir_fd: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=dir_fd)
    except OSError:
        return None  # gone, or no longer a link: then it leads nowhere


def _put_back(dir_fd: int, name: str, kept: Kept) -> bool:
    """Write the earlier version again, unless something stands in its place."""
    try:
        if stat.S_ISLNK(kept.mode):
            os.symlink(os.fsdecode(kept.data), name, dir_fd=dir_fd)
            return True
        mode = stat.S_IMODE(kept.mode) & 0o777
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=dir_fd)
        try:
            os.fchmod(fd, mode)
            write_all(fd, kept.data)
        finally:
            os.close(fd)
    except OSError:
        return False
    return True
