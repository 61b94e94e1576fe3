"""Who is measured: a name, what its policy has and lacks, and a way to do a job once.

Everybody is asked for fresh namespaces, a read-only view of the system and no network, as far as it can. `differs` says
where it cannot, or does more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.bench.jobs import Job

TIMEOUT_S = 60.0
# Where `bench/install-peers` puts it.
SRT = Path(".cache/peers/srt/node_modules/.bin/srt")


class Missing(Exception):
    """This contender cannot be measured here: why."""


@dataclass
class Contender:
    """`do` carries one job out and raises when it did not work. `close` gives back what `do` needs."""

    name: str
    differs: str
    do: Callable[[Job], None]
    jobs: tuple[str, ...] = ("true", "python", "function", "numpy")
    ours: bool = False
    close: Callable[[], None] = field(default=lambda: None)


def run_checked(argv: list[str], job: Job) -> None:
    """Run a program and check what it printed. Raises RuntimeError."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0 or done.stdout.strip() != job.expected:
        raise RuntimeError(f"{argv[0]}: status {done.returncode}: {done.stderr.strip()[-300:]}")


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise Missing(f"{program} is not installed")
    return path


def prefixes() -> list[str]:
    """Where this interpreter lives, outside /usr."""
    found = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix)} | {sys.prefix, sys.base_prefix}
    return sorted(path for path in found if not f"{path}/".startswith("/usr/"))


def bare() -> Contender:
    return Contender("bare subprocess", "no isolation at all", lambda job: run_checked(list(job.argv), job))


def bubblewrap() -> Contender:
    """https://github.com/containers/bubblewrap"""
    argv = [_found("bwrap"), "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--ro-bind"]
    argv += ["/usr", "/usr", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--cap-drop", "ALL"]  # noqa: S108
    for name in ("bin", "sbin", "lib", "lib64"):
        if os.path.islink(f"/{name}"):
            argv += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
    for path in prefixes():
        argv += ["--ro-bind", path, path]
    differs = "namespaces and mounts only: no cgroup, no filter, no Landlock, no output limit, no record"
    return Contender("bubblewrap", differs, lambda job: run_checked([*argv, "--", *job.argv], job))


def oci(program: str) -> Contender:
    """crun and runc on a bundle with the same view. https://github.com/opencontainers/runtime-spec"""
    path = _found(program)
    stack = contextlib.ExitStack()
    place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-bench-")))
    serial = iter(range(1 << 30))

    def do(job: Job) -> None:
        # A bundle per job, made beforehand: only its start is measured.
        bundle = place / job.name
        if not bundle.exists():
            (bundle / "rootfs").mkdir(parents=True)
            (bundle / "config.json").write_text(json.dumps(_oci_config(list(job.argv))), encoding="utf-8")
        options = ["--cgroup-manager=disabled"] if program == "crun" else []
        name = f"sandbox-bench-{os.getpid()}-{next(serial)}"
        run_checked([path, "--root", str(place / "state"), *options, "run", "--bundle", str(bundle), name], job)

    differs = "no Landlock, no output limit, no record" + (", no cgroup" if program == "crun" else "")
    return Contender(program, differs, do, close=stack.close)


def _oci_config(argv: list[str]) -> dict[str, object]:
    flags = ["rbind", "ro", "nosuid"]
    mounts: list[dict[str, object]] = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},  # noqa: S108
    ]
    shown = ["/usr", *(f"/{name}" for name in ("bin", "sbin", "lib", "lib64") if os.path.exists(f"/{name}"))]
    mounts += [
        {"destination": path, "type": "bind", "source": os.path.realpath(path), "options": flags}
        for path in (*shown, *prefixes())
    ]
    kinds = ("pid", "mount", "network", "ipc", "uts")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": argv,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {},
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "sandbox",
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in kinds],
            "resources": {"memory": {"limit": 1 << 30}, "pids": {"limit": 128}},
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [_OCI_REFUSED]},
        },
    }


_OCI_REFUSED = {
    "names": ["bpf", "keyctl", "mount", "perf_event_open", "ptrace", "umount2", "unshare", "userfaultfd"],
    "action": "SCMP_ACT_ERRNO",
}


def docker(image: str = "") -> Contender:
    """`docker run` of a local image that has python3; nothing is pulled."""
    path = _found("docker")
    probe = subprocess.run([path, "info"], capture_output=True, text=True, timeout=20, check=False)
    if probe.returncode != 0:
        raise Missing(f"no Docker daemon answers: {probe.stderr.strip().splitlines()[-1][:200]}")
    image = image or "python:3-slim"
    known = subprocess.run([path, "image", "inspect", image], capture_output=True, timeout=20, check=False)
    if known.returncode != 0:
        raise Missing(f"the image {image} is not here (docker pull {image})")

    def do(job: Job) -> None:
        argv = ["python3", *job.argv[1:]] if job.argv[0] == sys.executable else list(job.argv)
        limits = ["--network=none", "--read-only", "--cap-drop=ALL", "--memory=1g", "--pids-limit=128", "--user=1000"]
        run_checked([path, "run", "--rm", *limits, "--security-opt=no-new-privileges", image, *argv], job)

    differs = "the image's own interpreter; no Landlock, no record"
    return Contender("docker run", differs, do, jobs=("true", "python", "function"))


def nsjail() -> Contender:
    """https://github.com/google/nsjail"""
    argv = [_found("nsjail"), "-Mo", "-Q", "--user", "1000", "--group", "1000", "-T", "/tmp"]  # noqa: S108
    for path in ("/usr", "/bin", "/lib", "/lib64", *prefixes()):
        if os.path.exists(path):
            argv += ["-R", path]
    differs = "no cgroup, no filter, no Landlock, no record"
    return Contender("nsjail", differs, lambda job: run_checked([*argv, "--", *job.argv], job))


def srt() -> Contender:
    """https://github.com/anthropic-experimental/sandbox-runtime"""
    path = str(SRT) if SRT.exists() else _found("srt")
    differs = "shares the host's read-only view, /proc and user; a proxy for the network; no limits, no record"

    def do(job: Job) -> None:
        run_checked([path, "-c", shlex.join(job.argv)], job)

    return Contender("srt", differs, do, jobs=("true", "python"))


def sandlock(python: str) -> list[Contender]:
    """https://github.com/multikernel/sandlock by its Python API, in a small process of its own: programs, and `fork`.

    `python`: an interpreter that has it (`bench/install-peers`).
    """
    if not os.access(python, os.X_OK):
        raise Missing("sandlock is not installed (bench/install-peers)")
    worker = _Worker([python, str(Path(__file__).parent / "sandlock_worker.py"), *prefixes()])
    lacks = "no namespaces, no cgroup, no private view: Landlock and a filter with a supervisor thread; no record"
    fork_jobs = ("function", "numpy")
    return [
        Contender("sandlock run", lacks, lambda job: worker.do("run", job), close=worker.close),
        Contender("sandlock fork", f"{lacks}; the imports are done", lambda job: worker.do("fork", job), fork_jobs),
    ]


class _Worker:
    """A process that carries jobs out on request, one line each way."""

    def __init__(self, argv: list[str]) -> None:
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if self._read() != "ready":
            raise Missing(f"sandlock does not work here: {self._read()}")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def do(self, way: str, job: Job) -> None:
        assert self._process.stdin is not None
        ask = {"way": way, "job": job.name, "argv": job.argv, "expected": job.expected}
        self._process.stdin.write(json.dumps(ask) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        if answer != "done":
            raise RuntimeError(f"sandlock {way}: {answer}")

    def close(self) -> None:
        self._process.communicate(timeout=TIMEOUT_S)


def peers(image: str, sandlock_python: str) -> tuple[list[Contender], dict[str, str]]:
    """Those that are here, and why the others are not."""
    found: list[Contender] = []
    missing: dict[str, str] = {}
    makers: dict[str, Callable[[], Contender | list[Contender]]] = {
        "bare subprocess": bare,
        "bubblewrap": bubblewrap,
        "crun": lambda: oci("crun"),
        "runc": lambda: oci("runc"),
        "docker run": lambda: docker(image),
        "nsjail": nsjail,
        "srt": srt,
        "sandlock": lambda: sandlock(sandlock_python),
    }
    for name, make in makers.items():
        try:
            made = make()
        except (Missing, OSError, subprocess.TimeoutExpired) as why:
            missing[name] = str(why)
            continue
        found += made if isinstance(made, list) else [made]
    return found, missing
