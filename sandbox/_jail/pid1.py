"""The jail's pid 1: finishes the jail from inside, seals it, starts the tool, reaps, and reports its end.

It is born in user, pid and mount namespaces of its own and enters the other four, and a second user namespace, when
its mounts are made. It has every capability *there*; when it has sealed itself it has none, and
cannot be read or traced by the tool (not dumpable). The tool cannot kill it: a pid namespace's init receives from
inside only signals for which it has a handler (pid_namespaces(7)). When it ends, the kernel kills everything inside.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select

from sandbox._jail import steps
from sandbox._jail.launch import INSIDE_ID, report_failure
from sandbox._linux import process, syscalls, wire
from sandbox._linux.bare import loads, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandbox._jail.launch import Launch

STANDARD_FDS = ("stdin", "stdout", "stderr")
EXTRA_FDS = (("request", 3), ("result", 4))
# Above all of these, and no higher than need be: the tool's limit of open files, which may be 16, is ours by now.
_FREE_FD = 5
_STDIO_MAX = 2
_TOGETHER_MAX = 100
# <asm-generic/ioctls.h>. Module termios has it, and is a library to load for each zygote.
_TIOCSCTTY = 0x540E
# Signals whose handling this interpreter has changed; an ignored one would stay ignored across the exec.
_OURS = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD)


def run(launch: Launch, release: int) -> None:
    """Everything from birth to the end of the tool. Does not return."""
    try:
        wait_for_release(launch, release)
        launch.out_fds = {}  # what the builder made, it hands over itself
        launch.take_ready(steps.make_ready(launch))
        park(launch)
        run_program(launch, waits=True)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the jail
        report_failure(launch, error)
        os._exit(1)


def run_program(launch: Launch, *, waits: bool = False) -> None:
    """Start the tool and stay until it has ended, or, if it `waits`, until we are killed. Does not return."""
    launch.step = "exec"
    _attend(launch, _start_tool(launch), waits=waits)


def wait_for_release(launch: Launch, release: int) -> None:
    """Block until the builder has put us under our limits and mapped our ids; then take the jail's uid."""
    launch.step = "map_ids"
    if os.read(release, 1) != b"+":
        os._exit(1)
    if launch.host_uid is not None:
        os.setgroups([])
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    process.die_with_parent()
    # The builder may have died between the byte and the line above. It keeps the pipe's other end open until it ends.
    poller = select.poll()
    poller.register(release, select.POLLIN)
    if poller.poll(0):
        os._exit(1)


def tell_sealed(launch: Launch) -> None:
    sealed: dict[str, object] = {"ev": "sealed", "steps": launch.applied, "notes": launch.notes}
    wire.send(launch.status, {**sealed, "fds": [*launch.out_fds]}, [*launch.out_fds.values()])
    for fd in launch.out_fds.values():
        os.close(fd)


def park(launch: Launch) -> None:
    """Sealed: say so, and wait for the call. Without one (the supervisor closed the channel) the jail ends unused."""
    tell_sealed(launch)
    while True:
        message, fds = wire.receive(launch.status)
        if message is None:
            os._exit(0)
        if message["op"] == "go":
            break
    names = message["fds"]
    assert isinstance(names, list)
    launch.fds.update(zip(names, fds, strict=True))
    if "call" in launch.fds:
        call_fd = launch.fds.pop("call")
        launch.call = loads(wire.read_memfd(call_fd))
        os.close(call_fd)
    else:
        launch.call = message["call"]  # type: ignore[assignment]


def _start_tool(launch: Launch) -> int:
    """Start the tool. Raises OSError only for failures of ours; a program that cannot run is the tool's."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.umask(0o022)
    # All are already, one by one. A single one that is not would put the status channel into the tool's hands.
    syscalls.close_range(_STDIO_MAX + 1, 0xFFFFFFFF, syscalls.CLOSE_RANGE_CLOEXEC)
    directory = str(launch.call["cwd"])
    try:
        os.chdir(directory)
        directory = ""
        pid = _fork_on_terminal(launch) if "terminal" in launch.fds else spawn(launch)
    except (OSError, ValueError) as error:
        # ValueError: a name or a text that the kernel never gets to see, such as an empty program.
        number = error.errno if isinstance(error, OSError) else errno.EINVAL
        # `directory`: it was not the program but where it was to start.
        wire.send(launch.status, {"ev": "exec_failed", "errno": number or errno.EIO, "directory": directory})
        pid = _failed_child()
    else:
        wire.send(launch.status, {"ev": "executed"})
    for name in (*STANDARD_FDS, "request", "result", "terminal"):
        if name in launch.fds:
            os.close(launch.fds.pop(name))
    return pid


def spawn(launch: Launch) -> int:
    """Start the tool by vfork, in which nothing of ours is copied. Raises OSError when it cannot run, ValueError."""
    actions: list[tuple[int, int, int]] = []
    # First out of the way of the low numbers, so that no dup2 overwrites a source that is still needed.
    sources = [*((launch.fds[name], number) for number, name in enumerate(STANDARD_FDS))]
    sources += [(launch.fds[name], number) for name, number in EXTRA_FDS if name in launch.fds]
    moved = [(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FREE_FD), number) for fd, number in sources]
    actions += [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in moved]
    argv, env = launch.call["argv"], launch.call["env"]
    options: dict[str, Any] = {"file_actions": actions, "setsid": True, "setsigmask": [], "setsigdef": _OURS}
    refused: OSError | None = None
    try:
        for path in candidates(argv[0], env):
            try:
                return os.posix_spawn(path, argv, env, **options)
            except (FileNotFoundError, NotADirectoryError) as error:
                refused = refused or error
            except PermissionError as error:
                # As execvp(3): a name found but not executable counts if nothing better is found.
                refused = error
    finally:
        for fd, _ in moved:
            os.close(fd)
    # An empty PATH names no place to look in.
    raise refused or FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))


def candidates(program: str, env: dict[str, str]) -> list[str]:
    """The paths at which a program is looked for, as execvp(3)."""
    if "/" in program:
        return [program]
    return [f"{directory}/{program}" for directory in env.get("PATH", "/usr/bin:/bin").split(":") if directory]


def _failed_child() -> int:
    """A stand-in for the tool that could not be started, so that there is one end to wait for."""
    pid = os.fork()
    if pid == 0:
        os._exit(127)
    return pid


def _fork_on_terminal(launch: Launch) -> int:
    """Start the tool as the leader of a session with the jail's terminal, which takes an ioctl before the exec."""
    error_read, error_write = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            fcntl.ioctl(launch.fds["terminal"], _TIOCSCTTY, 0)
            for number in range(len(STANDARD_FDS)):
                os.dup2(launch.fds["terminal"], number, inheritable=True)
            for number in _OURS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, set())
            call = launch.call
            os.execvpe(call["argv"][0], call["argv"], call["env"])  # noqa: S606 - this is the point
        except OSError as error:
            os.write(error_write, b"%d" % (error.errno or errno.EIO))
        except ValueError:
            os.write(error_write, b"%d" % errno.EINVAL)
        os._exit(127)
    os.close(error_write)
    failure = os.read(error_read, 16)
    os.close(error_read)
    if failure:
        os.waitpid(pid, 0)
        raise OSError(int(failure), os.strerror(int(failure)))
    return pid


def _attend(launch: Launch, tool_pid: int, *, waits: bool) -> None:
    """Reap orphans and pass signals on until the tool itself has ended; then report, and end the jail.

    `waits`: leave that to the supervisor. It can then tell the call's end first; taking us and our namespaces down
    would compete with it for the core. When it closes the channel we end in any case.
    """
    wake_read, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _signal, _frame: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    poller = select.poll()
    poller.register(wake_read, select.POLLIN)
    poller.register(launch.status, select.POLLIN)
    while not _reap(launch, tool_pid):
        ready = {fd for fd, _ in poller.poll()}
        if wake_read in ready:
            os.read(wake_read, 4096)
        if launch.status.fileno() in ready:
            _obey(launch, tool_pid)
    while waits and wire.receive(launch.status)[0] is not None:
        pass
    os._exit(0)


def _reap(launch: Launch, tool_pid: int) -> bool:
    """Wait for all that have ended; whether the tool is among them, which is told then.

    What ended together with the tool is waited for first: then nobody but us is left. Not for ever, since what the tool
    left behind may go on making orphans that end.
    """
    tool_status: int | None = None
    left = _TOGETHER_MAX
    while left:
        left -= tool_status is not None
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid == tool_pid:
            tool_status = wait_status
    if tool_status is None:
        return False
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    message: dict[str, object] = {
        "ev": "exit",
        "wait_status": tool_status,
        "user_s": usage.ru_utime,
        "system_s": usage.ru_stime,
        "maxrss_bytes": usage.ru_maxrss * 1024,
    }
    wire.send(launch.status, message)
    return True


def _obey(launch: Launch, tool_pid: int) -> None:
    message, _ = wire.receive(launch.status)
    if message is None:
        os._exit(1)
    if message.get("op") == "signal":
        try:
            os.killpg(tool_pid, int(str(message["number"])))
        except ProcessLookupError:
            return
