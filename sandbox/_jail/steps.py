"""The steps that a jail takes from inside, each as a batch of system calls made ready for it.

What can be known beforehand is worked out when a step is made ready: for a jail of a builder's making right before it
is taken, for a template's child long before, by its template. Either way these are the same calls in the same order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct

from sandbox._jail import egress, places
from sandbox._linux import landlock, mounts, process, seccomp, syscalls, wire
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from sandbox._jail.launch import Launch

    Step = Callable[[Launch, Batch, dict[str, Any]], None]

_STDIO_MAX = 2
# <asm-generic/ioctls.h>. Module termios has it, and is a library to load for each zygote.
_TIOCSWINSZ = 0x5414
CALL_NAMESPACES = syscalls.ALL_NAMESPACES & ~syscalls.CLONE_NEWPID
_NO_DEV = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
_GONE = (errno.ENOENT,)


def make_ready(launch: Launch) -> Iterator[tuple[str, Batch]]:
    """The plan's steps of this process, in order, by name. Each is worked out when it is asked for."""
    for step in launch.plan["steps"]:
        if step["where"] == "call":
            batch = Batch()
            STEPS[step["name"]](launch, batch, step["args"])
            yield step["name"], batch


def at_once(step: Step) -> Callable[[Launch, dict[str, Any]], None]:
    """A step taken as soon as it is asked for, where processes share the steps otherwise than in our own jails."""

    def take(launch: Launch, args: dict[str, Any]) -> None:
        batch = Batch()
        step(launch, batch, args)
        batch.run()

    return take


def scratch(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """The private writable places, for a view that holds nothing of one call."""
    places.scratch(launch, batch, args, at=places.INSIDE, root="", owner=os.geteuid())
    batch.unmount(places.INSIDE, mounts.MNT_DETACH)


def namespaces(launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    """The remaining namespaces, under a user namespace of the call's own.

    Every mount made so far is locked for it: with all capabilities of its own namespace it could not remount, move or
    uncover any of them (mount_namespaces(7)). The cgroup namespace's root is the group that we are in by now.
    """
    # A change of uid made us undumpable, and our own id maps belonged to the host's root then (proc(5)).
    batch.prctl("PR_SET_DUMPABLE", process.PR_SET_DUMPABLE, 1)
    batch.add("unshare", syscalls.number("unshare"), CALL_NAMESPACES)
    batch.write("/proc/self/setgroups", b"deny")
    batch.write("/proc/self/uid_map", launch.id_map)
    batch.write("/proc/self/gid_map", launch.id_map)
    batch.prctl("PR_SET_DUMPABLE", process.PR_SET_DUMPABLE, 0)


def proc(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """The jail's own /proc over the host's, with what reaches the whole machine masked or read-only.

    An entry that is not there now may come with a module of the kernel's, so a place for each is asked for.
    """
    batch.mount("proc", "/proc", "proc", _NO_DEV, "hidepid=2")
    # For the step user_limits, which can be taken only in the call's own user namespace.
    batch.open("/proc/sys", os.O_PATH | os.O_DIRECTORY, into=launch.proc_sys)
    for name in args["read_only"]:
        batch.mount(f"/proc/{name}", f"/proc/{name}", "none", mounts.MS_BIND, missing=_GONE)
        flags = mounts.MS_REMOUNT | mounts.MS_BIND | mounts.MS_RDONLY | _NO_DEV
        batch.mount("none", f"/proc/{name}", "none", flags, missing=_GONE)
    for name in args["masked"]:
        path = f"/proc/{name}"
        is_there, is_directory = os.path.lexists(path), os.path.isdir(path)
        missing = _GONE if is_there else (errno.ENOENT, errno.ENOTDIR)
        if is_directory or not is_there:
            batch.mount(
                "tmpfs", path, "tmpfs", _NO_DEV | mounts.MS_RDONLY, "size=4k,nr_inodes=2,mode=555", missing=missing
            )
        if not is_directory:
            # One call instead of four: the mount of /dev/null has its attributes already.
            batch.mount("/dev/null", path, "none", mounts.MS_BIND, missing=missing)


def terminals(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """Pseudo-terminals of the jail's own; with a terminal asked for, its master goes out to the supervisor."""
    mount_terminals(launch, batch, args)
    open_terminal(launch, batch, args)


def mount_terminals(_launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    """A devpts of its own."""
    options = "newinstance,ptmxmode=0666,mode=0620"
    batch.mount("devpts", "/dev/pts", "devpts", mounts.MS_NOSUID | mounts.MS_NOEXEC, options)


def open_terminal(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """The call's terminal, where one is asked for, of the pseudo-terminals that are mounted."""
    if args["tty"]:
        batch.then(lambda: _open_terminal(launch, args))


def _open_terminal(launch: Launch, args: dict[str, Any]) -> None:
    master, slave = os.openpty()
    os.set_inheritable(slave, False)
    fcntl.ioctl(slave, _TIOCSWINSZ, struct.pack("HHHH", args["rows"], args["columns"], 0, 0))
    wire.send(launch.status, {"ev": "terminal", "fds": ["terminal"]}, [master])
    os.close(master)
    launch.fds["terminal"] = slave


def user_limits(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """How much this user namespace may use of what the kernel counts per user; of user namespaces in it, none.

    A second wall behind the filter. What a jail takes counts for whoever made it, too: without a limit of its own it
    could take all of an ordinary user's inotify instances. Source: namespaces(7) on /proc/sys/user, inotify(7).
    """
    for name, value in args.items():
        # Optional: a kernel may not count it per user namespace.
        batch.write(f"user/{name}", b"%d" % value, at=launch.proc_sys, optional=True)


def queues(_launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    """The POSIX message queues of the jail's own ipc namespace, in sight, so that Landlock has a place to allow."""
    batch.mount("mqueue", "/dev/mqueue", "mqueue", _NO_DEV)


def loopback(_launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    """The network namespace holds `lo` alone; bring it up, so that programs can talk to themselves."""
    process.add_loopback_up(batch)


def connect_egress(launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    batch.then(lambda: egress.egress(launch, args))


def hostname(_launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    process.add_host_name(batch, args["name"])


def keyring(launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    """A session keyring of our own: keyrings belong to no namespace, the caller's would be inherited."""
    process.add_new_session_keyring(batch, lambda: launch.notes.append("kernel keyrings are not available here"))


def affinity(_launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """Whole cores, for hosts without a cpu controller; the filter then refuses sched_setaffinity."""

    def choose() -> None:
        allowed = sorted(os.sched_getaffinity(0))
        # Not the first ones for everybody: calls that run at once would crowd one core while the others idle.
        first = int.from_bytes(os.urandom(2), "little") % len(allowed)
        os.sched_setaffinity(0, (allowed * 2)[first : first + args["cores"]])

    batch.then(choose)


def rlimits(_launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    for name, value in args.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        process.add_limit(batch, name, number, value)


def capabilities(launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    process.add_drop_all_caps(batch, launch.cap_last)


def no_new_privs(_launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    batch.prctl("PR_SET_NO_NEW_PRIVS", process.PR_SET_NO_NEW_PRIVS, 1)


def landlock_rules(_launch: Launch, batch: Batch, args: dict[str, Any]) -> None:
    """The second wall: the same paths again, as rules of this process and all its children (landlock(7))."""
    landlock.add_restrict(batch, args["rules"], args["abi"])


def close_fds(launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    batch.then(lambda: _close_fds(launch))


def _close_fds(launch: Launch) -> None:
    """Close everything but the status channel, the terminal, and what goes out with the next message.

    The tool's streams come later.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in range(_STDIO_MAX + 1):
        os.dup2(null, number)
    keep = {fd for name, fd in launch.fds.items() if name in ("status", "terminal")} | {*launch.out_fds.values()}
    first = _STDIO_MAX + 1
    for fd in sorted(keep):
        if fd > first:
            syscalls.close_range(first, fd - 1)
        first = max(first, fd + 1)
    syscalls.close_range(first, 0xFFFFFFFF)


def seccomp_filter(launch: Launch, batch: Batch, _args: dict[str, Any]) -> None:
    seccomp.add_install(batch, launch.seccomp)


STEPS = {
    "scratch": scratch,
    "proc": proc,
    "terminals": terminals,
    "namespaces": namespaces,
    "user_limits": user_limits,
    "queues": queues,
    "loopback": loopback,
    "egress": connect_egress,
    "hostname": hostname,
    "keyring": keyring,
    "affinity": affinity,
    "rlimits": rlimits,
    "capabilities": capabilities,
    "no_new_privs": no_new_privs,
    "landlock": landlock_rules,
    "close_fds": close_fds,
    "seccomp": seccomp_filter,
}
