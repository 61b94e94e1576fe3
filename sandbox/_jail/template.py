"""The template: a process inside a jail of its own from which single-use jails are forked.

It lives one user namespace below the root view, so it can make namespaces and mounts for its children and cannot touch
the view. For functions it is a fresh interpreter that has imported what the tool needs; input of a call never
reaches it, only a child that has sealed itself. When it ends, its pid namespace ends, and with that all of its
children. Nothing of a call returns here but an exit status.

The imports run with the namespace's capabilities, before any filter: they are the developer's own modules, which the
caller's process has imported as well. Source: pid_namespaces(7), user_namespaces(7), unshare(2).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import warnings

from sandbox._jail import function, pid1, places, rehearsal, steps
from sandbox._jail.launch import INSIDE_ID, Launch, report_failure
from sandbox._linux import mounts, pages, process, syscalls, wire
from sandbox._linux.batch import Batch, slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

LIB = "/run/sandbox/lib"
_BOOT = f"import sys; sys.path.append({LIB!r}); from sandbox._jail.template import main; main(sys.argv[1])"
# What making a jail takes: mounts and namespaces, ids, the bounding set, loopback.
_KEPT_CAPS = {"SETGID": 6, "SETUID": 7, "SETPCAP": 8, "NET_ADMIN": 12, "SYS_ADMIN": 21}


def run(launch: Launch, release: int) -> None:
    """From birth to the end of the template. Does not return."""
    try:
        pid1.wait_for_release(launch, release)
        process.set_not_dumpable()
        settings = launch.plan["template"]
        if settings["function"]:
            _start_interpreter(launch, settings)
        _serve(launch, _prepare(launch))
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the jail
        report_failure(launch, error)
    os._exit(1)


def _start_interpreter(launch: Launch, settings: dict[str, Any]) -> None:
    """Exec the caller's interpreter with its packages, keeping what making jails takes across the exec."""
    launch.step = "template"
    mounts.mount("proc", "/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
    batch = Batch()
    places.scratch(launch, batch, _scratch(launch), at=places.INSIDE, root="", owner=os.geteuid())
    batch.run()
    mounts.unmount_detached(places.INSIDE)
    for fd in launch.out_fds.values():
        os.close(fd)
    process.loopback_up()
    process.raise_ambient(list(_KEPT_CAPS.values()))
    kept = {name: launch.fds[name] for name in ("status", "plan", "seccomp")}
    state = {"fds": list(kept), "host_uid": launch.host_uid, "mnt": launch.mnt, "numbers": list(kept.values())}
    state["applied"] = launch.applied
    for fd in kept.values():
        os.set_inheritable(fd, True)
    os.chdir("/")
    _leave_init()
    argv = [settings["python"], "-I", "-c", _BOOT, json.dumps(state)]
    # Symbols that are resolved now are resolved for all children.
    os.execve(argv[0], argv, {**settings["env"], "LD_BIND_NOW": "1"})  # noqa: S606 - this is the point


def _scratch(launch: Launch) -> dict[str, Any]:
    args: dict[str, Any] = next(step["args"] for step in launch.plan["steps"] if step["name"] == "scratch")
    return args


def _leave_init() -> None:
    """Go on in a child whose pid no jail's process will have; we stay behind as pid 1 until it ends.

    A jail's first process is pid 1. Libraries tell by a changed pid that they were forked and have to draw new random
    numbers (OpenSSL 3 does, and `tempfile`): from a template with that same pid every call would draw the same ones.
    """
    with open("/proc/sys/kernel/pid_max", "rb") as file:
        highest = int(file.read()) - 1
    pid, _ = syscalls.clone(0, pid=highest)
    if pid:
        syscalls.close_range(0, 0xFFFFFFFF)
        os.waitpid(pid, 0)
        os._exit(0)
    process.die_with_parent()


def main(text: str) -> None:
    """Entry of the fresh interpreter: import what is named, then serve."""
    state = json.loads(text)
    del os.environ["LD_BIND_NOW"]
    for fd in state["numbers"]:
        os.set_inheritable(fd, False)
    launch = Launch(state, state["numbers"])
    launch.applied = state["applied"]
    try:
        process.set_not_dumpable()
        sys.path.remove(LIB)
        for name in [name for name in sys.modules if name.partition(".")[0] == "sandbox"]:
            # A tool's module may import the real package, which must not find these few files in its place.
            del sys.modules[name]
        _preload(launch, launch.plan["template"]["preload"])
        # What the imports wrote goes with the places they had; each jail mounts its own over what is below.
        for place in ("/proc", *_scratch(launch)["directories"]):
            mounts.unmount_detached(place)
        _serve(launch, _prepare(launch))
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the jail
        report_failure(launch, error)
    os._exit(1)


def _preload(launch: Launch, names: list[str]) -> None:
    sys.path.append(function.SITE)
    for name in names:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - the call will import it again and say so to its caller
            launch.notes.append(f"import of {name} in the template: {type(error).__name__}")
    # Threads that a library started are not in the child; the library's own fork handlers deal with that.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)


class Prepared:
    """What children need not work out: their steps, how a call is taken, which pages that writes to."""

    def __init__(self, launch: Launch) -> None:
        settings = launch.plan["template"]
        self.steps = list(steps.make_ready(launch))
        self.seat = function.Seat(settings) if settings["function"] else None
        # How a child begins, after so many groups that it joins.
        self.pages = pages.Pages([], [])
        self.beginnings: dict[int, Beginning] = {}

    def beginning(self, fds: list[int]) -> Beginning:
        """That of a child which joins the groups that `fds` are the tasks of."""
        if len(fds) not in self.beginnings:
            self.beginnings[len(fds)] = Beginning(len(fds), self.pages)
        made = self.beginnings[len(fds)]
        for place, fd in zip(made.group_fds, fds, strict=True):
            place.value = fd
        return made


class Beginning:
    """The first calls of a child: it joins the groups of its call, then has what it will need of our memory."""

    def __init__(self, group_count: int, needed: pages.Pages) -> None:
        self.group_fds = [slot() for _ in range(group_count)]
        self.batch = Batch()
        itself = self.batch.address(b"0")
        for fd in self.group_fds:
            self.batch.add("write of our pid into a group", syscalls.number("write"), fd, itself, 1)
        # Only now: what is copied counts for the call.
        needed.add_populate(self.batch)


def _prepare(launch: Launch) -> Prepared:
    rehearsal.rehearse(launch, launch.plan["template"])
    prepared = Prepared(launch)
    _freeze()
    stage = rehearsal.Stage(launch, prepared.seat)

    def be_a_jail() -> None:
        _leave_template(prepared)
        # Our own page table is shown to us only while we are dumpable (proc(5)).
        process.set_dumpable(dumpable=True)
        for _, batch in prepared.steps:
            batch.rehearse()
        stage.play()

    prepared.pages = pages.touched_after_fork(be_a_jail)
    stage.close()
    return prepared


def _freeze() -> None:
    """Children share our pages until somebody writes; a collection would write to all of them (gc.freeze)."""
    gc.collect()
    gc.freeze()
    gc.disable()


class _Children:
    """The jails that live: pid to the descriptor of the status channel on which their end is told."""

    def __init__(self, *, is_function: bool) -> None:
        self.is_function = is_function
        self.channels: dict[int, int] = {}

    def reap(self) -> None:
        while True:
            try:
                pid, wait_status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            channel = self.channels.pop(pid, None)
            if channel is None:
                continue
            message = {"ev": "gone", "wait_status": wait_status}
            if self.is_function:
                # The tool itself: its end is the call's.
                message |= {
                    "user_s": usage.ru_utime,
                    "system_s": usage.ru_stime,
                    "maxrss_bytes": usage.ru_maxrss * 1024,
                }
            # Not by a socket object: what is made here is a copy of a page that the children share.
            with contextlib.suppress(OSError):
                # Fails when the supervisor gave this jail up: then nobody waits for its end.
                os.write(channel, json.dumps(message).encode())
            os.close(channel)


def _serve(launch: Launch, prepared: Prepared) -> None:
    """Fork a jail for each request, until the supervisor closes the channel."""
    children = _Children(is_function=prepared.seat is not None)
    own_pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    # A jail stops before it is killed (`launchers.jail`).
    process.hear_only_of_ends()
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    poller = select.poll()
    poller.register(wake_read, select.POLLIN)
    poller.register(launch.status, select.POLLIN)
    wire.send(launch.status, {"ev": "serving", "notes": launch.notes})
    while True:
        readable = [fd for fd, _ in poller.poll()]
        if wake_read in readable:
            os.read(wake_read, 4096)
            children.reap()
        if launch.status.fileno() in readable:
            message, fds = wire.receive(launch.status)
            if message is None:
                os._exit(0)
            pid = _fork(launch, message, fds, (prepared, own_pid_namespace))
            children.channels[pid] = fds[-1]


def _fork(launch: Launch, message: dict[str, Any], fds: list[int], own: tuple[Prepared, int]) -> int:
    """Make one jail; its pid. Of `fds` the groups' are closed here, the status channel, the last one, is kept."""
    prepared, own_pid_namespace = own
    # The next child is the first process of a new pid namespace; afterwards our children are ours again.
    syscalls.unshare(syscalls.CLONE_NEWPID)
    beginning = prepared.beginning(fds[:-1])
    pid = syscalls.fork()
    if pid == 0:
        _become_jail(launch, fds[-1], int(message["index"]), (prepared, beginning))
    syscalls.setns(own_pid_namespace, syscalls.CLONE_NEWPID)
    for fd in fds[:-1]:
        os.close(fd)
    return pid


def _leave_template(prepared: Prepared) -> None:
    """In the child: what a forked interpreter has to do before anything else."""
    syscalls.after_fork_in_child()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if prepared.seat is not None:
        function.prepare()


def _become_jail(launch: Launch, status: int, index: int, ready: tuple[Prepared, Beginning]) -> None:
    """In the child: join the call's group, take an own uid, finish the jail, park, run. Does not return."""
    prepared, beginning = ready
    try:
        launch.step = "join_cgroup"
        try:
            beginning.batch.run()
        finally:
            launch.status.detach()
            launch.status = socket.socket(fileno=status)
        _leave_template(prepared)
        launch.fds = {"status": status}
        # The supervisor gets it when we are sealed: from outside we have another pid.
        launch.out_fds = {"pidfd": os.pidfd_open(os.getpid())}
        launch.step = "map_ids"
        if index:
            os.setresgid(INSIDE_ID + index, INSIDE_ID + index, INSIDE_ID + index)
            os.setresuid(INSIDE_ID + index, INSIDE_ID + index, INSIDE_ID + index)
        launch.step = "mount_namespace"
        syscalls.unshare(syscalls.CLONE_NEWNS)
        launch.applied += ["template", "join_cgroup", "map_ids"]
        launch.take_id(INSIDE_ID + index)
        launch.take_ready(prepared.steps)
        if prepared.seat is not None:
            pid1.tell_sealed(launch)
            function.run(launch, prepared.seat)
        pid1.park(launch)
        pid1.run_program(launch, waits=True)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the jail
        report_failure(launch, error)
    os._exit(1)
