"""The launcher `docker`: a fresh container per call, made by a Docker daemon from the plan and completed from outside.

The daemon makes namespaces, cgroup, capabilities, seccomp filter and the image's read-only root; its own first program
waits at a gate. A child of our keeper then enters it and puts in what the daemon cannot: sized private places, granted
trees checked by inode, denials, the gateway's sockets. Only after that the gate opens. The daemon is no part of the
call: streams are pipes between the tool and us, and killing goes by a descriptor of the container's first process.
Not defended against: whoever else may command the daemon, who is root on this host anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sandbox._linux import cgroup, etc, syscalls, wire
from sandbox.errors import LaunchError, LauncherUnavailable
from sandbox.launchers import docker_config as config
from sandbox.launchers.contract import Setting
from sandbox.launchers.docker_engine import Ended, Engine, refuse_devices
from sandbox.launchers.feed import Feed
from sandbox.launchers.gate import AT, Gate, call_script
from sandbox.launchers.group import ContainerGroup, common_path, remove_everywhere
from sandbox.launchers.keeper import Keeper
from sandbox.plan import LaunchPlan
from sandbox.seccomp import policy as seccomp_policy
from sandbox.seccomp.docker import to_docker_json

THREADS: Final = 8
SAMPLE_S: Final = 0.1
_CDI_HINT: Final = (
    "use Docker 25 or newer with {'features': {'cdi': true}} in its daemon.json, and write the specification: "
    "nvidia-ctk cdi generate --device-name-strategy=uuid --output=/etc/cdi/nvidia.yaml"
)
_NO_SHELL: Final = "the image may lack /bin/sh, which waits for the call"


@dataclass(frozen=True)
class Kind:
    """What containers of one plan have in common."""

    plan: LaunchPlan
    seccomp: Mapping[str, Any]


class DockerLauncher:
    """One per supervisor. Blocking work is done by its own threads, which `close` waits for."""

    name = "docker"
    own_user_namespace = False

    def __init__(self, setting: Setting) -> None:
        if setting.host_uids is None:
            raise LauncherUnavailable("the launcher docker enters its containers, which takes root", step="launcher")
        self.setting = setting
        self.layout = cgroup.detect()
        self.keeper = Keeper.start()
        self._uids = setting.host_uids
        self._serial = itertools.count(1)
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="docker")
        self._engines: dict[str, Engine] = {}
        self._opening = threading.Lock()
        self._minors: dict[str, tuple[int, str]] = {}
        base = _gates(setting.state)
        for left in base.iterdir():
            if not _is_alive(left.name):
                shutil.rmtree(left, ignore_errors=True)
        self.directory = base / setting.owner
        self.directory.mkdir(mode=0o700, exist_ok=True)
        self.where = f"{_boot_id()}:{os.stat('/proc/self/ns/pid').st_ino}"

    def kind(self, plan: LaunchPlan) -> Kind:
        found = seccomp_policy.resolve(plan.seccomp)
        return Kind(plan, to_docker_json(found, platform.machine()))

    def make(self, kind: Kind) -> DockerContainer:
        """A container on its way. Raises OSError when its directory cannot be made."""
        container = DockerContainer(self, kind, f"container-{next(self._serial)}", next(self._uids))
        container.launch()
        return container

    def thread(self, work: Callable[[], Any]) -> Future[Any]:
        """Have blocking work done. Order is kept between nothing."""
        return self._pool.submit(work)

    def engine(self, address: str) -> Engine:
        """In a thread: the daemon at that address, with what dead supervisors left there removed."""
        with self._opening:
            if address not in self._engines:
                engine = Engine.open(address)
                self._reap(engine)
                self._engines[address] = engine
            return self._engines[address]

    def labels(self, what: str) -> dict[str, str]:
        """By which the next start tells what a dead supervisor left."""
        return {config.LABEL: what, config.OWNER: self.setting.owner, config.WHERE: self.where}

    def _reap(self, engine: Engine) -> None:
        """Remove containers whose supervisor is gone; those of another pid namespace are not ours to judge."""
        for found in engine.labelled(f"{config.WHERE}={self.where}"):
            owner = found.get("Labels", {}).get(config.OWNER, "")
            if not _is_alive(owner):
                engine.remove(found["Id"])

    def python(self, engine: Engine, image_id: str, container: Mapping[str, Any]) -> str:
        """In a thread: the image's program for Python functions. Raises LaunchError when its version is another."""
        minor = sys.version_info.minor
        if image_id not in self._minors:
            self._minors[image_id] = _ask_python(engine, image_id, container, self.labels("probe"))
        found, program = self._minors[image_id]
        if found == minor:
            return program
        has = f"has Python 3.{found}" if found >= 0 else "has no python3"
        raise LaunchError(
            f"the image {container['image']} {has}; the caller's functions need Python 3.{minor}",
            step="image",
            hint=f"use an image with Python 3.{minor}, such as python:3.{minor}-slim, or call from that Python",
        )

    def close(self) -> None:
        """Wait until what was begun is cleaned up, and let the keeper go."""
        self._pool.shutdown(wait=True)
        self.keeper.close()
        shutil.rmtree(self.directory, ignore_errors=True)


_PYTHON_MISSING: Final = 127
_ASK_PYTHON: Final = (
    "command -v python3.{minor} >/dev/null 2>&1 && exit {minor}\n"
    "command -v python3 >/dev/null 2>&1 || exit 127\n"
    "exec python3 -c 'import sys; sys.exit(sys.version_info[1])'"
)


def _ask_python(
    engine: Engine, image_id: str, container: Mapping[str, Any], labels: Mapping[str, str]
) -> tuple[int, str]:
    """(minor version or -1, program), by running the image once: its exit status tells."""
    minor = sys.version_info.minor
    body = {
        "Image": image_id,
        "Entrypoint": ["/bin/sh", "-c", _ASK_PYTHON.format(minor=minor)],
        "Cmd": [],
        "User": "65534:65534",
        "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", *config.NO_DEVICES],
        "NetworkDisabled": True,
        "Labels": dict(labels),
        "HostConfig": {
            "NetworkMode": "none",
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "PidsLimit": 16,
            "Memory": 256 << 20,
            "LogConfig": {"Type": "none"},
            **({"Runtime": container["runtime"]} if container["runtime"] else {}),
        },
    }
    name = f"{config.LABEL}-probe-{os.urandom(6).hex()}"
    try:
        made = engine.create(body, name)
        engine.start(made)
        code = engine.wait(made).exit_code
    finally:
        engine.remove(name)
    if code == minor:
        return minor, f"python3.{minor}"
    return (-1, "") if code in (_PYTHON_MISSING, 126) else (code, "python3")


def _check_devices(engine: Engine, names: Sequence[str]) -> None:
    if why := refuse_devices(engine.info, names) if names else "":
        raise LaunchError(f"docker at {engine.address}: {why}", step="gpu", hint=_CDI_HINT)


def _device_path(number: str) -> str:
    """The node of a disk that is named by "major:minor"."""
    return f"/dev/{os.path.basename(os.readlink(f'/sys/dev/block/{number}')).replace('!', '/')}"


def _gates(state: Path) -> Path:
    """Where the directories of gates are, by supervisor: in memory where there is such a place, closed to others."""
    base = (Path("/run") if os.access("/run", os.W_OK) else state) / config.LABEL
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(base, 0o700)
    return base


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _is_alive(owner: str) -> bool:
    pid = owner.partition("-")[0]
    try:
        return pid.isdigit() and cgroup.owner_name(int(pid)) == owner
    except ProcessLookupError:
        return False


class DockerContainer:
    """One container, as `sandbox.launchers.contract.Container` has it. Lives on the supervisor's loop."""

    def __init__(self, launcher: DockerLauncher, kind: Kind, name: str, uid: int) -> None:
        self.name = name
        self.fds: dict[str, int] = {}
        self.steps_applied: list[str] = []
        self.notes: list[str] = []
        self.details: dict[str, Any] = {}
        self.failure: dict[str, Any] = {}
        self.is_killed = False
        self.is_closed = False
        self.ready = asyncio.Event()
        self.gone = asyncio.Event()
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        self.group = ContainerGroup(name, None)
        self._launcher = launcher
        self._plan = kind.plan
        self._seccomp = kind.seccomp
        self._uid = uid
        self._id = ""
        self._engine: Engine | None = None
        self._gate: Gate | None = None
        self._python = ""
        self._pid = -1
        self._status: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled: list[Callable[[], None]] = []
        self._pipes: dict[str, int] = {}
        self._feeds: list[Feed] = []
        self._is_opened = False
        self._signals: list[int] = []
        self._terminal = ""
        self._making: Future[Any] | None = None

    def __repr__(self) -> str:
        return f"<DockerContainer {self.name} id={self._id[:12] or '-'} pid={self._pid} gone={self.gone.is_set()}>"

    @property
    def pid(self) -> int:
        return self._pid

    def is_usable(self) -> bool:
        return not (self.failure or self.gone.is_set() or self.is_closed)

    def when_settled(self, then: Callable[[], None]) -> None:
        self._settled.append(then)

    # -- how it is made -----------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Have it made; `ready` is set when that is done or has failed."""
        self._making = self._launcher.thread(self._make)
        self._task(self._launch(self._making))

    def _task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _launch(self, making: Future[Any]) -> None:
        try:
            await asyncio.wrap_future(making)
            if self.is_closed:
                return
            self._enter()
        except (LaunchError, OSError) as error:
            self._fail(getattr(error, "step", "") or "container", error)

    def _make(self) -> None:
        """In a thread: directory, container, start. What was made is known at once, so that `close` finds it."""
        launcher = self._launcher
        container = config.step(self._plan, "container")
        self._engine = engine = launcher.engine(container["engine"])
        _check_devices(engine, container.get("devices", ()))
        image = engine.image(container["image"])
        if container["function"]:
            self._python = launcher.python(engine, image["Id"], container)
        self._plan = self._complete_plan(image["Id"])
        self._gate = self._make_gate()
        # Held open from here on: when we are gone, the waiting shell reads the end of it and goes too.
        self._pipes["go"] = self._gate.open_both("go")
        parent = self._make_group()
        if container.get("devices") and not parent:
            # What a process does on a GPU is told by its group: elsewhere its limits would be nobody's.
            message = "a GPU is given to containers below a group of ours only, and this daemon makes its own"
            raise LaunchError(message, step="gpu", hint="run it with --exec-opt native.cgroupdriver=cgroupfs")
        wanted = config.Wanted(
            self._plan,
            str(self._gate.path),
            self._uid,
            self._seccomp,
            launcher.labels("call"),
            cgroup_parent=parent,
            volumes=tuple((image.get("Config") or {}).get("Volumes") or ()),
            disks=tuple(map(_device_path, launcher.setting.disks)),
        )
        self.details = {"image_digest": image["Id"], "repo_digests": list(image.get("RepoDigests") or ())}
        if wanted.volumes:
            self.notes.append(f"volumes of the image are empty and read-only: {', '.join(wanted.volumes)}")
        name = f"{config.LABEL}-{launcher.setting.owner}-{self.name}-{os.urandom(3).hex()}"
        self._id = engine.create(config.create_body(wanted), name)
        self.details["container_id"] = self._id
        if not self.is_closed:
            self._pid = engine.start(self._id)

    def _complete_plan(self, image_id: str) -> LaunchPlan:
        """The plan with the image's digest, and for each grant whether it is a directory: its place is made so."""
        plan = self._plan.with_step_args("container", image_id=image_id)
        links = {real: asked for asked, real in config.step(plan, "grants").get("links", ())}
        for name in ("grants", "inner_grants"):
            paths = [
                {**grant, "is_directory": os.path.isdir(grant["host_path"])}
                for grant in config.step(plan, name).get("paths", ())
            ]
            paths += [{**grant, "jail_path": links[at]} for grant in paths if (at := grant["jail_path"]) in links]
            plan = plan.with_step_args(name, paths=paths)
        return plan

    def _make_gate(self) -> Gate:
        settings = config.step(self._plan, "etc_files")
        files = etc.files(settings["hostname"], settings["home"], settings["nameserver"], self._uid)
        path = self._launcher.directory / self.name
        return Gate.make(path, files, config.step(self._plan, "system_view")["runtime_files"])

    def _make_group(self) -> str:
        """A group of ours around the container, where the daemon can be told of one path for every tree."""
        assert self._engine is not None
        tree = self._launcher.setting.tree
        if tree is None or self._engine.info.get("CgroupDriver") != "cgroupfs":
            return ""
        below = tree.create(self.name, {})
        path = common_path(below, self._launcher.layout)
        if not path:
            below.destroy()
            return ""
        self.group.below = below
        return path

    def _enter(self) -> None:
        """Have the keeper complete it. What comes back is told on a socket of its own."""
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status.setblocking(False)
        self._loop.add_reader(self._status, self._on_status)
        steps = json.dumps({"steps": self._plan.to_json()["steps"]}).encode()
        with theirs:
            message = {"name": self.name, "pid": self._pid, "mark": self._id, "host_uid": self._uid}
            self._launcher.keeper.enter(message, theirs.fileno(), steps)

    def _on_status(self) -> None:
        assert self._status is not None
        try:
            message, fds = wire.receive(self._status)
        except BlockingIOError:
            return
        except ConnectionResetError:
            message, fds = None, []
        if message is None:
            self._loop.remove_reader(self._status)
            self._status.close()
            self._status = None
            if not self.ready.is_set():
                self._fail("enter", LaunchError("the keeper ended before the container was complete"))
            return
        names: Any = message.get("fds", ())
        self.fds.update(zip(names, fds, strict=True))
        if message["ev"] == "born":
            self._born()
        elif message["ev"] == "sealed":
            self._sealed(message)
        elif message["ev"] == "step_failed":
            self.failure = message
            self._settle()
            self.kill()
        elif message["ev"] == "terminal":
            self._terminal = str(message["path"])
        elif message["ev"] == "egress" and self.on_event is not None:
            self.on_event(message)

    def _born(self) -> None:
        self._loop.add_reader(self.fds["pidfd"], self._on_death)
        with contextlib.suppress(OSError):
            # It may have ended already; then there is nothing to count.
            self.group.find(self._pid, self._launcher.layout)
            self._check_io()
        if self.is_killed:
            self.kill()

    def _check_io(self) -> None:
        """A daemon leaves a limit that it cannot set away, with a warning in place of an error."""
        limit = self._plan.limit("io")
        if limit is None or limit.applied is None:
            return
        if without := set(self._launcher.setting.disks) - self.group.io_limited():
            disks = ", ".join(sorted(without))
            self._fail("io", LaunchError(f"the daemon has not limited the traffic of disk {disks}"))
            self.kill()

    def _sealed(self, message: Mapping[str, Any]) -> None:
        self.steps_applied = list(message["steps"])
        self.notes += message["notes"]
        if not self.gone.is_set():
            self._task(self._sample())
        self._settle()

    async def _sample(self) -> None:
        """Keep the counters fresh: the container's group is the engine's, and gone when it has ended."""
        while not self.gone.is_set():
            self.group.stats()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.gone.wait(), SAMPLE_S)

    def _fail(self, step: str, error: Exception) -> None:
        hint = getattr(error, "hint", "")
        message = str(getattr(error, "message", error))
        self.failure = {"step": step, "errno": getattr(error, "errno", 0) or 0}
        self.failure["message"] = f"{message} ({hint})" if hint else message
        self._settle()
        self._end()

    def _settle(self) -> None:
        self.ready.set()
        settled, self._settled = self._settled, []
        for then in settled:
            then()

    # -- how its call runs ----------------------------------------------------------------------------------------

    def open_output(self, name: str) -> tuple[int, int]:
        """Our end of the stream; its other end is a named pipe that the gate opens."""
        assert self._gate is not None
        return self._gate.open_reading(name), -1

    def go(self, call: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Open the gate. Streams that come from us are passed on byte by byte, from copies of `fds`."""
        assert self._gate is not None
        self._pipes["status"] = self._gate.open_both("status")
        self._loop.add_reader(self._pipes["status"], self._on_gate)
        streams = {"stdin": "/dev/null", **({"terminal": self._terminal} if self._terminal else {})}
        for name in ("stdin", "request"):
            if name in fds and not _is_null(fds[name]):
                streams[name] = f"{AT}/{name}"
                self._feeds.append(Feed(self._loop, os.dup(fds[name]), self._gate.open_both(name)))
        if "request" in fds:
            streams["result"] = f"{AT}/result"
        argv, env, cwd = call["argv"], call["env"], call["cwd"]
        assert isinstance(argv, list | tuple)
        assert isinstance(env, dict)
        assert isinstance(cwd, str)
        argv = [self._python, *argv[1:]] if self._python else list(argv)
        files = int(config.step(self._plan, "rlimits")["NOFILE"])
        limit = files if files < config.ROOM_FILES else None
        self._gate.write("call", call_script(argv, env, cwd, streams, limit))
        os.write(self._pipes["go"], b"go\n")

    def _on_gate(self) -> None:
        words = os.read(self._pipes["status"], 4096).decode("ascii", "replace").split()
        if not words or self._is_opened:
            return  # the tool's own writing, which says nothing
        self._is_opened = True
        if words[0] == "opened":
            for feed in self._feeds:
                feed.start()
            self.steps_applied.append("exec")
            self._tell({"ev": "executed"})
            for number in self._signals:
                self.signal(number)
        elif words[0] == "nolimit":
            self.failure = {"step": "exec", "errno": 0, "message": "the image's shell cannot limit open files (ulimit)"}
        elif words[0] == "noenv":
            self.failure = {"step": "exec", "errno": 0, "message": "the image lacks env, which starts the tool"}
        else:
            self._tell({"ev": "exec_failed", "errno": 2})

    def _tell(self, message: dict[str, Any]) -> None:
        if self.on_event is not None:
            self.on_event(message)

    def signal(self, number: int) -> None:
        """Through the container's init, which passes signals on to its child. Early ones wait for the tool.

        The shell that has a terminal passes none on: then it goes to its child, by a descriptor of that process.
        """
        if not self._is_opened:
            self._signals.append(number)
            return
        if self._terminal:
            signal_child(self._pid, number)
            return
        engine, container = self._engine, self._id
        if engine is not None and not self.gone.is_set():
            self._launcher.thread(lambda: _signal(engine, container, number))

    def kill(self) -> None:
        """The end of its first process is the end of everything in its pid namespace (pid_namespaces(7))."""
        self.is_killed = True
        if "pidfd" in self.fds:
            with contextlib.suppress(ProcessLookupError):
                syscalls.pidfd_kill(self.fds["pidfd"], signal.SIGKILL)
        elif self.ready.is_set():
            self._end()

    def _on_death(self) -> None:
        self._loop.remove_reader(self.fds["pidfd"])
        self.group.stats()
        if self.is_killed and self.ready.is_set():
            # We did it, so there is nothing to ask: the end of a call must not wait for a daemon that hangs.
            self._tell_exit(signal.SIGKILL)
            self._end()
            return
        self._task(self._ended())

    async def _ended(self) -> None:
        """Ask the engine how it ended; it may not know, because it has ended too or somebody removed the container."""
        engine, container = self._engine, self._id
        assert engine is not None
        try:
            ended: Ended = await asyncio.wrap_future(self._launcher.thread(lambda: engine.wait(container)))
        except LaunchError as error:
            self.notes.append(f"how the container ended is not known: {error.message}")
        else:
            self.group.is_out_of_memory = ended.out_of_memory
            if not self.ready.is_set():
                self._fail("container", LaunchError(f"it ended with {ended.exit_code} before its call; {_NO_SHELL}"))
            self._tell_exit(ended.exit_code << 8)
        if not self.ready.is_set():
            self._fail("container", LaunchError("it ended before its call"))
        self._end()

    def _tell_exit(self, wait_status: int) -> None:
        stats = self.group.stats()
        self._tell(
            {
                "ev": "exit",
                "wait_status": wait_status,
                "user_s": stats.get("cpu_user_s", 0.0),
                "system_s": stats.get("cpu_system_s", 0.0),
                "maxrss_bytes": stats.get("memory_peak_bytes", 0),
            }
        )

    def _end(self) -> None:
        self._settle()
        self.gone.set()

    async def wait_dead(self) -> None:
        """The first process is reaped after all others of its pid namespace, so its end is theirs."""
        self.kill()
        await self.gone.wait()

    def close(self) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        self.kill()
        if "pidfd" in self.fds:
            self._loop.remove_reader(self.fds["pidfd"])
        if self._status is not None:
            self._loop.remove_reader(self._status)
            self._status.close()
            self._status = None
        if "status" in self._pipes:
            self._loop.remove_reader(self._pipes["status"])
        for feed in self._feeds:
            feed.close()
        for fd in (*self._pipes.values(), *self.fds.values()):
            os.close(fd)
        self._pipes.clear()
        self.fds.clear()
        self._end()
        self._launcher.keeper.forget(self.name)
        self._launcher.thread(self._dispose)

    def _dispose(self) -> None:
        """In a thread: remove container, group and directory. What a dead daemon keeps, the next start removes."""
        if self._making is not None:
            # It was begun before this, so this waits for no thread that it takes itself.
            wait([self._making])
        if self._engine is not None and self._id:
            with contextlib.suppress(LaunchError):
                self._engine.remove(self._id)
        if self.group.below is not None:
            path = common_path(self.group.below, self._launcher.layout)
            remove_everywhere(path, self._launcher.layout)
            self.group.below.destroy()
        if self._gate is not None:
            self._gate.remove()


def signal_child(parent: int, number: int) -> None:
    """Send a signal to the one child of a process. Its end, meanwhile or before, is no error."""
    with contextlib.suppress(OSError):
        for text in Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()[:1]:
            pidfd = os.pidfd_open(int(text))
            try:
                if int(Path(f"/proc/{text}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                    syscalls.pidfd_kill(pidfd, number)
            finally:
                os.close(pidfd)


def _signal(engine: Engine, container: str, number: int) -> None:
    """In a thread. A container that has ended meanwhile needs no signal, and a daemon that is gone shows in its end."""
    with contextlib.suppress(LaunchError):
        engine.signal(container, number)


def _is_null(fd: int) -> bool:
    info, null = os.fstat(fd), os.stat("/dev/null")
    return info.st_rdev == null.st_rdev and info.st_rdev != 0
