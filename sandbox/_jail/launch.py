"""What one launch holds: the plan, the call's descriptors by name, and what the steps have made so far."""

from __future__ import annotations

from sandbox._linux import process, wire
from sandbox._linux.bare import loads, socket, suppress
from sandbox._linux.batch import Buffer, slot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from sandbox._linux.batch import Batch

INSIDE_ID = 1000


class Launch:
    """One launch: the plan, the call's descriptors by name, and what the steps have made so far."""

    def __init__(self, message: dict[str, object], fds: list[int]) -> None:
        names = message["fds"]
        assert isinstance(names, list)
        self.fds: dict[str, int] = dict(zip(names, fds, strict=True))
        self.plan = loads(wire.read_memfd(self.fds["plan"]))
        self.status = socket.socket(fileno=self.fds["status"])
        host_uid = message["host_uid"]
        # None: an ordinary user, who can map nothing but himself.
        self.host_uid: int | None = host_uid if isinstance(host_uid, int) else None
        # What an ordinary user is called in his own user namespace, in which the view is built.
        self.own_id = int(str(message.get("own_id", INSIDE_ID)))
        # A template's children have uids of their own; it takes root to map more than one.
        self.uid_count = int(str(message.get("uid_count", 1)))
        self.mnt = str(message["mnt"])
        # What is inside reaches granted trees through a process with the supervisor's own uid, which makes files first
        # and gives them away then.
        self.is_made_by_us = False
        # Absent where a container's runtime installs it.
        self.seccomp = wire.read_memfd(self.fds["seccomp"]) if "seccomp" in self.fds else b""
        self.cap_last = process.last_cap()
        self.step = "start"
        self.applied: list[str] = []
        self.notes: list[str] = []
        self.out_fds: dict[str, int] = {}
        # What runs inside, once there is a call: argv, env, cwd.
        self.call: dict[str, Any] = {}
        # For steps that are made ready before it is known: which id our user namespace maps, and /proc/sys.
        self.id_map = Buffer(_id_map(INSIDE_ID))
        self.proc_sys = slot()

    @property
    def root(self) -> str:
        """Where the new root is being built."""
        return f"{self.mnt}/root"

    @property
    def owner(self) -> int:
        """The jail's uid as seen from the namespace in which the view is built."""
        return self.own_id if self.host_uid is None else self.host_uid

    def take_id(self, uid: int) -> None:
        """The user that `uid` of the namespace above us is: the one inside."""
        self.id_map.put(_id_map(uid))

    def take_ready(self, ready: Iterable[tuple[str, Batch]]) -> None:
        """Take steps that were made ready, in order."""
        for name, batch in ready:
            self.step = name
            batch.run()
            self.applied.append(name)

    def run_steps(self, where: str, handlers: Mapping[str, Callable[[Launch, dict[str, Any]], None]]) -> None:
        """Walk the plan's steps of one process, in order."""
        for step in self.plan["steps"]:
            if step["where"] != where:
                continue
            self.step = step["name"]
            handlers[self.step](self, step["args"])
            self.applied.append(self.step)


def _id_map(uid: int) -> bytes:
    """One line of /proc/PID/uid_map, always of one length: the kernel passes over leading spaces."""
    return b"%d %10d 1" % (INSIDE_ID, uid)


def report_failure(launch: Launch, error: Exception) -> None:
    """Tell the supervisor which step failed, and how. It may have gone meanwhile, which is often why.

    An OSError is the host's answer; anything else is a bug of ours, and is said to be one.
    """
    is_bug = not isinstance(error, OSError)
    message: dict[str, object] = {
        "ev": "step_failed",
        "step": launch.step,
        "errno": 0 if is_bug else getattr(error, "errno", None) or 0,
        "message": f"{type(error).__name__}: {error}" if is_bug else str(error),
        "bug": is_bug,
    }
    with suppress(BrokenPipeError, ConnectionResetError):
        wire.send(launch.status, message)
