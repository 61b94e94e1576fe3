"""How each container runtime is asked to create, start and give up a container. No policy: it stands in the bundle."""

from __future__ import annotations

import errno
import os

from sandbox._linux import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CONTAINER = "call"
LOG_MAX_BYTES = 2000
_ENV = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}


class Runtime:
    """One runtime at work on one container. `program` is its path on the host."""

    def __init__(self, message: dict[str, object]) -> None:
        self.name = str(message["runtime"])
        self.program = str(message["program"])
        self.bundle = f"{message['mnt']}/bundle"
        self._log = os.memfd_create("runtime", os.MFD_CLOEXEC)
        self._log_begun = 0

    def write_bundle(self, config: bytes) -> None:
        """Write what it reads."""
        raise NotImplementedError

    def create(self, enter: Callable[[], None]) -> int:
        """Have the container made, up to where its first process waits; returns that process's pid.

        `enter` is called in the process that becomes the runtime. Raises OSError with what the runtime said.
        """
        raise NotImplementedError

    def start(self) -> None:
        """Let the container's first program run. Raises OSError with what the runtime said."""

    def enter_group(self, cgroups: str) -> None:
        """In the process that becomes the runtime: join the call's group where the runtime cannot do without."""

    def take_group_back(self, cgroups: str) -> None:
        """Undo what the runtime did to the call's own group, before the container is put there."""

    def leave_no_group(self, cgroups: str) -> None:
        """Remove a group that the runtime made below the call's own, now that nothing is in it."""

    def wait(self, pid: int) -> str:
        """Until the process `pid` of ours has ended, reaping all others. Text if the container never spoke for itself.

        Its standard output and error are the log until it has sealed itself.
        """
        while True:
            ended, status = os.waitpid(-1, 0)
            if ended == pid:
                break
        said = _text(os.pread(self._log, LOG_MAX_BYTES, self._log_begun))
        return f"the container's first process: {said}" if said and status else ""

    def _spawn(self, argv: list[str], enter: Callable[[], None] | None = None) -> int:
        self._log_begun = os.fstat(self._log).st_size
        pid = os.fork()
        if pid == 0:
            try:
                null = os.open("/dev/null", os.O_RDONLY)
                for number, fd in enumerate((null, self._log, self._log)):
                    os.dup2(fd, number, inheritable=True)
                if enter is not None:
                    enter()
                os.execve(self.program, [self.program, *argv], _ENV)  # noqa: S606 - this is the point
            except Exception as error:  # noqa: BLE001 - it is told by the log, and ends the call
                os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(127)
        return pid

    def _failed(self, what: str, status: int) -> OSError:
        said = _text(os.pread(self._log, LOG_MAX_BYTES, self._log_begun)) or "nothing"
        how = f"signal {status & 0x7F}" if status & 0x7F else f"status {status >> 8}"
        return OSError(errno.EIO, f"{what} ended with {how} and said: {said}")


class OciRuntime(Runtime):
    """crun and runc: `create` leaves the container waiting, `start` lets it go. Its parent becomes the attendant."""

    def write_bundle(self, config: bytes) -> None:
        with open(f"{self.bundle}/config.json", "wb") as file:
            file.write(config)

    def create(self, enter: Callable[[], None]) -> int:
        fds = ("--preserve-fds", "3")
        self._run(["create", "--bundle", self.bundle, "--pid-file", f"{self.bundle}/pid", *fds, CONTAINER], enter)
        with open(f"{self.bundle}/pid", "rb") as file:
            return int(file.read())

    def start(self) -> None:
        self._run(["start", CONTAINER])

    def enter_group(self, cgroups: str) -> None:
        """runc moves the container from its own group to one below the call's, and from outside of a cgroup namespace
        nothing can be moved into it where the tree is mounted `nsdelegate` (ENOENT, cgroup_namespaces(7))."""
        if self.name == "runc":
            fd = os.open(f"{cgroups}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, b"0")
            finally:
                os.close(fd)

    def take_group_back(self, cgroups: str) -> None:
        """runc enables every controller there for its own group below; then no process may join (EBUSY, cgroups(7))."""
        if self.name != "runc":
            return
        fd = os.open(f"{cgroups}/cgroup.subtree_control", os.O_RDWR | os.O_CLOEXEC)
        try:
            if enabled := os.read(fd, 4096).split():
                os.write(fd, b" ".join(b"-" + name for name in enabled))
        finally:
            os.close(fd)

    def leave_no_group(self, cgroups: str) -> None:
        if self.name == "runc":
            os.rmdir(f"{cgroups}/{CONTAINER}")

    def _run(self, argv: list[str], enter: Callable[[], None] | None = None) -> None:
        options = ["--root", f"{self.bundle}/state"]
        if self.name == "crun":
            # The call's group is ours: it is shown no other and is not asked to manage it.
            options.append("--cgroup-manager=disabled")
        _, status = os.waitpid(self._spawn([*options, *argv], enter), 0)
        if status:
            raise self._failed(f"{self.name} {argv[0]}", status)


class Nsjail(Runtime):
    """nsjail stays the container's parent; the container's first process says by a pipe that it waits to be let go."""

    def __init__(self, message: dict[str, object]) -> None:
        super().__init__(message)
        self._pid = -1
        self.ready_read, self.ready_write = os.pipe2(os.O_CLOEXEC)

    def write_bundle(self, config: bytes) -> None:
        with open(f"{self.bundle}/config", "wb") as file:
            file.write(config)
        # It makes a place for the new root, in one of these.
        for path in ("/run", "/tmp"):  # noqa: S108 - of this mount namespace
            if not self.bundle.startswith(f"{path}/"):
                mounts.mount("tmpfs", path, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "size=64k,mode=1777")

    def create(self, enter: Callable[[], None]) -> int:
        # --rw: its own root below the view. When done it would take the view for it and remount it without nosuid,
        # which the kernel refuses (EPERM); the view itself is read-only by its own entry.
        self._pid = self._spawn(["--config", f"{self.bundle}/config", "--rw"], enter)
        os.close(self.ready_write)
        if os.read(self.ready_read, 1) != b"+":
            _, status = os.waitpid(self._pid, 0)
            raise self._failed(self.name, status)
        self._log_begun = os.fstat(self._log).st_size
        return next(pid for pid in _pids() if _parent(pid) == self._pid)

    def wait(self, pid: int) -> str:  # noqa: ARG002 - its parent is nsjail, which ends after it
        return super().wait(self._pid)


def runtime(message: dict[str, object]) -> Runtime:
    return (Nsjail if message["runtime"] == "nsjail" else OciRuntime)(message)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return -1  # gone meanwhile


def _text(said: bytes) -> str:
    return " ".join(said.decode("utf-8", "replace").split())
