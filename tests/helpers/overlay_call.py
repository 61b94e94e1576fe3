"""Run a program on a real overlay and capture what it left, as a launcher and a supervisor would. A program of its own.

    python overlay_call.py LOWER STORE RECORD_ID SCRIPT [--user-namespace] [--keep-caps]

A child mounts the overlay on a tmpfs of its own mount namespace (with `--user-namespace` inside a user namespace of
the caller's uid), sends the upper directory's descriptor out and runs SCRIPT in the merged directory. When it is
dead the parent, outside, captures. Prints one JSON line: what the script said, and the changeset or the error.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from sandbox._linux import mounts, syscalls
from sandbox.errors import SandboxError
from sandbox.workspace import Changeset, Overlay


def enter_namespaces(*, user_namespace: bool) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if user_namespace:
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    else:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.make_private()


def mount_overlay(lower: str, *, user_namespace: bool) -> int:
    """Mount it over `lower` and return the upper's descriptor."""
    scratch = "/tmp"
    lower_fd = os.open(lower, os.O_PATH)
    mounts.mount("tmpfs", scratch, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "size=64m,nr_inodes=20k,mode=777")
    for name in ("upper", "work"):
        os.mkdir(f"{scratch}/{name}")
    os.mkdir(f"{scratch}/merged")
    how = "userxattr,index=off" if user_namespace else "redirect_dir=off,metacopy=off,index=off"
    options = f"lowerdir=/proc/self/fd/{lower_fd},upperdir={scratch}/upper,workdir={scratch}/work,{how}"
    upper_fd = os.open(f"{scratch}/upper", os.O_RDONLY | os.O_DIRECTORY)
    mounts.mount("overlay", f"{scratch}/merged", "overlay", 0, options)
    os.chdir(f"{scratch}/merged")
    return upper_fd


def child(arguments: argparse.Namespace, channel: socket.socket) -> int:
    script = Path(arguments.script).read_text()
    enter_namespaces(user_namespace=arguments.user_namespace)
    upper_fd = mount_overlay(arguments.lower, user_namespace=arguments.user_namespace)
    socket.send_fds(channel, [b"u"], [upper_fd])
    channel.close()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", script], stdout=2, check=False)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("lower", "store", "record_id", "script"):
        parser.add_argument(name)
    parser.add_argument("--user-namespace", action="store_true")
    arguments = parser.parse_args()
    ours, theirs = socket.socketpair()
    started_ns = time.time_ns()
    lower_fd = os.open(arguments.lower, os.O_RDONLY | os.O_DIRECTORY)
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            os._exit(child(arguments, theirs))
        except BaseException as error:  # noqa: BLE001 - a forked child must not run its parent's code on
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(99)
    theirs.close()
    _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    answer: dict[str, object] = {"exit": status}
    if status == 0 and fds:
        overlay = Overlay(fds[0], lower_fd, arguments.lower, arguments.user_namespace, started_ns)
        try:
            changeset = Changeset.from_upper(overlay, Path(arguments.store), record_id=arguments.record_id)
            answer |= {"changeset": changeset.to_json(), "directory": str(changeset.directory or "")}
        except SandboxError as error:
            answer["error"] = str(error)
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
