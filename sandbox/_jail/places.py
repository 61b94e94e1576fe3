"""The private writable places: directories of one tmpfs, sized by the manifest's `disk` and `inodes`.

Made with the root view when host paths are mounted below them, else by the jail's own pid 1: then the view holds
nothing of one call, and many calls can be born from it. Source: tmpfs(5).
"""

from __future__ import annotations

import os

from sandbox._linux import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

INSIDE = "/run/sandbox/scratch"
_MODES = {"tmp": 0o1777, "var-tmp": 0o1777, "home": 0o700, "shm": 0o1777, "workspace": 0o755}


def scratch(launch: Launch, args: dict[str, Any], *, at: str, root: str, owner: int) -> None:
    """Mount the tmpfs at `at` and bind its directories at their places below `root`, which exist."""
    flags = mounts.MS_NOSUID | mounts.MS_NODEV
    mounts.mount("tmpfs", at, "tmpfs", flags, f"size={args['disk_bytes']},nr_inodes={args['inodes']},mode=755")
    umask, is_other = os.umask(0), os.geteuid() != owner
    for name, mode in _MODES.items():
        os.mkdir(f"{at}/{name}", mode)
        if is_other:
            os.chown(f"{at}/{name}", owner, owner)
    os.umask(umask)
    for jail_path, name in args["directories"].items():
        # A plain bind has the attributes of the mount that it shows a part of: nosuid, nodev.
        mounts.mount(f"{at}/{name}", root + jail_path, "none", mounts.MS_BIND)
    launch.out_fds["scratch"] = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    if "/workspace" in args["directories"]:
        launch.out_fds["workspace"] = os.open(f"{at}/workspace", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
