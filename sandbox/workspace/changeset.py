"""A changeset: what one call changed in an overlay, kept until somebody commits or discards it.

On disk it is `<state>/changes/<record id>/`: `index.json` says what changed and what the host had there at that time,
`content/NNNNNN` holds new file contents under numbers, `journal` what a commit has done so far. All of it is ours;
what came from the call are names, link texts and bytes, stored as data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sandbox._linux import files
from sandbox.errors import WorkspaceError
from sandbox.workspace.journal import read_journal
from sandbox.workspace.names import from_json, is_relative, printable, to_json
from sandbox.workspace.walk import remove_path

if TYPE_CHECKING:
    from sandbox.workspace.capture import Overlay, StoreLimits
    from sandbox.workspace.commit import CommitResult

SCHEMA = "sandbox.changes/v1"
INDEX = "index.json"
CONTENT = "content"
_INDEX_MAX_BYTES = 256 << 20
_DIFF_FILE_BYTES = 64 << 10
_DIFF_LINES = 2000

Kind = Literal["added", "modified", "deleted", "mode"]
Type = Literal["file", "dir", "symlink", "special"]


@dataclass(frozen=True, slots=True)
class Before:
    """What the host had at the path when the call ended; `sha256` only where it had to be read anyway."""

    type: Type
    mode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    ino: int
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """One path. `mode` has no privilege bits; `protected` is the rule that keeps it out of a commit, if any.

    `content` is the file's name in the store, `target` a link's text, `stale` says that the host changed the path
    while the call ran, so that the call worked on something older.
    """

    path: str
    kind: Kind
    type: Type
    mode: int = 0
    size: int = 0
    sha256: str = ""
    content: str = ""
    target: str = ""
    protected: str = ""
    before: Before | None = None
    stale: bool = False

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = {"path": to_json(self.path), "kind": self.kind, "type": self.type}
        for name in ("mode", "size", "sha256", "content", "protected", "stale"):
            if getattr(self, name):
                data[name] = getattr(self, name)
        if self.target:
            data["target"] = to_json(self.target)
        if self.before is not None:
            data["before"] = {name: getattr(self.before, name) for name in Before.__slots__}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Change:
        """Rebuild a change. Raises ValueError for a path that is not a plain relative one."""
        fields = dict(data)
        fields["path"] = from_json(data["path"])
        if not is_relative(fields["path"]):
            raise ValueError(f"path {data['path']!r}")
        if "target" in data:
            fields["target"] = from_json(data["target"])
        if "before" in data:
            fields["before"] = Before(**data["before"])
        return cls(**fields)


@dataclass(frozen=True)
class Changeset:
    """Load one with `load`, make one with `from_upper`. `directory` is None when nothing changed."""

    record_id: str
    lower_path: str
    lower_ino: int
    changes: tuple[Change, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    created_ns: int = 0
    directory: Path | None = None
    done: frozenset[int] = field(default=frozenset(), repr=False)

    @classmethod
    def from_upper(
        cls, overlay: Overlay, store_dir: Path, *, record_id: str, limits: StoreLimits | None = None
    ) -> Changeset:
        """Copy what the call wrote into `store_dir`/`record_id`; see `capture.capture`."""
        from sandbox.workspace.capture import StoreLimits, capture

        return capture(overlay, store_dir, record_id=record_id, limits=limits or StoreLimits())

    @classmethod
    def load(cls, directory: Path) -> Changeset:
        """Read a stored changeset. Raises WorkspaceError when there is none, or it is not one of ours."""
        try:
            with open(directory / INDEX, "rb") as file:
                data = json.loads(file.read(_INDEX_MAX_BYTES))
            if data["schema"] != SCHEMA:
                raise ValueError(f"schema {data['schema']!r}")
            return cls(
                record_id=data["record_id"],
                lower_path=from_json(data["lower_path"]),
                lower_ino=data["lower_ino"],
                changes=tuple(Change.from_json(change) for change in data["changes"]),
                skipped=tuple((from_json(path), reason) for path, reason in data["skipped"]),
                created_ns=data["created_ns"],
                directory=directory,
                done=read_journal(directory)[0],
            )
        except FileNotFoundError as error:
            raise WorkspaceError(f"no changeset at {directory}", hint="`sandbox changes list` shows them") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkspaceError(f"{directory / INDEX} is no readable changeset: {error}") from error

    def save(self, directory: Path) -> None:
        """Write `index.json` below `directory`."""
        data = self.to_json() | {"schema": SCHEMA, "created_ns": self.created_ns, "lower_ino": self.lower_ino}
        with open(directory / INDEX, "x", encoding="ascii") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())

    def to_json(self) -> dict[str, Any]:
        return {
            "record_id": self.record_id,
            "lower_path": to_json(self.lower_path),
            "changes": [change.to_json() for change in self.changes],
            "skipped": [[to_json(path), reason] for path, reason in self.skipped],
        }

    @property
    def pending(self) -> tuple[Change, ...]:
        """What no commit has applied yet."""
        return tuple(change for number, change in enumerate(self.changes) if number not in self.done)

    @property
    def added(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.kind == "added")

    @property
    def modified(self) -> tuple[Change, ...]:
        """Changed contents, types and modes."""
        return tuple(change for change in self.changes if change.kind in ("modified", "mode"))

    @property
    def deleted(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.kind == "deleted")

    @property
    def protected(self) -> tuple[Change, ...]:
        """What a commit leaves out unless `allow_protected` names its rule or its path."""
        return tuple(change for change in self.changes if change.protected)

    def commit(self, *, allow_protected: Sequence[str] = (), force: bool = False) -> CommitResult:
        """Apply the changes to the host's directory; see `commit.commit`.

        Raises WorkspaceError, with nothing applied, when the host changed any of the paths meanwhile, unless
        `force`; never follows a link, forced or not.
        """
        from sandbox.workspace.commit import commit

        return commit(self, allow_protected=tuple(allow_protected), force=force)

    def discard(self) -> None:
        """Forget the changes. The host's directory stays as it is."""
        if self.directory is not None:
            remove_path(str(self.directory))

    def content_path(self, change: Change) -> Path:
        if self.directory is None or not re.fullmatch(r"[0-9]+", change.content):
            raise WorkspaceError(f"{printable(change.path)} has no stored contents")
        return self.directory / CONTENT / change.content

    def diff(self) -> Iterator[str]:
        """The changes as text for a person: unified diffs of small text files, one line for everything else."""
        for change in self.changes:
            yield from self._diff_one(change)

    def _diff_one(self, change: Change) -> Iterator[str]:
        import difflib  # slow to load, and the supervisor never shows a diff

        name = printable(change.path)
        old = self._lower_text(change) if change.kind == "modified" else []
        new = _text(os.open(self.content_path(change), os.O_RDONLY | os.O_CLOEXEC)) if change.content else None
        if change.type != "file" or new is None or old is None:
            yield f"{change.kind} {change.type} {name}"
            return
        for number, line in enumerate(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}", lineterm="")):
            yield line if number < 2 else printable(line, keep="\\\t")

    def _lower_text(self, change: Change) -> list[str] | None:
        try:
            lower_fd = os.open(self.lower_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return _text(files.open_regular(lower_fd, change.path))
            finally:
                os.close(lower_fd)
        except OSError:
            return None  # no longer a file there: the one-line form says what the change is

    def __str__(self) -> str:
        parts = [f"{len(self.added)} added", f"{len(self.modified)} modified", f"{len(self.deleted)} deleted"]
        if self.protected:
            parts.append(f"{len(self.protected)} protected")
        return f"<Changeset {self.record_id} {', '.join(parts)}>"


def list_changesets(store_dir: Path) -> Iterator[Changeset]:
    """The stored changesets, oldest first. What cannot be read is left out: `load` says why."""
    try:
        directories = sorted(path for path in store_dir.iterdir() if (path / INDEX).is_file())
    except FileNotFoundError:
        return
    found = []
    for directory in directories:
        try:
            found.append(Changeset.load(directory))
        except WorkspaceError:
            continue
    yield from sorted(found, key=lambda changeset: changeset.created_ns)


def check_record_id(record_id: str) -> str:
    """The id, if it can be a directory's name. Raises WorkspaceError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", record_id) or record_id.endswith(".partial"):
        raise WorkspaceError(f"{printable(record_id[:128])!r} is no record id")
    return record_id


def _text(fd: int) -> list[str] | None:
    """The lines of a small text file, whose descriptor is closed; None when it is large or binary."""
    with open(fd, "rb") as file:
        data = file.read(_DIFF_FILE_BYTES + 1)
    if len(data) > _DIFF_FILE_BYTES or b"\0" in data:
        return None
    lines = data.decode("utf-8", "surrogateescape").split("\n")  # not splitlines: it also breaks at form feeds
    if lines[-1] == "":
        lines.pop()
    return lines if len(lines) <= _DIFF_LINES else None
