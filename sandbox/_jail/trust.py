"""The jail's step `trust`: the gateway's own authority beside the system's, for calls whose TLS it looks into.

The system's file of authorities is shown with one more at its end, where programs look for it and under a name that
variables point to. Nothing of this is there in other jails, nor on the host.
"""

from __future__ import annotations

import os
import stat

from sandbox._jail import inside
from sandbox._linux import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

FILE_MAX_BYTES = 4 << 20


def trust(launch: Launch, args: dict[str, Any]) -> None:
    """Show the host's own authorities with one more."""
    system = next((path for path in args["covers"] if os.path.isfile(path)), None)
    roots = b""
    if system is not None:
        with open(system, "rb") as file:
            roots = file.read(FILE_MAX_BYTES)
    show(launch, args, roots)


def image_roots(launch: Launch, args: dict[str, Any]) -> bytes:
    """The authorities that a tree of somebody else's making has; empty when it has none.

    Only a file that everybody inside may read: a link in an image must not show what it is not for.
    """
    root_fd = inside.open_root(launch.root)
    try:
        for path in args["covers"]:
            place = inside.open_place(root_fd, path, follow=True)
            if place is None:
                continue
            try:
                mode = os.fstat(place).st_mode
                where = os.readlink(f"/proc/self/fd/{place}")
                if stat.S_ISREG(mode) and mode & stat.S_IROTH and not where.startswith(("/proc/", "/sys/")):
                    with open(f"/proc/self/fd/{place}", "rb") as file:
                        return file.read(FILE_MAX_BYTES)
            finally:
                os.close(place)
    finally:
        os.close(root_fd)
    return b""


def show(launch: Launch, args: dict[str, Any], roots: bytes) -> None:
    """Write the files, and cover each of the system's in `covers` that is there with the longer one.

    Java keeps its own, in another form, in `java_covers`.
    """
    _write(launch, args["authority_file"], args["authority"].encode())
    roots = roots.rstrip() + b"\n"
    _write(launch, args["bundle_file"], roots + args["authority"].encode())
    for path in args["covers"]:
        _cover(launch, path, args["bundle_file"])
    java = [path for path in args["java_covers"] if os.path.isfile(path)]
    if java:
        # Its hash brings OpenSSL along, a fifth of the zygote's start. Where a container's root is entered before this
        # step, whoever does that has loaded it.
        from sandbox._jail import keystore

        _write(launch, args["java_file"], keystore.from_pem(roots + args["authority"].encode()))
    for path in java:
        _cover(launch, path, args["java_file"])


def _write(launch: Launch, jail_path: str, data: bytes) -> None:
    path = launch.root + jail_path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
    os.chmod(path, 0o444)


def _cover(launch: Launch, path: str, bundle: str) -> None:
    root_fd = inside.open_root(launch.root)
    try:
        # A link leads to a file that is covered under its own name, or to one that is not there inside.
        place = inside.open_place(root_fd, path, follow=False)
        source = inside.open_place(root_fd, bundle, follow=False)
        assert source is not None
    finally:
        os.close(root_fd)
    try:
        if place is None:
            return
        try:
            tree = mounts.clone_tree(source)
            try:
                mounts.set_attributes(tree, mounts.ATTR_RDONLY | mounts.ATTR_NOSUID | mounts.ATTR_NODEV)
                mounts.attach_at(tree, place)
            finally:
                os.close(tree)
        finally:
            os.close(place)
    finally:
        os.close(source)
