"""The attendant: has an OCI runtime or nsjail make a call's container around the root view that the builder made.

The builder makes the view with the native jail's own steps and stays outside. Its child, the attendant, is pid 1 of a
pid namespace of its own; in there it runs the container's runtime. When it ends, or is killed, the kernel ends the
runtime and the container with it, and bundle and runtime state lie on a tmpfs that goes with its mount namespace: so
nothing is left behind whatever dies. Between the runtime's "created" and "started" the attendant puts the container
under the call's limits and makes in its namespaces what the plan wants there, the egress sockets among it.

Source: OCI runtime-spec (config.md, runtime.md), pid_namespaces(7), setns(2), cgroup_namespaces(7).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal

from sandbox._jail import builder, runtimes, steps, view
from sandbox._jail import keystore as _keystore  # noqa: F401 - for the step `trust`: inside there is no package
from sandbox._jail.launch import Launch, report_failure
from sandbox._linux import mounts, process, syscalls, wire

CGROUPS = "/sys/fs/cgroup"
_BUNDLE_BYTES = 4 << 20
FIRST_INNER_FD = 3
ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
_NAMESPACES = (
    ("user", syscalls.CLONE_NEWUSER),
    ("net", syscalls.CLONE_NEWNET),
    ("uts", syscalls.CLONE_NEWUTS),
    ("ipc", syscalls.CLONE_NEWIPC),
    ("mnt", syscalls.CLONE_NEWNS),
)
_OUTSIDE = {
    name: steps.at_once(steps.STEPS[name])
    for name in ("proc", "queues", "user_limits", "loopback", "egress", "hostname")
}
_OUTSIDE["terminals"] = steps.at_once(steps.mount_terminals)
_ENTER = {name: steps.at_once(steps.STEPS[name]) for name in ("affinity", "rlimits")}


def run(message: dict[str, object], fds: list[int], zygote_pid: int, kind: type[Attendant]) -> None:
    """As the builder of a jail: build the view, have the container made, wait until it is gone. Does not return."""
    process.die_with_parent()
    if os.getppid() != zygote_pid:
        os._exit(0)
    launch = Launch(message, fds)
    alive_read, alive_write = os.pipe2(os.O_CLOEXEC)
    try:
        _build(launch)
        # A pid namespace of the runtime's own, which ends with its first process.
        pid, pidfd = syscalls.clone(syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the call
        report_failure(launch, error)
        os._exit(1)
    if pid == 0:
        os.close(alive_write)
        kind(launch, message, alive_read).run()
    names = sorted(launch.out_fds)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        born = {"ev": "born", "pid": pid, "fds": ["pidfd", *names], "notes": launch.notes}
        wire.send(launch.status, born, [pidfd, *(launch.out_fds[name] for name in names)])
    for fd in (pidfd, *launch.out_fds.values(), *(fd for name, fd in launch.fds.items() if name != "status")):
        os.close(fd)
    _, wait_status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        wire.send(launch.status, {"ev": "gone", "wait_status": wait_status})
    os._exit(0)


def _build(launch: Launch) -> None:
    """The root view by the native jail's steps, with places for what the runtime mounts."""
    launch.step = "mount_namespace"
    if launch.host_uid is None:
        builder.enter_user_namespace(launch)
    else:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    launch.run_steps("view", view.STEPS)
    launch.step = "bundle"
    # A mount of its own, read-only: as part of the root it would be so too. Its nodes have theirs, as they were made.
    dev = f"{launch.root}/dev"
    mounts.mount(dev, dev, "none", mounts.MS_BIND | mounts.MS_REC)
    mounts.remount_read_only(dev)
    # The runtime goes to the root as one of the container's own ids. Nobody else is in this mount namespace.
    os.chmod(launch.mnt, 0o711)  # noqa: S103 - to pass through


class Attendant:
    """Pid 1 of the runtime's pid namespace: from the bundle to the container's end. `attend` is the kind's own."""

    def __init__(self, launch: Launch, message: dict[str, object], alive_fd: int) -> None:
        self.launch = launch
        self.message = message
        self.program = str(message["program"])
        self.bundle = f"{launch.mnt}/bundle"
        self.alive_fd = alive_fd

    def run(self) -> None:
        """Does not return."""
        try:
            process.die_with_parent()
            self._check_alive()
            status = self.attend()
        except Exception as error:  # noqa: BLE001 - it is reported, and ends the call
            report_failure(self.launch, error)
            status = 1
        os._exit(status)

    def attend(self) -> int:
        """Have the container made and see it through to its end; our own exit status."""
        raise NotImplementedError

    def _check_alive(self) -> None:
        """The builder may have died before the death signal was asked for; its end of the pipe is closed then."""
        os.set_blocking(self.alive_fd, False)
        with contextlib.suppress(BlockingIOError):
            os.read(self.alive_fd, 1)
            os._exit(1)

    def prepare(self) -> None:
        """A /proc of this pid namespace, and a place for bundle and state that ends with this mount namespace."""
        self.launch.step = "bundle"
        mounts.mount("proc", "/proc", "proc", mounts.MS_NOSUID | mounts.MS_NODEV | mounts.MS_NOEXEC)
        self._show_own_cgroup_only()
        os.mkdir(self.bundle, 0o711)
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("tmpfs", self.bundle, "tmpfs", flags, f"size={_BUNDLE_BYTES},mode=711")

    def _show_own_cgroup_only(self) -> None:
        """Runtimes find no control groups but the call's own: what they make or write is below it."""
        if not os.path.isdir(CGROUPS):
            return
        group = str(self.message["cgroup_v2"])
        if group:
            mounts.mount(group, CGROUPS, "none", mounts.MS_BIND)
        else:
            mounts.mount("tmpfs", CGROUPS, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "size=4k,nr_inodes=2,mode=555")

    def procs_fds(self) -> list[int]:
        """The `cgroup.procs` files of the call's groups."""
        return [fd for name, fd in self.launch.fds.items() if name.startswith("procs")]


class SharedKernel(Attendant):
    """For runtimes whose containers share this kernel: the container's first process is ours (`inner`)."""

    def __init__(self, launch: Launch, message: dict[str, object], alive_fd: int) -> None:
        super().__init__(launch, message, alive_fd)
        self.runtime = runtimes.runtime(message)
        names = message["inner_fds"]
        assert isinstance(names, list)
        # What the container's first process finds open, by name.
        self.inner_fds: list[str] = names

    def attend(self) -> int:
        launch, runtime = self.launch, self.runtime
        self.prepare()
        runtime.write_bundle(wire.read_memfd(launch.fds["config"]))
        release_read, release_write = os.pipe2(os.O_CLOEXEC)
        launch.fds["release"] = release_read
        if isinstance(runtime, runtimes.Nsjail):
            launch.fds["ready"] = runtime.ready_write
        cgroup_namespace = self._cgroup_namespace()
        launch.step = "create"
        pid = runtime.create(lambda: self._enter(cgroup_namespace))
        os.close(cgroup_namespace)
        os.close(release_read)
        self._join_cgroup(pid)
        launch.applied += [step["name"] for step in launch.plan["steps"] if step["where"] in ("enter", "runtime")]
        self._in_namespaces(pid)
        launch.step = "start"
        runtime.start()
        state = {"applied": launch.applied, "notes": launch.notes}
        with contextlib.suppress(BrokenPipeError):  # it ended at once, and its end says more than this
            os.write(release_write, json.dumps(state).encode() + b"\n")
        # The pipe stays open: its end of file tells the container's first process that we are gone.
        failure = runtime.wait(pid)
        if failure:
            launch.step = "init"
            report_failure(launch, OSError(failure))
        return 0

    def _cgroup_namespace(self) -> int:
        """A cgroup namespace whose root is the call's group: it is that of the process which unshares (no other way).

        The runtime joins the namespace and not the group, so that the group counts the call and nothing else.
        """
        self.launch.step = "join_cgroup"
        ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
        pid, pidfd = syscalls.clone(0)
        if pid == 0:
            for fd in self.procs_fds():
                os.write(fd, b"0")
            syscalls.unshare(syscalls.CLONE_NEWCGROUP)
            os.write(ready_write, b"+")
            signal.pause()
        os.close(ready_write)
        try:
            if os.read(ready_read, 1) != b"+":
                raise OSError("the call's group could not be joined")
            return os.open(f"/proc/{pid}/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            syscalls.pidfd_kill(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pidfd)
            os.close(ready_read)

    def _enter(self, cgroup_namespace: int) -> None:
        """In the process that becomes the runtime: what the container inherits from it."""
        launch = self.launch
        self.runtime.enter_group(CGROUPS)
        syscalls.setns(cgroup_namespace, syscalls.CLONE_NEWCGROUP)
        # First out of the way of the low numbers, so that no dup2 overwrites a source that is still needed.
        moved = [fcntl.fcntl(launch.fds[name], fcntl.F_DUPFD_CLOEXEC, 32) for name in self.inner_fds]
        for number, fd in enumerate(moved, FIRST_INNER_FD):
            os.dup2(fd, number, inheritable=True)
        # Only now: the call's limit of open files may be lower than the numbers above.
        launch.run_steps("enter", _ENTER)

    def _join_cgroup(self, pid: int) -> None:
        self.launch.step = "join_cgroup"
        self.runtime.take_group_back(CGROUPS)
        for fd in self.procs_fds():
            os.write(fd, b"%d" % pid)
        self.launch.applied.append("join_cgroup")
        for name in [name for name in self.launch.fds if name.startswith("procs")]:
            os.close(self.launch.fds.pop(name))
        self.runtime.leave_no_group(CGROUPS)

    def _in_namespaces(self, container_pid: int) -> None:
        """The steps that take privileges in the container's namespaces, carried out by a child that enters them."""
        launch = self.launch
        launch.step = "namespaces"
        launch.proc_sys.value = os.open("/proc/sys", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        opened = [
            (os.open(f"/proc/{container_pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC), flag)
            for name, flag in _NAMESPACES
        ]
        told_read, told_write = os.pipe2(os.O_CLOEXEC)
        pid = self._fork_into(container_pid)
        if pid == 0:
            try:
                for fd, flag in opened:
                    syscalls.setns(fd, flag)
                launch.applied = []
                launch.run_steps("outside", _OUTSIDE)
            except Exception as error:  # noqa: BLE001 - it is reported, and ends the call
                report_failure(launch, error)
                os._exit(1)
            os.write(told_write, json.dumps([launch.applied, launch.notes]).encode())
            os._exit(0)
        for fd in (told_write, launch.proc_sys.value, *(fd for fd, _ in opened)):
            os.close(fd)
        with open(told_read, "rb") as file:
            told = file.read()
        _, status = os.waitpid(pid, 0)
        if status:
            os._exit(1)  # it has said why
        applied, launch.notes = json.loads(told)
        launch.applied += applied

    @staticmethod
    def _fork_into(container_pid: int) -> int:
        """Fork a child into the pid namespace of the container: a /proc is that of whoever mounts it."""
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        other = os.open(f"/proc/{container_pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.setns(other, syscalls.CLONE_NEWPID)
            pid = os.fork()
            if pid:
                syscalls.setns(own, syscalls.CLONE_NEWPID)
            return pid
        finally:
            os.close(own)
            os.close(other)
