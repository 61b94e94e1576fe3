"""The gate of a container that an engine starts by itself: a directory shared with it, and a shell script in it.

The container's first program is the image's own `sh`. It waits at a named pipe until its call is known, opens the
call's streams, which are named pipes as well, and becomes the tool. So a container can be made before its call, nothing
of ours need be in the image, and no daemon carries the tool's bytes. The directory is mounted read-only; writing to a
named pipe is not writing to its file system (fifo(7)). What the tool does to these pipes harms nobody but its own call.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from sandbox._linux import mounts

AT = "/run/sandbox"
# The pipes have a directory of their own: a kernel of its own inside writes to pipes in writable mounts only.
PIPES_IN = "pipes"
BUILT_IN = "built"
_WAITING = f"read -r _ < {AT}/{PIPES_IN}/go || exit 125\n. {AT}/call\n"
PIPES = ("go", "status", "stdin", "stdout", "stderr", "request", "result")
NOTHING = "nothing"
EMPTY = "empty"
# Python's own, and what covers denied paths (`sandbox._jail.cover`).
_DIRECTORIES = {
    PIPES_IN: 0o755,
    BUILT_IN: 0o755,
    EMPTY: 0o755,
    "scratch": 0o755,
    "lower": 0o755,
    "tls": 0o755,
    "denied-directory": 0o000,
    "etc": 0o755,
}
_FILES = {NOTHING: 0o644, "denied-file": 0o000}
COMMAND = ("/bin/sh", f"{AT}/gate")


class Gate:
    """One container's directory on the host. Its parent is closed to everyone else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: Path, etc: Mapping[str, str], runtime_files: Sequence[Sequence[str]]) -> Gate:
        """Raises OSError. `runtime_files`: (host path, path inside) of what will be mounted below the directory."""
        path.mkdir(mode=0o755, parents=True)
        gate = cls(path)
        try:
            gate._fill(etc, runtime_files)
        except BaseException:
            gate.remove()
            raise
        return gate

    def _fill(self, etc: Mapping[str, str], runtime_files: Sequence[Sequence[str]]) -> None:
        # The umask must not decide what the container's uid may open; the directory above is closed to all others.
        os.chmod(self.path, 0o755)  # noqa: S103
        for name, mode in _DIRECTORIES.items():
            (self.path / name).mkdir()
            os.chmod(self.path / name, mode)
        for name in PIPES:
            os.mkfifo(self._pipe(name))
            os.chmod(self._pipe(name), 0o666)  # noqa: S103
        for name, mode in _FILES.items():
            (self.path / name).touch()
            os.chmod(self.path / name, mode)
        for name, text in etc.items():
            self.write(f"etc/{name}", text)
        self.write("gate", _WAITING)
        for source, inside in runtime_files:
            self._make_place(inside.removeprefix(f"{AT}/").split("/"), directory=os.path.isdir(source))

    def _make_place(self, parts: Sequence[str], *, directory: bool) -> None:
        place = self.path
        for name in parts[:-1]:
            place /= name
            place.mkdir(exist_ok=True)
            os.chmod(place, 0o755)  # noqa: S103 - as above
        place /= parts[-1]
        place.mkdir() if directory else place.touch()

    def write(self, name: str, text: str) -> None:
        fd = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "wb") as file:
            file.write(text.encode("utf-8", "surrogateescape"))
        os.chmod(self.path / name, 0o644)

    def _pipe(self, name: str) -> Path:
        return self.path / PIPES_IN / name

    def open_both(self, name: str) -> int:
        """A pipe's descriptor that is its own other side: it neither waits for one nor ends with one."""
        return os.open(self._pipe(name), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def open_reading(self, name: str) -> int:
        return os.open(self._pipe(name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def remove(self) -> None:
        """Raises OSError when something that is mounted in it stays."""
        remove_tree(self.path)

    @property
    def built_at(self) -> str:
        """Where the places of a container that nobody can enter are put together."""
        return str(self.path / BUILT_IN)

    @property
    def pipes(self) -> str:
        return str(self.path / PIPES_IN)


def remove_tree(directory: Path) -> None:
    """Remove a directory of ours. Raises OSError, with everything in place, when something mounted in it stays.

    What is mounted there may be the caller's own files.
    """
    mounts.detach_all(str(directory))
    shutil.rmtree(directory, ignore_errors=True)


def pipe_inside(name: str) -> str:
    """Where a pipe is in the container."""
    return f"{AT}/{PIPES_IN}/{name}"


def call_script(
    argv: Sequence[str], env: Mapping[str, str], cwd: str, streams: Mapping[str, str], open_files: int | None = None
) -> str:
    """What the waiting shell does next. `streams` maps stdin, request and result to a path inside; stdin always is.

    With `terminal` among them that is all three, and the shell stays: as the leader of the session it has to be the one
    who opens it (credentials(7)). `open_files`: the limit, where the container was made with a higher one.
    """
    status = pipe_inside("status")
    program = shlex.quote(argv[0])
    terminal = streams.get("terminal", "")
    redirects = [f"<{streams['stdin']}", f">{pipe_inside('stdout')}", f"2>{pipe_inside('stderr')}"]
    if terminal:
        redirects = [f"<>{terminal}", ">&0", "2>&0"]
    redirects += [f"3<{streams['request']}"] if "request" in streams else []
    redirects += [f"4>{streams['result']}"] if "result" in streams else []
    words = [f"{name}={value}" for name, value in env.items()]
    # A program whose name holds "=" would be one more variable to env(1).
    tool = [*argv] if "=" not in argv[0] else ["sh", "-c", 'exec "$@"', "sh", *argv]
    lines = [
        "umask 022",
        f"PATH={shlex.quote(env.get('PATH', ''))}",
        f"command -v env >/dev/null 2>&1 || {{ echo noenv >{status}; exit 125; }}",
        f"cd {shlex.quote(cwd)} 2>/dev/null || {{ echo cwd >{status}; exit 126; }}",
        f"command -v {program} >/dev/null 2>&1 || {{ echo missing >{status}; exit 127; }}",
        *([f"ulimit -n {open_files} || {{ echo nolimit >{status}; exit 125; }}"] if open_files is not None else []),
        # What interrupts the tool reaches the shell as well, which would end by it; a trap is not handed down.
        *(["trap : INT QUIT"] if terminal else []),
        f"exec {' '.join(redirects)}",
        f"echo opened >{status}",
        f"{'' if terminal else 'exec '}env -i {shlex.join([*words, *tool])}",
        *(["exit $?"] if terminal else []),
    ]
    return "\n".join(lines) + "\n"
