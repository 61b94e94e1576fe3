"""The private writable places: directories of one tmpfs, sized by the manifest's `disk` and `inodes`.

Made with the root view when host paths are mounted below them, else by the jail's own pid 1: then the view holds
nothing of one call, and many calls can be born from it. Source: tmpfs(5).
"""

from __future__ import annotations

import os

from sandbox._linux import mounts, syscalls
from sandbox._linux.batch import Batch, slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

INSIDE = "/run/sandbox/scratch"
_MODES = {"tmp": 0o1777, "var-tmp": 0o1777, "home": 0o700, "shm": 0o1777, "workspace": 0o755}


def scratch(launch: Launch, batch: Batch, args: dict[str, Any], *, at: str, root: str, owner: int) -> None:
    """Mount the tmpfs at `at` and bind its directories at their places below `root`, which exist."""
    flags = mounts.MS_NOSUID | mounts.MS_NODEV
    batch.mount("tmpfs", at, "tmpfs", flags, f"size={args['disk_bytes']},nr_inodes={args['inodes']},mode=755")
    umask, here = slot(), syscalls.AT_FDCWD
    batch.add("umask", syscalls.number("umask"), 0, into=umask)
    for name, mode in _MODES.items():
        path = batch.address(os.fsencode(f"{at}/{name}"))
        batch.add(f"mkdir {at}/{name}", syscalls.number("mkdirat"), here, path, mode)
        if os.geteuid() != owner:
            batch.add(f"chown {at}/{name}", syscalls.number("fchownat"), here, path, owner, owner, 0)
    batch.add("umask", syscalls.number("umask"), umask)
    for jail_path, name in args["directories"].items():
        # A plain bind has the attributes of the mount that it shows a part of: nosuid, nodev.
        batch.mount(f"{at}/{name}", root + jail_path, "none", mounts.MS_BIND)
    _hand_out(launch, batch, "scratch", at)
    if "/workspace" in args["directories"]:
        _hand_out(launch, batch, "workspace", f"{at}/workspace")


def _hand_out(launch: Launch, batch: Batch, name: str, path: str) -> None:
    fd = slot()
    batch.open(path, os.O_RDONLY | os.O_DIRECTORY, into=fd)
    batch.then(lambda: launch.out_fds.__setitem__(name, fd.value))
