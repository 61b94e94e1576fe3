"""The builder: one process per call that makes the root view and gives birth to the jail's pid 1.

As root it works with the host's privileges in a mount namespace of its own, since sources may lie in root-only
directories, and maps the jail to an unprivileged uid. As an ordinary user it enters a user namespace first.
Either way pid 1 is born one user and one mount namespace further down: every mount made here is locked for it
(mount_namespaces(7)), so that nothing inside can remount, move or uncover any of them.

It stays outside the jail, waits for pid 1, and says when the jail is gone.
"""

from __future__ import annotations

import os

# All of it now: once the root has changed, nothing of ours can be found on disk any more.
from sandbox._jail import pid1, view
from sandbox._jail.launch import INSIDE_ID, Launch, report_failure
from sandbox._linux import process, syscalls, wire
from sandbox._linux.bare import signal, suppress

# The rest follows from inside, once pid 1 has mounted what only it can: see pid1.namespaces.
FIRST_NAMESPACES = syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWPID | syscalls.CLONE_NEWNS


def run(message: dict[str, object], fds: list[int], zygote_pid: int) -> None:
    """Build the jail and wait until it is gone. Never returns to the zygote's loop."""
    process.die_with_parent()
    if os.getppid() != zygote_pid:
        os._exit(0)
    launch = Launch(message, fds)
    if "template" in launch.plan:
        # Not in the zygote, which most commands start for a single program; and now, while the package is in sight.
        from sandbox._jail import template
    try:
        pid, pidfd, release = _build(launch)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the jail
        report_failure(launch, error)
        os._exit(1)
    if pid == 0:
        if "template" in launch.plan:
            template.run(launch, release)
        pid1.run(launch, release)
        os._exit(1)
    _attend(launch, pid, pidfd, release)


def _build(launch: Launch) -> tuple[int, int, int]:
    """Walk the view steps, then clone pid 1. Returns (pid, pidfd, the sync pipe's end for this side)."""
    launch.step = "mount_namespace"
    if launch.host_uid is None:
        enter_user_namespace(launch)
    else:
        syscalls.unshare(syscalls.CLONE_NEWNS)
    launch.run_steps("view", view.STEPS)
    launch.step = "namespaces"
    sync_read, sync_write = os.pipe2(os.O_CLOEXEC)
    flags = syscalls.ALL_NAMESPACES if "template" in launch.plan else FIRST_NAMESPACES
    pid, pidfd = syscalls.clone(flags, launch.fds.get("cgroup", -1))
    if pid == 0:
        os.close(sync_write)
        return 0, -1, sync_read
    os.close(sync_read)
    return pid, pidfd, sync_write


def enter_user_namespace(launch: Launch) -> None:
    """An ordinary user's: everything is built in a user namespace of his own, in which only he himself exists."""
    uid, gid = os.geteuid(), os.getegid()
    launch.step = "user_namespace"
    # A single-id map keeps the kernel uid. If that is the host's uid 0, dropping every capability would still leave
    # /proc/sys and every root-owned file within reach, so refuse: root has to map a range (user_namespaces(7)).
    if os.stat("/proc/sys").st_uid == uid:
        raise OSError(1, "this uid is the host's root and no other uid can be mapped from here")
    syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
    _write("/proc/self/setgroups", b"deny")
    _write("/proc/self/uid_map", b"%d %d 1" % (launch.own_id, uid))
    _write("/proc/self/gid_map", b"%d %d 1" % (launch.own_id, gid))
    launch.applied.append("user_namespace")


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, data)
    except OSError as error:
        raise OSError(error.errno, f"write {path}: {error.strerror}") from error
    finally:
        os.close(fd)


def _attend(launch: Launch, pid: int, pidfd: int, release: int) -> None:
    """Put pid 1 under its limits, map its ids, let it go; then wait for its end and report it."""
    try:
        launch.step = "join_cgroup"
        for name, fd in launch.fds.items():
            if name.startswith("procs"):
                os.write(fd, b"%d" % pid)
        launch.step = "map_ids"
        if launch.host_uid is None:
            _write(f"/proc/{pid}/setgroups", b"deny")
        _write(f"/proc/{pid}/uid_map", b"%d %d %d" % (INSIDE_ID, launch.owner, launch.uid_count))
        _write(f"/proc/{pid}/gid_map", b"%d %d %d" % (INSIDE_ID, launch.owner, launch.uid_count))
        names = sorted(launch.out_fds)
        wire.send(
            launch.status,
            {"ev": "born", "pid": pid, "fds": ["pidfd", *names], "notes": launch.notes},
            [pidfd, *(launch.out_fds[name] for name in names)],
        )
        os.write(release, b"+")
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        report_failure(launch, error)
    for name, fd in launch.fds.items():
        if name != "status":
            os.close(fd)
    for fd in launch.out_fds.values():
        os.close(fd)
    os.close(pidfd)
    # The pipe's write end stays open: its end of file tells pid 1 that we are gone, should the death signal race.
    _, wait_status = os.waitpid(pid, 0)
    with suppress(BrokenPipeError, ConnectionResetError):
        # Fails when the supervisor gave the jail up or is gone itself: then nobody is left to tell.
        wire.send(launch.status, {"ev": "gone", "wait_status": wait_status})
    os._exit(0)
