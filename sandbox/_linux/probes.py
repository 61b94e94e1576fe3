"""Try what the kernel lets us do, in forked children that throw everything away.

A child G leaves for a user namespace of its own, which we map as a jail's is: to an unprivileged host uid when we are
root, else to our own. G tries the other namespaces and mounts, its child H (pid 1 of a new pid namespace) mounts /proc
and counts tasks. Results are plain data: for each feature 0 (works) or the errno of the refusal.
Call from single-threaded processes only. Nothing here changes the host.
Source: namespaces(7), user_namespaces(7), landlock(7), seccomp(2).
"""

from __future__ import annotations

import _thread
import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import time

from sandbox._linux import mounts, netfilter, process, syscalls

JAIL_ID = 1000
UNPRIVILEGED_ID = 65534
NAMESPACES = {
    "mount": syscalls.CLONE_NEWNS,
    "net": syscalls.CLONE_NEWNET,
    "ipc": syscalls.CLONE_NEWIPC,
    "uts": syscalls.CLONE_NEWUTS,
    "cgroup": syscalls.CLONE_NEWCGROUP,
    "pid": syscalls.CLONE_NEWPID,
}
_CAP_SYS_ADMIN = 21
_NR_LANDLOCK_CREATE_RULESET = 444
_NR_PIDFD_OPEN = 434
_LANDLOCK_VERSION = 1
# G and H are two of them.
_TASKS = 4
# Any directory will do to cover with a tmpfs in a mount namespace of our own.
_PLACES = ("/tmp", "/var/tmp", "/mnt", "/run")  # noqa: S108
# With no answer in this time the host is in trouble; the child is killed and every feature counts as missing.
_TIMEOUT_S = 10.0


def landlock_abi() -> int:
    """The Landlock ABI version, 0 when the kernel has none or has it switched off."""
    try:
        return syscalls.call("landlock_create_ruleset", _NR_LANDLOCK_CREATE_RULESET, 0, 0, _LANDLOCK_VERSION)
    except OSError:
        return 0


def system_calls() -> dict[str, bool]:
    """Which newer system calls exist and are not filtered away: each is asked something it must refuse as invalid."""
    questions: dict[str, tuple[int, ...]] = {
        "pidfd_open": (_NR_PIDFD_OPEN, -1, 0),
        "clone3": (syscalls.NR_CLONE3, 0, 0),
        "close_range": (syscalls.NR_CLOSE_RANGE, 2, 1, 0),
        "openat2": (syscalls.NR_OPENAT2, syscalls.AT_FDCWD, 0, 0, 0),
        "mount_setattr": (syscalls.NR_MOUNT_SETATTR, -1, 0, 0, 0, 0),
        # An unknown operation: EOPNOTSUPP where there are keyrings.
        "keyctl": (syscalls.number("keyctl"), 0x7FFF, 0, 0, 0, 0),
    }
    return {name: _exists(name, *question) for name, question in questions.items()}


def _exists(name: str, nr: int, *args: int) -> bool:
    try:
        syscalls.call(name, nr, *args)
    except OSError as err:
        return err.errno not in (errno.ENOSYS, errno.EPERM)
    return True


def is_root_like() -> bool:
    """Whether we have CAP_SYS_ADMIN in the initial user namespace."""
    with open("/proc/self/status", "rb") as file:
        caps = next(int(line.split()[1], 16) for line in file if line.startswith(b"CapEff:"))
    if not caps >> _CAP_SYS_ADMIN & 1:
        return False
    try:
        with open("/proc/self/uid_map", "rb") as file:
            return file.read().split() == [b"0", b"0", b"4294967295"]
    except FileNotFoundError:
        return False  # a kernel without user namespaces; nothing here works then


class Trials:
    """Trials under way in a child: `begin`, `go_on` and `results`, with time for something else in between."""

    def __init__(self, pid: int, fds: tuple[int, int, int], *, as_root: bool) -> None:
        self._pid = pid
        self._answers, self._ready, self._mapped = fds
        self._as_root = as_root
        self._results: dict[str, object] = {}
        self._deadline = time.monotonic() + _TIMEOUT_S

    @classmethod
    def begin(cls, *, as_root: bool) -> Trials:
        """Fork the child, which leaves for a user namespace of its own."""
        ends = [end for _ in range(3) for end in os.pipe2(os.O_CLOEXEC)]
        read_fd, write_fd, ready_read, ready_write, mapped_read, mapped_write = ends
        pid = os.fork()
        if pid == 0:
            os.close(ready_read)
            os.close(mapped_write)
            _run_inside(write_fd, ready_write, mapped_read)
        for fd in (write_fd, ready_write, mapped_read):
            os.close(fd)
        return cls(pid, (read_fd, ready_read, mapped_write), as_root=as_root)

    def go_on(self) -> None:
        """Map the child's ids, which takes a process that is dumpable. It tries the rest then."""
        if _has_said(self._ready, self._deadline):
            self._results["uid_map"] = _errno_of(_write_maps, self._pid, self._as_root)
            if self._as_root:
                self._results["idmap"] = _errno_of(_try_idmap, self._pid)
            if self._results["uid_map"] == 0:
                with contextlib.suppress(BrokenPipeError):  # it is gone: what it has not said counts as missing
                    os.write(self._mapped, b"1")
            else:
                os.kill(self._pid, signal.SIGKILL)
        os.close(self._ready)
        os.close(self._mapped)

    def results(self) -> dict[str, object]:
        """What came of them. A trial that could not be reached is absent.

        0 or an errno: `user`, those of `NAMESPACES`, `uid_map`, `tmpfs`, `overlay`, `attributes` (user.* on tmpfs),
        `proc`, `nproc`, `tproxy`, `idmap` (root only). `libseccomp` is a version or empty, `nvml` says whether the
        library loads.
        """
        results = {**self._results, "libseccomp": _libseccomp_version()}
        try:
            answer = _read_all(self._answers, self._deadline)
        finally:
            os.close(self._answers)
            # G's death takes H with it (death signal).
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        for line in answer.splitlines():
            results.update(json.loads(line))
        return results


def try_features(*, as_root: bool) -> dict[str, object]:
    """Run the trials and wait for what comes of them."""
    trials = Trials.begin(as_root=as_root)
    trials.go_on()
    return trials.results()


def _has_said(fd: int, deadline: float) -> bool:
    """Whether a byte came in time; false when the other end has closed."""
    ready = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]
    return bool(ready and os.read(fd, 1))


def _read_all(fd: int, deadline: float) -> bytes:
    """Everything until the last writer closes, or as much as came in time; whole lines only."""
    chunks = b""
    while select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            break
        chunks += chunk
    return chunks[: chunks.rfind(b"\n") + 1]


def _say(fd: int, key: str, value: object) -> None:
    os.write(fd, json.dumps({key: value}).encode() + b"\n")


def _errno_of(action: object, *args: object) -> int:
    try:
        action(*args)  # type: ignore[operator]
    except OSError as err:
        return err.errno or errno.EIO
    return 0


def _attempt(fd: int, key: str, action: object, *args: object) -> bool:
    """Do `action` and report its errno."""
    code = _errno_of(action, *args)
    _say(fd, key, code)
    return code == 0


def _write_maps(pid: int, as_root: bool) -> None:
    uid, gid = (UNPRIVILEGED_ID, UNPRIVILEGED_ID) if as_root else (os.geteuid(), os.getegid())
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{JAIL_ID} {uid} 1"),
        ("gid_map", f"{JAIL_ID} {gid} 1"),
    ):
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


def _try_idmap(pid: int) -> None:
    with contextlib.ExitStack() as stack:
        userns_fd = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, userns_fd)
        root_fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, root_fd)
        # Attached nowhere: it is gone when it is closed.
        tree_fd = mounts.clone_tree(root_fd, recursive=False)
        stack.callback(os.close, tree_fd)
        mounts.set_attributes(tree_fd, 0, userns_fd=userns_fd, recursive=False)


def _run_inside(write_fd: int, ready_write: int, mapped_read: int) -> None:
    """G: tries everything from inside the user namespace. Never returns."""
    try:
        process.die_with_parent()
        has_user = _attempt(write_fd, "user", syscalls.unshare, syscalls.CLONE_NEWUSER)
        if has_user:
            os.write(ready_write, b"1")
        # Behind what is waited for: to load a driver's library takes its time.
        _say(write_fd, "nvml", _loads("libnvidia-ml.so.1"))
        if not has_user or not os.read(mapped_read, 1):
            return
        # The full set of capabilities in the new namespace survives this only because neither uid was 0 inside.
        os.setresgid(JAIL_ID, JAIL_ID, JAIL_ID)
        os.setresuid(JAIL_ID, JAIL_ID, JAIL_ID)
        process.die_with_parent()  # a change of uid clears it
        works = {name: _attempt(write_fd, name, syscalls.unshare, flag) for name, flag in NAMESPACES.items()}
        if works["net"]:
            _attempt(write_fd, "tproxy", netfilter.divert_tcp, 1, "198.18.0.1", "2001:2::1")
        if works["mount"]:
            mounts.make_private()
            place = next((name for name in _PLACES if os.path.isdir(name)), "/")
            if _attempt(write_fd, "tmpfs", mounts.mount, "tmpfs", place, "tmpfs", 0, "size=64k"):
                os.chdir(place)
                _try_overlay(write_fd)
        if works["pid"]:
            child = os.fork()
            if child == 0:
                _run_as_init(write_fd)
            os.waitpid(child, 0)
    finally:
        os._exit(0)


def _try_overlay(write_fd: int) -> None:
    for name in ("lower", "upper", "work", "merged", "proc"):
        os.mkdir(name)
    options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr"
    _attempt(write_fd, "overlay", mounts.mount, "overlay", "merged", "overlay", 0, options)
    _attempt(write_fd, "attributes", os.setxattr, "upper", "user.overlay.probe", b"y")


def _run_as_init(write_fd: int) -> None:
    """H: pid 1 of the new pid namespace; its end takes the tasks that it started. Never returns."""
    try:
        process.die_with_parent()
        if os.path.isdir("merged"):
            _attempt(write_fd, "proc", mounts.mount, "proc", "proc", "proc")
        _say(write_fd, "nproc", _try_nproc())
    finally:
        os._exit(0)


def _try_nproc() -> int:
    """0 when RLIMIT_NPROC held us to its number, counted in our user namespace alone."""
    resource.setrlimit(resource.RLIMIT_NPROC, (_TASKS, _TASKS))
    for started in range(_TASKS + 2):
        try:
            # Threads, which are counted as processes are and cost a tenth. They end with us.
            _thread.start_new_thread(signal.pause, ())
        except RuntimeError:
            # Refused at once: the count includes the uid's tasks outside, so the limit cannot be used per jail.
            return 0 if started > 1 else errno.EAGAIN
    return errno.EOPNOTSUPP


class _Version(ctypes.Structure):
    _fields_ = [("major", ctypes.c_uint), ("minor", ctypes.c_uint), ("micro", ctypes.c_uint)]


def _libseccomp_version() -> str:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return ""
    library.seccomp_version.restype = ctypes.POINTER(_Version)
    version = library.seccomp_version().contents
    return f"{version.major}.{version.minor}.{version.micro}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
