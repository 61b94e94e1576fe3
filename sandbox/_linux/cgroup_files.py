"""Read and write cgroup control files.

Every error carries the file's path, so that a refused limit names the file that refused it.
Source: cgroups(7), Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import errno
import os

_READ_SIZE = 1 << 16
# Every file but the list of processes is smaller; below a page less than what was asked for is all there is.
_PIECE = 2048


def write_value(path: str, value: int | str) -> None:
    """Write one value in one write(2), without creating the file.

    Raises OSError naming the file and the value.
    """
    # A buffered file object reports the kernel's refusal only when it is flushed or closed, and loses it when it
    # is simply dropped; a bare write(2) answers at once.
    text = str(value)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as err:
        raise OSError(err.errno, f"cannot write {text!r}: {err.strerror}", path) from None


def try_write(path: str, value: int | str) -> bool:
    """Write an optional setting: False when this kernel has no such file."""
    try:
        write_value(path, value)
    except FileNotFoundError:
        return False
    return True


def read_text(path: str) -> str | None:
    """The file's whole text; None when the file, or its group, is not there (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        # The kernel gives a control file in one piece when the buffer has room for more (kernfs, seq_file).
        data = os.read(fd, _PIECE * 2)
        if len(data) >= _PIECE:
            while chunk := os.read(fd, _READ_SIZE):
                data += chunk
    except OSError as err:
        # ENODEV: the group was removed after the open. ESRCH: the process of a /proc file ended after the open.
        # EOPNOTSUPP: the file has no meaning here (cgroup.procs of a threaded group).
        if err.errno not in (errno.ENODEV, errno.ESRCH, errno.EOPNOTSUPP):
            raise OSError(err.errno, err.strerror, path) from None
        return None
    finally:
        os.close(fd)
    return data.decode(errors="replace")


def read_records(path: str) -> str:
    """The whole text of a file of /proc; empty when it is not there.

    The kernel hands such a file out record by record: before one that is longer than its buffer's rest it gives a short
    piece, which a control file would end with.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def read_int(path: str) -> int | None:
    """The file's number; None when it is missing or says `max`."""
    text = read_text(path)
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def read_keyed(path: str) -> dict[str, int]:
    """A flat keyed file (`memory.events`, `cpu.stat`) as numbers; empty when the file is missing."""
    words = (read_text(path) or "").split()
    return {key: int(number) for key, number in zip(words[::2], words[1::2], strict=False) if number.isdigit()}


def read_words(path: str) -> frozenset[str]:
    """A list such as `cgroup.controllers`; empty when the file is missing."""
    return frozenset((read_text(path) or "").split())


def read_pids(group: str) -> list[int]:
    """The processes of one group, without those of its children. Pids of other pid namespaces read as 0: left out."""
    text = read_text(group + "/cgroup.procs") or ""
    return [pid for pid in map(int, text.split()) if pid > 0]


def make_group(path: str) -> None:
    """Make one group. Raises OSError naming it (EEXIST too: a name is used once)."""
    os.mkdir(path, 0o755)


def remove_group(path: str) -> bool:
    """Remove one empty group. False while it is still populated or has children; True also when it was gone."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as err:
        if err.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise
    return True


def remove_groups(paths: list[str]) -> bool:
    """Try to remove each of them, also after one that is still populated; True when all are gone."""
    kept = [path for path in paths if not remove_group(path)]
    return not kept


def child_groups(path: str) -> list[str]:
    """The paths of the groups directly below `path`; empty when it is gone or may not be read."""
    try:
        # kernfs counts a directory's subdirectories in its link count: two links mean no child, so the many leaf
        # groups of a host cost one stat and not a listing of some sixty control files.
        if os.stat(path).st_nlink <= 2:
            return []
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return []


def groups_below(path: str) -> list[str]:
    """`path` and every group below it, children before their parents, so that they can be removed in this order."""
    found = []
    for child in child_groups(path):
        found += groups_below(child)
    found.append(path)
    return found
