"""Talking to a Docker daemon: every call blocks and belongs in a thread; its errors become ours, by one table.

A refusal that passes by itself is retried before anything has run, and only then: a call is never run twice.
Requires the extra `docker`. Source: Docker Engine API v1.41.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandbox.errors import LaunchError, LauncherUnavailable

SOCKETS: Final = ("/run/docker.sock", "/var/run/docker.sock")
TIMEOUT_S: Final = 60
_ATTEMPTS: Final = 4
_HINT: Final = "pip install 'toolcall-sandbox[docker]'"
# (words in the daemon's answer, step, what to do): the first that fits names the trouble.
_KNOWN: Final = (
    ("no such image", "image", "sandbox pull it first (or docker pull), or name one of `docker images`"),
    ("no space left on device", "container", "make room where the daemon keeps its data (docker system df)"),
    ("unknown or invalid runtime", "container", "register the runtime in the daemon's daemon.json"),
    ("runtime not found", "container", "register the runtime in the daemon's daemon.json"),
    ("bind source path does not exist", "container", "the daemon must see the same files as this host"),
)


@dataclass(frozen=True)
class Ended:
    """How the engine says that a container ended."""

    exit_code: int
    out_of_memory: bool


class Engine:
    """One daemon. Clients are per thread: the SDK's session is not shared safely."""

    def __init__(self, address: str) -> None:
        self.address = address or _usual_address()
        self._local = threading.local()
        self.info: Mapping[str, Any] = {}

    @classmethod
    def open(cls, address: str) -> Engine:
        """Connect, and check that this daemon can hold what the launcher declares. Raises LauncherUnavailable."""
        engine = cls(address)
        engine.info = engine.ask("launcher", lambda api: api.info())
        if refusal := refuse(engine.info, os.uname().release):
            raise LauncherUnavailable(f"docker at {engine.address}: {refusal}", step="launcher")
        return engine

    def _api(self) -> Any:
        if not hasattr(self._local, "api"):
            try:
                import docker
            except ImportError as error:
                message = "the launcher docker needs the Docker SDK"
                raise LauncherUnavailable(message, step="launcher", hint=_HINT) from error
            self._local.api = docker.APIClient(base_url=self.address, version="auto", timeout=TIMEOUT_S)
        return self._local.api

    def ask(self, step: str, question: Callable[[Any], Any]) -> Any:
        """One request. Raises LaunchError, or LauncherUnavailable when nobody answers."""
        try:
            return question(self._api())
        except Exception as error:
            raise translate(error, step, self.address) from error

    def ask_again(self, step: str, question: Callable[[Any], Any]) -> Any:
        """One request that may be made more than once. Raises as `ask`, when the last attempt failed too."""
        try:
            import tenacity
        except ImportError as error:
            message = "the launcher docker needs tenacity"
            raise LauncherUnavailable(message, step="launcher", hint=_HINT) from error
        attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=0.05, max=1.0),
            retry=tenacity.retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            return attempts(lambda: question(self._api()))
        except Exception as error:
            raise translate(error, step, self.address) from error

    def image(self, name: str) -> Mapping[str, Any]:
        """What the daemon knows of an image; `Id` is its digest. Raises LaunchError when it has none of that name."""
        found: Mapping[str, Any] = self.ask_again("image", lambda api: api.inspect_image(name))
        return found

    def pull(self, name: str, told: Callable[[Mapping[str, Any]], None]) -> str:
        """Fetch an image from its registry, and return its digest here. `told` gets the daemon's messages as they come.

        Raises LaunchError with what the registry or the daemon said. Nothing of ours limits how long it takes.
        """

        def fetch(api: Any) -> str:
            from docker.utils import parse_repository_tag

            repository, tag = parse_repository_tag(name)
            for event in api.pull(repository, tag or "latest", stream=True, decode=True):
                if "error" in event:
                    raise LaunchError(f"docker: {event['error']}", step="image")
                told(event)
            return str(api.inspect_image(name)["Id"])

        return str(self.ask("image", fetch))

    def create(self, body: Mapping[str, Any], name: str) -> str:
        """Make a container and return its id. A half-made one of an earlier attempt is removed first."""
        attempts: list[None] = []

        def create(api: Any) -> Any:
            if attempts:
                self._remove(api, name)
            attempts.append(None)
            return api.create_container_from_config(dict(body), name)

        return str(self.ask_again("container", create)["Id"])

    def start(self, container: str) -> int:
        """Start it; the pid of its first process. Never tried twice."""
        self.ask("container", lambda api: api.start(container))
        return int(self.ask("container", lambda api: api.inspect_container(container))["State"]["Pid"])

    def wait(self, container: str) -> Ended:
        """How a container that has ended did so. Raises LaunchError when the engine cannot say."""
        code = self.ask("container", lambda api: api.wait(container, timeout=TIMEOUT_S))["StatusCode"]
        state = self.ask("container", lambda api: api.inspect_container(container))["State"]
        return Ended(int(code), bool(state.get("OOMKilled")))

    def signal(self, container: str, number: int) -> None:
        self.ask("container", lambda api: api.kill(container, number))

    def remove(self, container: str) -> None:
        """Kill and remove, with the volumes that it made; gone already is as well."""
        self.ask("container", lambda api: self._remove(api, container))

    @staticmethod
    def _remove(api: Any, container: str) -> None:
        import docker

        try:
            api.remove_container(container, force=True, v=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError as error:
            # Somebody else removes it at this moment: then it will be gone.
            if error.status_code != 409:
                raise

    def labelled(self, label: str) -> list[Mapping[str, Any]]:
        """Every container, running or not, with that label or `label=value`."""
        found: list[Mapping[str, Any]] = self.ask(
            "launcher", lambda api: api.containers(all=True, filters={"label": label})
        )
        return found


def refuse(info: Mapping[str, Any], kernel: str) -> str:
    """Why a daemon will not do; empty when it will. Pure."""
    options = {option.split(",")[0] for option in info.get("SecurityOptions") or ()}
    if info.get("OSType") != "linux" or info.get("KernelVersion") != kernel:
        return "it runs on another kernel, whose containers cannot be entered, limited and ended from here"
    if "name=rootless" in options:
        return "it is rootless: its containers cannot have a uid of their own; use the native launcher"
    if "name=userns" in options:
        return "it maps user ids (userns-remap), under which a call's own uid does not exist; use another daemon"
    if "name=seccomp" not in options:
        return "it installs no seccomp filter, so system calls would not be limited"
    flags = {"MemoryLimit": "memory", "PidsLimit": "processes", "CpuCfsQuota": "CPU time"}
    lacking = [what for flag, what in flags.items() if not info.get(flag)]
    return f"it cannot limit {', '.join(lacking)}" if lacking else ""


def refuse_devices(info: Mapping[str, Any], names: Sequence[str]) -> str:
    """Why a daemon cannot give devices of these names (Container Device Interface); empty when it can. Pure.

    `CDISpecDirs` is there since Docker 25, and empty without the feature; a daemon since 28.2 lists what it found.
    """
    if not info.get("CDISpecDirs"):
        return f"Docker {info.get('ServerVersion', '')} gives no devices by name (Container Device Interface)"
    listed = info.get("DiscoveredDevices")
    known = {str(device.get("ID")) for device in listed or ()}
    lacking = [name for name in names if listed and name not in known]
    return f"the daemon knows no device {', '.join(lacking)}" if lacking else ""


# What gVisor is to be told: to apply our filter, and to open the named pipes that it is shown, which are the call's
# streams. And whose network stack to use: that of the namespace which the engine makes for the container, where the
# gateway's sockets can be, or its own without any way out. Untold it takes one of its own, with what the engine gives.
RUNSC_ARGUMENTS: Final = ("oci-seccomp", "host-fifo=open")
RUNSC_JOINED: Final = "network=host"
RUNSC_ALONE: Final = "network=none"


def refuse_runtime(info: Mapping[str, Any], name: str, *, has_way_out: bool = False) -> str:
    """Why a daemon's runtime with a kernel of its own inside will not do; empty when it will. Pure.

    `has_way_out`: the call has an allowlist.
    """
    found = (info.get("Runtimes") or {}).get(name)
    if found is None:
        return f"it knows no runtime {name!r}"
    told = {str(argument).lstrip("-").removesuffix("=true") for argument in found.get("runtimeArgs") or ()}
    lacking = [f"--{argument}" for argument in RUNSC_ARGUMENTS if argument not in told]
    if RUNSC_JOINED not in told and (has_way_out or RUNSC_ALONE not in told):
        lacking.insert(0, f"--{RUNSC_JOINED}")
    return f"its runtime {name!r} is started without {' '.join(lacking)}" if lacking else ""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may well succeed in a moment."""
    status = getattr(error, "status_code", None)
    if status is not None:
        text = str(error).lower()
        return status in (429, 502, 503, 504) or (status == 500 and "timeout" in text)
    return "Connection aborted" in str(error) or "Connection reset" in str(error)


def translate(error: Exception, step: str, address: str) -> LaunchError:
    """An error of the SDK, or of what it is built on, as ours."""
    if isinstance(error, LaunchError):
        return error
    text = str(getattr(error, "explanation", None) or error)
    if getattr(error, "status_code", None) is None:
        message = f"the Docker daemon at {address} does not answer: {text[:300]}"
        return LauncherUnavailable(message, step=step, hint="start it, or name another one in DOCKER_HOST")
    for words, where, hint in _KNOWN:
        if words in text.lower():
            return LaunchError(f"docker: {text[:500]}", step=where, hint=hint)
    return LaunchError(f"docker: {text[:500]}", step=step)


def _usual_address() -> str:
    path = next((path for path in SOCKETS if os.path.exists(path)), None)
    if path is None:
        message = f"no Docker daemon here: neither {' nor '.join(SOCKETS)} is there"
        raise LauncherUnavailable(message, step="launcher", hint="start one, or name one in DOCKER_HOST")
    return f"unix://{path}"
