"""A Docker daemon of the tests' own, in a throw-away directory, with images made from this machine's own files.

It has its own data root, exec root, socket, pidfile and containerd, makes no bridge and touches no firewall rule. The
process that starts it holds a pipe; a small watcher ends the daemon and removes the directory when that pipe closes,
so that an interrupted test run leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
PYTHON = "sandbox-test/python:latest"
NO_PYTHON = "sandbox-test/plain:latest"
AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
OTHER_PYTHON = "sandbox-test/other:latest"
_PROGRAMS = (
    "sh", "env", "cat", "ls", "id", "sleep", "head", "dd", "true", "false", "echo", "printenv", "touch", "mkdir", "rm",
    "wc", "stat", "df", "uname", "grep",
)  # fmt: skip
_SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_WATCH = """
import os, shutil, signal, subprocess, sys, time
pid, directory = int(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.stdin.buffer.read()
def below(pid):
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    if directory.encode() in file.read() and int(name) != os.getpid():
                        found.append(int(name))
            except OSError:
                pass
    return found
def gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(os.path.exists(f"/proc/{one}") for one in pids):
            return True
        time.sleep(0.05)
    return False
try:
    os.kill(pid, signal.SIGTERM)
except ProcessLookupError:
    pass
if not gone([pid], 15):
    os.kill(pid, signal.SIGKILL)
for one in below(pid):
    try:
        os.kill(one, signal.SIGKILL)
    except ProcessLookupError:
        pass
time.sleep(0.1)
with open("/proc/self/mounts") as file:
    mounted = [line.split()[1] for line in file if line.split()[1].startswith(directory + "/")]
for path in sorted(mounted, reverse=True):
    subprocess.run(["umount", "-l", path], check=False, stderr=subprocess.DEVNULL)
shutil.rmtree(directory, ignore_errors=True)
name = os.path.basename(directory)
for tree in ("/sys/fs/cgroup", *(f"/sys/fs/cgroup/{one}" for one in os.listdir("/sys/fs/cgroup"))):
    for place, _, _ in os.walk(f"{tree}/{name}", topdown=False):
        try:
            os.rmdir(place)
        except OSError:
            pass
"""


@functools.cache
def missing() -> str:
    """What this machine lacks for an engine of our own; empty when nothing."""
    if os.geteuid() != 0:
        return "a Docker daemon of the tests' own needs root"
    for program in ("dockerd", "containerd"):
        if shutil.which(program, path=_SYSTEM_PATH) is None:
            return f"{program} is not installed (Debian: docker.io)"
    for module in ("docker", "tenacity"):
        try:
            __import__(module)
        except ImportError:
            return f"the Python package {module!r} is not installed"
    return ""


@dataclass
class Engine:
    """A running daemon. `host` is what DOCKER_HOST would be."""

    directory: Path
    process: subprocess.Popen[bytes]

    @property
    def host(self) -> str:
        return f"unix://{self.directory}/docker.sock"

    def stop(self) -> None:
        """End the daemon as a service manager would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def client(self) -> Any:
        import docker

        return docker.APIClient(base_url=self.host, version="auto", timeout=60)

    def load(self, name: str, tar: bytes) -> None:
        """Make an image of one layer from a root tree."""
        import docker

        client = docker.APIClient(base_url=self.host, version="auto", timeout=120)
        repository, _, tag = name.partition(":")
        client.import_image_from_data(tar, repository=repository, tag=tag)
        client.inspect_image(name)
        client.close()


@contextlib.contextmanager
def running(*options: str, parent: str | None = None) -> Iterator[Engine]:
    """Start a daemon, and end it with everything that it made. Raises RuntimeError with its log.

    `parent`: where its directory is made.
    """
    directory = Path(tempfile.mkdtemp(prefix="sandbox-docker-", dir=parent))
    process = _start(directory, options)
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-c", _WATCH, str(process.pid), str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _wait_ready(directory, process)
        yield Engine(directory, process)
    finally:
        assert watcher.stdin is not None
        watcher.stdin.close()
        process.wait(60)
        watcher.wait(60)


# As the documentation has it registered: --add-runtime takes no arguments.
_RUNSC = {"path": "/usr/bin/runsc", "runtimeArgs": ["--network=host", "--oci-seccomp", "--host-fifo=open"]}


def _start(directory: Path, options: tuple[str, ...]) -> subprocess.Popen[bytes]:
    (directory / "daemon.json").write_text(json.dumps({"runtimes": {"runsc": _RUNSC}}))
    with (directory / "log").open("wb") as log:
        return subprocess.Popen(
            [
                "dockerd",
                f"--config-file={directory}/daemon.json",
                f"--data-root={directory}/data",
                f"--exec-root={directory}/exec",
                f"--pidfile={directory}/pid",
                f"--host=unix://{directory}/docker.sock",
                "--bridge=none",
                "--iptables=false",
                "--ip6tables=false",
                "--ip-forward=false",
                "--ip-masq=false",
                "--exec-opt=native.cgroupdriver=cgroupfs",
                f"--cgroup-parent=/{directory.name}",
                *options,
            ],
            env={"PATH": _SYSTEM_PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_ready(directory: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if b"API listen on" in (directory / "log").read_bytes():
            return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError((directory / "log").read_text(errors="replace")[-2000:])


@functools.cache
def python_image(*programs: str) -> bytes:
    """A root tree with the system's Python, a few programs, and these."""
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if not os.path.exists(python):
        raise RuntimeError(f"{python}, from which an image is made, is not there")
    library = f"/usr/lib/python3.{sys.version_info.minor}"
    found = [path for name in programs if (path := shutil.which(name, path="/usr/bin:/bin"))]
    authorities = [AUTHORITIES] if os.path.exists(AUTHORITIES) else []
    return _tree([python, *found, *authorities], [library], {"/usr/bin/python3": os.path.basename(python)})


@functools.cache
def plain_image() -> bytes:
    """A root tree without Python."""
    return _tree([], [], {})


@functools.cache
def other_image() -> bytes:
    """A root tree whose Python is another one, as far as anybody can tell by asking for its version."""
    return _tree([], [], {}, {"/usr/bin/python3": "#!/bin/sh\nexit 9\n"})


def _tree(
    programs: list[str], directories: list[str], links: dict[str, str], scripts: dict[str, str] | None = None
) -> bytes:
    found = [path for name in _PROGRAMS if (path := shutil.which(name, path="/usr/bin:/bin"))]
    files = {*found, *programs}
    for directory in directories:
        for path in Path(directory).rglob("*"):
            if path.is_file() and not _SKIPPED.search(str(path)):
                files.add(str(path))
    needed = {library for path in files if _is_elf(path) for library in _libraries(path)}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("tmp", "etc", "proc", "sys", "dev", "run", "usr", "usr/bin", "home"):
            _add_directory(tar, name)
        for name in ("bin", "lib", "lib64", "sbin"):
            _add_link(tar, name, f"usr/{name}")
        for path in sorted(files | needed):
            real = os.path.realpath(path)
            name = path if path.startswith(("/usr/", "/etc/")) else f"/usr{path}"
            tar.add(real, arcname=name.lstrip("/"))
        for name, target in links.items():
            _add_link(tar, name.lstrip("/"), target)
        for name, text in (scripts or {}).items():
            info = tarfile.TarInfo(name.lstrip("/"))
            info.size, info.mode = len(text.encode()), 0o755
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


_SKIPPED = re.compile(r"/(test|tests|idlelib|lib2to3|ensurepip|__pycache__|config-[^/]*|dist-packages)/")


def _add_directory(tar: tarfile.TarFile, name: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
    tar.addfile(info)


def _add_link(tar: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    tar.addfile(info)


def _is_elf(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _libraries(path: str) -> list[str]:
    done = subprocess.run(["ldd", path], capture_output=True, text=True, check=False)
    return re.findall(r"(/\S+) \(0x", done.stdout)
