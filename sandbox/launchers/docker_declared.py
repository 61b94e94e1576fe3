"""What the docker launcher holds, control by control, and what it does not do. Pure data; the SDK is not loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from sandbox.host import Control, HostFacts
from sandbox.host import controls as host_controls
from sandbox.launchers import oci_declared

_NO_LANDLOCK = "Docker starts the tool itself and knows no Landlock; the mount namespace is the one wall"

_ROWS: Final = {
    "filesystem": Control("full", "mount namespace of a container, read-only image"),
    "network": Control("full", "network namespace with loopback only"),
    "processes": Control("full", "pid, ipc, uts and cgroup namespaces of a container"),
    "syscalls": Control("full", "seccomp filter, installed by Docker"),
    "landlock": Control("none", "", "none", _NO_LANDLOCK),
    "memory": Control("full", "container memory and swap limit"),
    "pids": Control("full", "container pids limit"),
    "cpus": Control("full", "container cpu quota"),
    "cpu_time": Control("full", "container cpu accounting and supervisor timer"),
    "wall_time": Control("full", "supervisor timer and kill of the container's first process"),
    "disk": Control("full", "sized tmpfs"),
    "inodes": Control("full", "sized tmpfs"),
    "open_files": Control("full", "rlimit nofile"),
    "output": Control("full", "bounded pipes read by the supervisor"),
    "gpu": Control("full", "device nodes absent, container device list"),
}


def controls(facts: HostFacts) -> dict[str, Control]:
    """The same everywhere, but for disk traffic, which is the kernel's to hold back or not.

    What a daemon turns out not to have, it is refused for when it is asked.
    """
    held = host_controls(facts)["io"]
    if held.level != "none":
        held = replace(held, mechanism=f"container device limits, {held.mechanism}")
    return {**_ROWS, "io": held}


RUNSC_GAPS: Final = {
    "gpu": oci_declared.RUNSC_GAPS["gpu"],
    "inspection": "the image's own authorities are under gVisor's kernel, and cannot be shown with one more",
    "terminal": "gVisor's terminals are its own, and only the daemon could hold the other side of one",
    "deny": "nobody can cover the image's own files under gVisor's kernel; deny what lies below a granted path",
}
# A pipe belongs to the kernel that opened it, wherever its name is (fifo(7)).
_KATA: Final = (
    "a virtual machine joins no named pipe, private place of a size or gateway socket of this host's with the tool"
)


def obstacle(runtime: str, facts: HostFacts) -> tuple[str, str]:
    """Why it will not do on this host, as far as can be told without a daemon, and what would help."""
    if runtime == "kata":
        return _KATA, "isolation.runtime = 'runsc' is the strongest wall there is under docker"
    if facts.is_root_like:
        return "", ""
    reason = "private places and the gateway's sockets are put into a container from outside, which takes root"
    return reason, "run as root, or use the launcher jail, oci or nsjail"
