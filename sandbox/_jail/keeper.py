"""The keeper: completes containers of somebody else's engine, and ends them when the supervisor is gone.

An engine's containers are not our children: nothing ends them when the supervisor is killed. So a process beside it
holds a descriptor of each container's first process, and kills them all when its socket to the supervisor closes.

To complete one, a child of the keeper enters the namespaces of the container, which waits at its gate, and carries out
the plan's steps there: private places, granted trees, denials, the sockets of the gateway. What is opened on the host
is opened before it enters, without following links, and mounted from that very descriptor.

A container that is still being made has no process to hold yet. Its gate's pipe is known, so its shell is turned away
there when it comes.

Where a container has a kernel of its own nobody can enter it. For such a one the same steps build the same places on
the host, below one mount that no other mount namespace hears of, before its engine makes it and mounts them by path.
Source: setns(2), pid_namespaces(7), pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch  # noqa: F401 - `cover` asks for it inside a container, which has no library of ours
import os
import signal
import socket
import struct
import termios
import time

from sandbox._jail import cover, egress, inside, places, trust, view
from sandbox._jail.launch import Launch, report_failure
from sandbox._linux import mounts, process, syscalls, wire
from sandbox._linux.batch import Batch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NAMESPACES = (("net", syscalls.CLONE_NEWNET), ("pid", syscalls.CLONE_NEWPID), ("mnt", syscalls.CLONE_NEWNS))
# The container's own tree, as seen by whoever has entered it; never empty, so that it can be opened.
_ROOT = "/."
# How long an engine may take to start what it was asked for just before the supervisor was gone.
_LATE_S = 30.0
_LOOK_S = 0.25
# Python 3.11 has no names for them (asm-generic/ioctls.h): the lock of a new terminal's other end, and its number.
_TIOCSPTLCK = 0x40045431
_TIOCGPTN = 0x80045430


class Entry(Launch):
    """One container to be completed. `pid`: its first process, in our own pid namespace; -1 where there is none yet.

    With `built_at` everything is put together in that directory of the host's.
    """

    def __init__(self, message: dict[str, object], fds: list[int]) -> None:
        self.built_at = str(message.get("built_at", ""))
        super().__init__({"mnt": self.built_at or "/run/sandbox", **message}, fds)
        self.is_made_by_us = bool(self.built_at)
        self.pid = int(str(message.get("pid", -1)))
        self.mark = str(message.get("mark", ""))
        # Opened on the host, mounted inside: descriptor, path inside, whether it is a directory.
        self.trees: dict[str, tuple[int, bool]] = {}

    @property
    def root(self) -> str:
        return f"{self.mnt}/root" if self.built_at else _ROOT


def main(control_fd: int) -> None:
    """Serve on `control_fd` until the supervisor closes it; then kill what is left."""
    control = socket.socket(fileno=control_fd)
    os.umask(0o022)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    kept: dict[str, int] = {}
    built: dict[str, str] = {}
    expected: dict[str, str] = {}
    wire.send(control, {"ev": "ready", "pid": os.getpid()})
    while True:
        try:
            message, fds = wire.receive(control)
        except ConnectionResetError:
            message, fds = None, []
        if message is None:
            break
        name = str(message["name"])
        if message["op"] == "expect":
            expected[name] = str(message["pipe"])
            continue
        if message["op"] == "forget":
            built.pop(name, None)
            expected.pop(name, None)
            if name in kept:
                os.close(kept.pop(name))
            continue
        if message["op"] == "build":
            built[name] = str(message["built_at"])
        _take(control, message, fds, kept)
        if name in kept:
            expected.pop(name, None)
    for pidfd in kept.values():
        with contextlib.suppress(ProcessLookupError):
            syscalls.pidfd_kill(pidfd, signal.SIGKILL)
    with contextlib.ExitStack() as stack:
        # Once more at the end: a child of ours may still be building at the first look. The end of us ends it.
        for directory in built.values():
            stack.callback(mounts.detach_all, directory)
        stack.callback(_turn_away, set(expected.values()))
        for directory in built.values():
            stack.callback(mounts.detach_all, directory)


def _turn_away(pipes: set[str]) -> None:
    """End the shells of containers that the engine starts only now: each meets a writer, reads the end, and goes.

    The writer stays a moment, since gVisor looks every 100 ms whether there is one, and is away for one, since a reader
    that finds the next one there has seen no end.
    """
    met: set[str] = set()
    for _ in range(round(_LATE_S / (2 * _LOOK_S))):
        held = []
        for pipe in list(pipes):
            try:
                held.append(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
                met.add(pipe)
            except OSError as error:
                # ENXIO: nobody waits there (fifo(7)), not yet or no more. Else the next supervisor has removed it.
                if error.errno != errno.ENXIO or pipe in met:
                    pipes.discard(pipe)
        if not pipes:
            return
        time.sleep(_LOOK_S)
        for fd in held:
            os.close(fd)
        time.sleep(_LOOK_S)


def _take(control: socket.socket, message: dict[str, object], fds: list[int], kept: dict[str, int]) -> None:
    """One of the supervisor's requests: `build`; or `keep` and `enter`, which watch a container and complete it."""
    entry = Entry(message, fds)
    entry.step = "container"
    work = {"build": _build, "keep": _join, "enter": _complete}[str(message["op"])]
    try:
        if message["op"] != "build":
            _keep(entry, str(message["name"]), kept)
    except OSError as error:
        report_failure(entry, error)
    else:
        if os.fork() == 0:
            control.close()
            for other in kept.values():
                os.close(other)
            work(entry)
    for fd in entry.fds.values():
        if fd != entry.fds["status"]:
            os.close(fd)
    entry.status.close()


def _keep(entry: Entry, name: str, kept: dict[str, int]) -> None:
    pidfd = os.pidfd_open(entry.pid)
    kept[name] = pidfd
    # The pid may be another process's by now, or of another pid namespace: the descriptor stays with whom we ask.
    if not _is_marked(entry):
        raise OSError(3, f"process {entry.pid} is not the container's: its engine runs on another machine")
    wire.send(entry.status, {"ev": "born", "pid": entry.pid, "notes": [], "fds": ["pidfd"]}, [pidfd])


def _is_marked(entry: Entry) -> bool:
    """Whether the process is in a cgroup that bears the container's name."""
    with open(f"/proc/{entry.pid}/cgroup", encoding="utf-8", errors="replace") as file:
        return entry.mark in file.read()


def _complete(entry: Entry) -> None:
    """In a child: open what is the host's, enter, and do the rest in a child that is inside. Does not return."""
    try:
        _open_all(entry)
        entry.step = "enter"
        namespaces = [(os.open(f"/proc/{entry.pid}/ns/{name}", os.O_RDONLY), kind) for name, kind in _NAMESPACES]
        for fd, kind in namespaces:
            syscalls.setns(fd, kind)
            os.close(fd)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            os._exit(0)
        os.chdir("/")
        entry.run_steps("view", INSIDE)
        entry.run_steps("call", INSIDE)
        mounts.unmount_detached(places.INSIDE)
        _report_sealed(entry)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the container
        report_failure(entry, error)
    os._exit(0)


def _open_all(entry: Entry) -> None:
    """In a child: open what is the host's. Afterwards the child is in a mount namespace of its own."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    process.die_with_parent()
    # The host's mounts may be shared, and copies of them as well: what is mounted on such a copy inside would
    # appear on the host, in everybody's sight (mount_namespaces(7)). Copies made here are nobody's peers.
    syscalls.unshare(syscalls.CLONE_NEWNS)
    mounts.make_private()
    entry.run_steps("view", OUTSIDE)
    entry.applied.clear()


def _report_sealed(entry: Entry) -> None:
    sealed: dict[str, object] = {"ev": "sealed", "steps": entry.applied, "notes": entry.notes}
    wire.send(entry.status, {**sealed, "fds": [*entry.out_fds]}, [*entry.out_fds.values()])


def _build(entry: Entry) -> None:
    """In a child: put everything together on the host, for an engine that mounts it by path. Does not return."""
    try:
        host = os.open("/proc/self/ns/mnt", os.O_RDONLY)
        _open_all(entry)
        entry.step = "view"
        syscalls.setns(host, syscalls.CLONE_NEWNS)
        os.close(host)
        # What is mounted below a mount without peers appears in no other mount namespace, and where a copy of one of
        # the host's trees is covered, that tree is not.
        mounts.mount(entry.mnt, entry.mnt, "none", mounts.MS_BIND)
        mounts.make_private(entry.mnt)
        scratch = next(step["args"] for step in entry.plan["steps"] if step["name"] == "scratch")
        view.new_root(entry, {"places": [*scratch["directories"]]})
        entry.run_steps("view", BUILT)
        _report_sealed(entry)
    except Exception as error:  # noqa: BLE001 - it is reported, and nothing is made
        report_failure(entry, error)
    os._exit(0)


def _join(entry: Entry) -> None:
    """In a child: what is left for a container that was built, the sockets of the gateway. Does not return.

    A kernel of its own inside may use the network stack of the namespace that its engine made for it.
    """
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        process.die_with_parent()
        entry.step = "enter"
        fd = os.open(f"/proc/{entry.pid}/ns/net", os.O_RDONLY)
        if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net")):
            raise OSError(errno.EPERM, "the container has no network namespace of its own")
        syscalls.setns(fd, syscalls.CLONE_NEWNET)
        os.close(fd)
        # A runtime that brings a network stack of its own leaves this one as it was made.
        batch = Batch()
        process.add_loopback_up(batch)
        batch.run()
        entry.run_steps("view", JOINED)
        entry.run_steps("call", JOINED)
        _report_sealed(entry)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the container
        report_failure(entry, error)
    os._exit(0)


def _nothing(_launch: Launch, _args: dict[str, Any]) -> None:
    """A step that the engine has carried out, or that is the other side's."""


def _open_grants(launch: Launch, args: dict[str, Any]) -> None:
    assert isinstance(launch, Entry)
    for grant in args["paths"]:
        attributes = view.WRITABLE if grant["access"] == "write" else view.READ_ONLY
        launch.trees[grant["jail_path"]] = view.open_grant(launch, grant["host_path"], attributes, grant)


def _open_workspace(launch: Launch, args: dict[str, Any]) -> None:
    assert isinstance(launch, Entry)
    if args["mode"] == "cow":
        launch.trees[args["jail_path"]] = view.open_lower(launch, args), True
        return
    attributes = view.WRITABLE if args["mode"] == "rw" else view.READ_ONLY
    launch.trees[args["jail_path"]] = view.open_grant(launch, args["host_path"], attributes, args)


def _attach_grants(launch: Launch, args: dict[str, Any]) -> None:
    for grant in sorted(args["paths"], key=lambda g: str(g["jail_path"]).count("/")):
        _attach(launch, grant["jail_path"])


def _attach(launch: Launch, jail_path: str) -> None:
    assert isinstance(launch, Entry)
    tree, is_directory = launch.trees[jail_path]
    view.attach_grant(launch, tree, jail_path, directory=is_directory)


def _attach_workspace(launch: Launch, args: dict[str, Any]) -> None:
    assert isinstance(launch, Entry)
    if args["mode"] == "cow":
        view.attach_overlay(launch, launch.trees[args["jail_path"]][0], args["jail_path"])
        # The overlay holds on to it; under this name it would be in sight.
        mounts.unmount_detached(f"{launch.mnt}/lower")
    else:
        _attach(launch, args["jail_path"])
    fd = inside.make_place(launch, args["jail_path"], directory=True)
    try:
        view.protect(launch, fd, args)
    finally:
        os.close(fd)


def _scratch(launch: Launch, args: dict[str, Any]) -> None:
    batch = Batch()
    places.scratch(launch, batch, args, at=places.INSIDE, root="", owner=launch.owner)
    batch.run()


def _load_keystore(_launch: Launch, _args: dict[str, Any]) -> None:
    """Inside there is no package of ours to load it from."""
    from sandbox._jail import keystore  # noqa: F401


def _trust(launch: Launch, args: dict[str, Any]) -> None:
    """The image's own authorities with the gateway's, on a file system of their own, as the gate's is read-only."""
    directory = os.path.dirname(args["bundle_file"])
    flags = mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC
    mounts.mount("tmpfs", directory, "tmpfs", flags, "size=16m,nr_inodes=8,mode=755")
    trust.show(launch, args, trust.image_roots(launch, args))
    mounts.remount_read_only(directory, more_flags=mounts.MS_NOEXEC)


def _open_terminal(launch: Launch, args: dict[str, Any]) -> None:
    """A pseudo-terminal of the container's own: its master goes out, the other end is the tool's by name and owner.

    The other end is not opened here: closing it again would be an end to whoever reads the master (pty(7)).
    """
    master = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        (number,) = struct.unpack("I", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", args["rows"], args["columns"], 0, 0))
        path = f"/dev/pts/{number}"
        # Nothing of the tool's runs in there yet, and the directory holds terminals alone.
        os.chown(path, launch.owner, -1)
        os.chmod(path, 0o600)
        wire.send(launch.status, {"ev": "terminal", "path": path, "fds": ["terminal"]}, [master])
    finally:
        os.close(master)


_ENGINES_OWN = ("container", "namespaces", "hostname", "rlimits", "proc", "capabilities", "no_new_privs", "seccomp")
_ALL = (*_ENGINES_OWN, "etc_files", "scratch", "system_view", "grants", "workspace", "inner_grants", "deny")
OUTSIDE = dict.fromkeys((*_ALL, "terminals"), _nothing) | {
    "trust": _load_keystore,
    "grants": _open_grants,
    "inner_grants": _open_grants,
    "workspace": _open_workspace,
}
_ATTACH = dict.fromkeys(_ALL, _nothing) | {
    "grants": _attach_grants,
    "inner_grants": _attach_grants,
    "workspace": _attach_workspace,
    "deny": cover.deny,
}
INSIDE = _ATTACH | {
    "scratch": _scratch,
    "trust": _trust,
    "terminals": _open_terminal,
    "egress": egress.egress,
}
BUILT = _ATTACH | {"scratch": view.scratch}
JOINED = dict.fromkeys(_ALL, _nothing) | {"egress": egress.egress}
