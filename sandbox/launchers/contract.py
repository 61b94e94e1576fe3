"""What the supervisor asks of a launcher: to make containers for a plan, and of a container: to be one call's.

A container is made, settles (sealed and parked, or failed), is given one call by `go`, and ends. Whatever builds the
wall, these are the moments that a call is timed, killed and recorded by. A launcher carries out every step of a plan
or refuses; what it cannot hold at all stands in `declared`, so that the planner refuses before anything is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sandbox._linux import cgroup
from sandbox.plan import LaunchPlan

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Protocol
else:
    Protocol = object


class Group(Protocol):
    """The cgroup of one call, where it has one. `v2` is a path or empty, `v1` maps controllers to paths."""

    @property
    def name(self) -> str: ...

    @property
    def v1(self) -> Mapping[str, str]: ...

    @property
    def v2(self) -> str: ...

    def stats(self) -> dict[str, float | int]: ...

    def open_oom_event(self) -> int | None: ...

    def freeze(self, timeout_s: float = ...) -> bool: ...

    def thaw(self, timeout_s: float = ...) -> bool: ...


class Container(Protocol):
    """One container, from its launch to its end, in the supervisor's loop. Single use: `go` once, then `close`.

    `fds`: descriptors that came out of it, by name: `workspace`, `scratch` and `upper` to look through afterwards,
    `egress:...` for the gateway, `terminal`, `pidfd`. `steps_applied`, `notes` and `details` (by field
    of the record's isolation: a container's id, an image's digest) go into the record. `failure` is
    empty, or says which step failed: `step`, `errno`, `message`, and `bug` when it is ours. `ready` is set when it is
    sealed or has failed, `gone` when it has ended. `on_event` is told what happens inside: `executed`,
    `exec_failed` (errno, and directory where that is what cannot be entered), `exit` (wait_status, user_s, system_s,
    maxrss_bytes).
    """

    name: str
    fds: dict[str, int]
    steps_applied: list[str]
    notes: list[str]
    details: dict[str, Any]
    failure: dict[str, Any]
    is_killed: bool
    is_closed: bool
    ready: asyncio.Event
    gone: asyncio.Event
    on_event: Callable[[dict[str, Any]], None] | None

    @property
    def group(self) -> Group | None: ...

    @property
    def pid(self) -> int:
        """Of its first process, in the supervisor's own namespace; -1 before it is born."""

    def is_usable(self) -> bool:
        """Whether a call may get it: sealed, or on its way there."""

    def when_settled(self, then: Callable[[], None]) -> None:
        """Call `then` once: when it is sealed, or will never be. Precondition: none of that yet."""

    def open_output(self, name: str) -> tuple[int, int]:
        """(our end, the end to pass to `go` or -1) of the stream `stdout`, `stderr` or `result`. Both the caller's."""

    def go(self, call: Mapping[str, object], fds: Mapping[str, int]) -> None:
        """Start the tool: `call` holds argv, env and cwd, `fds` its streams, which stay the caller's to close."""

    def signal(self, number: int) -> None:
        """Send a signal to the tool's process group."""

    def kill(self) -> None:
        """End everything inside, now, without waiting for it. May be called at any time and more than once."""

    async def wait_dead(self) -> None:
        """Until every process inside is gone."""

    def close(self) -> None:
        """Give back everything; what still runs inside is killed."""


class Setting:
    """What a supervisor lends its launchers.

    `owner` names the supervisor, so that what it made and left behind can be told from a living one's
    (`cgroup.owner_name`). `host_uids`: first uids of blocks that no account uses; None for an ordinary user. `disks`:
    the host's, as "major:minor".
    """

    def __init__(
        self,
        state: Path,
        tree: cgroup.Tree | None,
        owner: str,
        host_uids: Iterator[int] | None,
        disks: tuple[str, ...] = (),
    ) -> None:
        self.state = state
        self.tree = tree
        self.owner = owner
        self.host_uids = host_uids
        self.disks = disks


class Launcher(Protocol):
    """Makes containers. What it makes belongs to who asked for it.

    `own_user_namespace`: its overlays are mounted by an ordinary user.
    """

    @property
    def name(self) -> str: ...

    @property
    def own_user_namespace(self) -> bool: ...

    def kind(self, plan: LaunchPlan) -> Any:
        """What containers of one plan have in common, worked out once."""

    def make(self, kind: Any) -> Container:
        """A container, on its way to being sealed. Raises OSError or LaunchError when it cannot even be begun."""

    def close(self) -> None:
        """End what it started. Containers that were handed out are closed by then."""
