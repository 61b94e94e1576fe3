"""Trees and uppers for workspace tests, without any mount: an upper is a directory with whiteouts and xattrs in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sandbox.workspace import Changeset, Overlay, StoreLimits

Tree = Mapping[str, "str | bytes | tuple[str, str] | None"]


def plant(root: Path, tree: Tree) -> Path:
    """Make files (str or bytes), directories (None) and links (("link", target)) below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, content in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        elif isinstance(content, tuple):
            path.symlink_to(content[1])
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def held(root: Path) -> dict[str, str]:
    """What a tree holds, in a form to compare: file contents, "-> target", "/" for directories."""
    found: dict[str, str] = {}
    for directory, names, files in os.walk(root):
        for name in names + files:
            path = Path(directory, name)
            key = str(path.relative_to(root))
            if path.is_symlink():
                found[key] = f"-> {os.readlink(path)}"
            elif path.is_dir():
                found[key] = "/"
            else:
                found[key] = path.read_bytes().decode("utf-8", "backslashreplace")
    return found


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def whiteout(upper: Path, name: str) -> None:
    """What the kernel leaves for a deleted name. A user may make this one device: Linux 5.8."""
    path = upper / name
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR, os.makedev(0, 0))


def opaque(upper: Path, name: str) -> None:
    (upper / name).mkdir(parents=True, exist_ok=True)
    os.setxattr(upper / name, "user.overlay.opaque", b"y")


def captured(
    base: Path,
    lower: Path,
    upper: Path,
    *,
    started_ns: int | None = None,
    limits: StoreLimits | None = None,
    record_id: str = "call-1",
) -> Changeset:
    """The changeset of `upper` over `lower`, kept in `base`/changes."""
    with opened(lower) as lower_fd, opened(upper) as upper_fd:
        overlay = Overlay(upper_fd, lower_fd, str(lower), True, started_ns)
        return Changeset.from_upper(overlay, base / "changes", record_id=record_id, limits=limits)
