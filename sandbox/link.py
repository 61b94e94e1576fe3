"""The caller's connection to its supervisor: start it, hand calls over, wait for their outcomes.

Each call has a reply channel of its own, so callers on many threads and on event loops need no lock and no reader
thread: the kernel queues and wakes. Closing a reply channel ends its call. Does nothing privileged.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping

from sandbox import errors
from sandbox._linux import bare, wire
from sandbox._linux.child import Child
from sandbox.errors import CallLost, InternalError, LauncherUnavailable, SandboxError

# Not from typing: a command line that starts us loads nothing that it does not need.
TYPE_CHECKING = False

if TYPE_CHECKING:
    import subprocess
    from typing import Any

    from sandbox.host import HostFacts

# The package comes from where the caller has it, not from another copy on the interpreter's own path. The caller's
# search path comes after the isolated interpreter's: what we need may be where only it points.
_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[3]); import sandbox; del sys.path[0]; "
    "sys.path.extend(p for p in sys.argv[3:] if p not in sys.path); "
    "from sandbox.supervisor.main import run; run(sys.argv[1:3])"
)
PACKAGE_ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
START_TIMEOUT_S = 60.0
TOLD_MAX = 1000
SLOTS_MAX = 1024
STOP_TIMEOUT_S = 30.0


class Slots:
    """How many calls may be under way from this process; the rest wait their turn, threads and event loops alike.

    Each call under way holds a descriptor here, and the host's default is 1024 of them for everything.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[Callable[[], object]] = deque()
        self._lock = threading.Lock()

    def take_free(self) -> bool:
        """Whether a slot was free, and is ours now."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            return False

    def take(self, when_ours: Callable[[], object]) -> bool:
        """Whether a slot is ours now; if not, `when_ours` is called, from any thread, once it is."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return True
            self._waiting.append(when_ours)
            return False

    def wait(self) -> Ticket:
        """Take a slot, waiting for it in this thread."""
        if not self.take_free():
            ours = threading.Event()
            if not self.take(ours.set):
                try:
                    ours.wait()
                except BaseException:
                    self.forget(ours.set)
                    raise
        return Ticket(self)

    def forget(self, when_ours: Callable[[], object]) -> None:
        """Wait no longer. A slot that came meanwhile goes to the next."""
        with self._lock:
            try:
                self._waiting.remove(when_ours)
                return
            except ValueError:
                pass  # it has been given to us
        self.give_back()

    def give_back(self) -> None:
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            when_ours = self._waiting.popleft()
        when_ours()


class Ticket:
    """One slot taken. Giving it back twice is once."""

    def __init__(self, slots: Slots) -> None:
        self._slots: Slots | None = slots

    def release(self) -> None:
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.give_back()


def slot_count() -> int:
    """Half of the descriptors that this process may open, and no more than the supervisor runs at once."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(8, min(SLOTS_MAX, soft // 2 - 64))


class NotHandedOver(CallLost):
    """The supervisor died before it could be told of the call: nothing of it has run, it may be told to another."""


class Pending:
    """A call that has been handed over. Close it (or leave its `with`) to end the call."""

    def __init__(self, reply: socket.socket, ticket: Ticket) -> None:
        self.reply = reply
        self._ticket = ticket

    def __enter__(self) -> Pending:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the call if it runs. close(2) alone would not do: a child forked meanwhile may hold a copy."""
        with contextlib.suppress(OSError):
            self.reply.shutdown(socket.SHUT_RDWR)
        self.reply.close()
        self._ticket.release()

    def signal(self, number: int) -> None:
        """Pass a signal on to the tool's process group."""
        self._tell({"op": "signal", "number": number})

    def resize(self, rows: int, columns: int) -> None:
        self._tell({"op": "resize", "rows": rows, "columns": columns})

    def _tell(self, message: dict[str, object]) -> None:
        try:
            wire.send(self.reply, message)
        except OSError:
            return  # the call has ended; its outcome says how

    def take(self) -> dict[str, Any]:
        """The outcome's message with its sections as bytes. Blocks unless the channel does not.

        Raises CallLost when the supervisor died, and what it says when it could not keep the record.
        """
        try:
            message, sections, fds = wire.receive_with_parts(self.reply)
        except ConnectionResetError:
            message, sections, fds = None, {}, []
        for fd in fds:
            os.close(fd)
        if message is None:
            raise CallLost(
                "the supervisor died before the call ended; nothing is known about what the tool did",
                hint="the next start with this state directory closes its record as lost: sandbox audit list",
            )
        if message["ev"] == "error":
            raise _error(message)
        return {**message, "sections": sections}


def _error(message: Mapping[str, Any]) -> SandboxError:
    kind = getattr(errors, str(message["type"]), InternalError)
    error: SandboxError = kind(str(message["message"]), hint=str(message["hint"]))
    return error


class Link:
    """One supervisor process and the channel to it. Made by `shared`; starts on first use."""

    def __init__(self, state: str) -> None:
        self.state = state
        self.users = 0
        self.slots = Slots(slot_count())
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | Child | None = None
        self._control: socket.socket | None = None
        # Of `_control`. Used under the lock alone.
        self._hangup = select.poll()
        self._facts_json = b""
        self._facts: tuple[bytes, HostFacts] | None = None
        self._in_scope = False
        self._scope_failed = False
        self._told: set[tuple[str, ...]] = set()
        self.supervisor_pid = -1
        self.zygote_pid = -1

    def __repr__(self) -> str:
        return f"<Link supervisor={self.supervisor_pid} state={self.state}>"

    def start(self, *, forked: bool = False) -> None:
        """Start the supervisor without waiting for it. Safe to call again, and after it died.

        `forked`: this process is the command line and has begun nothing else (`link_fork`).
        """
        with self._lock:
            if self._is_up():
                return
            self._forget()
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                prefix = [] if self._scope_failed else _delegation_prefix()
                self._in_scope = bool(prefix)
                self._process = self._forked(theirs) if forked and not prefix else self._executed(theirs, prefix)
            self._control = ours
            self._hangup = select.poll()
            self._hangup.register(ours, 0)

    def _executed(self, control: socket.socket, prefix: list[str]) -> subprocess.Popen[bytes]:
        import subprocess

        argv = [sys.executable, "-I", "-c", _BOOT, str(control.fileno()), self.state]
        argv += [PACKAGE_ROOT, *(path for path in sys.path if os.path.isabs(path))]
        return subprocess.Popen(
            [*prefix, *argv],
            env=_environment(for_systemd=bool(prefix)),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[control.fileno()],
            start_new_session=True,
        )

    def _forked(self, control: socket.socket) -> subprocess.Popen[bytes] | Child:
        from sandbox import link_fork

        if not link_fork.is_possible():
            return self._executed(control, [])
        return link_fork.start(control, self.state, _environment(for_systemd=False))

    def _is_up(self) -> bool:
        """Whether there is a supervisor to tell of a call. A killed one closes its end before it can be waited for."""
        if self._process is None or self._process.poll() is not None:
            return False
        assert self._control is not None
        if not self._hangup.poll(0):
            return True
        self._end(self._process)
        return False

    def facts(self) -> HostFacts:
        """What the host can enforce, as the supervisor found it. Waits for its start."""
        data = self.facts_json()
        with self._lock:
            # Only those of this supervisor: another may have been started meanwhile.
            if self._facts is None or self._facts[0] is not data:
                from sandbox.host import HostFacts

                self._facts = (data, HostFacts.from_json(json.loads(data)))
            return self._facts[1]

    def facts_json(self) -> bytes:
        """The facts as the supervisor sent them. Waits for its start."""
        self.start()
        try:
            return self._known_facts()
        except LauncherUnavailable:
            if not self._in_scope:
                raise
        # systemd would not give us a scope of our own. Without one there are fewer controls, and the facts will say so.
        self._scope_failed = True
        self.close()
        self.start()
        return self._known_facts()

    def _known_facts(self) -> bytes:
        with self._lock:
            if not self._facts_json:
                self._facts_json = self._receive_facts()
            return self._facts_json

    @property
    def is_started(self) -> bool:
        return bool(self._facts_json)

    def _receive_facts(self) -> bytes:
        assert self._control is not None
        self._control.settimeout(START_TIMEOUT_S)
        while True:
            try:
                message, fds = wire.receive(self._control)
            except (TimeoutError, ConnectionResetError) as error:
                raise LauncherUnavailable("the supervisor did not start", step="supervisor") from error
            if message is None:
                raise LauncherUnavailable("the supervisor ended while it started", step="supervisor")
            if message["ev"] == "failed":
                raise _error(message)
            if message["ev"] == "hello":
                self.supervisor_pid, self.zygote_pid = int(str(message["pid"])), int(str(message["zygote_pid"]))
                with os.fdopen(fds[0], "rb") as file:
                    facts = file.read()
                self._control.settimeout(None)
                return facts

    def include(self, ask: dict[str, Any], name: str, key: str, data: Callable[[], Mapping[str, Any]]) -> None:
        """Put what `data` gives into `ask` under `name`, or only its `key` when this supervisor has had it before."""
        ask[f"{name}_id"] = key
        if (name, key) not in self._told:
            ask[name] = data()
            ask.setdefault("new", []).append((name, key))

    def submit(self, ask: Mapping[str, Any], request: bytes | None, fds: Mapping[str, int], ticket: Ticket) -> Pending:
        """Hand one call over. `ticket` goes with what is returned; `fds` stay the caller's to close.

        Raises NotHandedOver when the supervisor is gone: the message is one datagram, so it knows nothing of the call.
        """
        if self._control is None:
            self.facts_json()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parts = {"ask": bare.dumps(ask).encode()}
        if request is not None:
            parts["request"] = request
        try:
            with theirs:
                ends = {"reply": theirs.fileno(), **fds}
                assert self._control is not None
                wire.send_with_parts(self._control, {"op": "call", "fds": [*ends]}, parts, [*ends.values()])
            # Only now: whoever sends the key alone must come after whoever sent the data.
            if len(self._told) < TOLD_MAX:
                self._told.update(tuple(pair) for pair in ask.get("new", ()))
        except OSError as error:
            ours.close()
            raise NotHandedOver(f"the supervisor is gone: {error}") from error
        except BaseException:
            # An interrupt: the call may have been handed over. The traceback would hold its channel open.
            ours.close()
            raise
        return Pending(ours, ticket)

    def close(self) -> None:
        """End the supervisor and every call that still runs."""
        with self._lock:
            process, self._process = self._process, None
            self._forget()
        if process is not None:
            self._end(process)

    @staticmethod
    def _end(process: subprocess.Popen[bytes] | Child) -> None:
        """Wait for a supervisor whose channel is closed."""
        if not _ends_in_time(process):
            process.kill()
            process.wait()

    def _forget(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self._facts_json, self._facts = b"", None
        self._told.clear()
        if self._process is not None:
            self._process.poll()

    def drop_inherited(self) -> None:
        """In a forked child: let go of the parent's channel, so that the parent's end is seen when it comes."""
        self._lock = threading.Lock()
        self.slots = Slots(slot_count())
        if self._control is not None:
            self._control.close()
        self._control, self._process, self._facts_json, self._facts = None, None, b"", None
        self._told.clear()


def _ends_in_time(process: subprocess.Popen[bytes] | Child) -> bool:
    if isinstance(process, Child):
        try:
            process.wait(STOP_TIMEOUT_S)
        except TimeoutError:
            return False
        return True
    import subprocess

    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _environment(*, for_systemd: bool) -> dict[str, str]:
    """The supervisor's whole environment. systemd-run needs to find the user's bus; nothing else is passed on."""
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
    if for_systemd:
        names = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")
        env.update({name: os.environ[name] for name in names if name in os.environ})
    return env


def _delegation_prefix() -> list[str]:
    if os.geteuid() == 0:
        return []  # as it says itself
    from sandbox.host import delegation_prefix

    return delegation_prefix()


def close_all() -> None:
    """End every supervisor of this process, for whoever leaves it without Python's own end."""
    _REGISTRY.close_all()


class _Registry:
    """The links of this process, one per state directory."""

    def __init__(self) -> None:
        self.links: dict[str, Link] = {}
        self.lock = threading.Lock()

    def drop_inherited(self) -> None:
        self.lock = threading.Lock()
        for link in self.links.values():
            link.drop_inherited()

    def close_all(self) -> None:
        with self.lock:
            links = list(self.links.values())
            self.links.clear()
        for link in links:
            link.close()


# A supervisor belongs to the process, not to one object in it: decorators in many modules share it.
_REGISTRY = _Registry()
os.register_at_fork(after_in_child=_REGISTRY.drop_inherited)
atexit.register(_REGISTRY.close_all)


def shared(state: str | os.PathLike[str]) -> Link:
    """The link for `state`, counted: give it back with `release`."""
    path = os.fspath(state)
    with _REGISTRY.lock:
        link = _REGISTRY.links.setdefault(path, Link(path))
        link.users += 1
        return link


def release(link: Link) -> None:
    """Give a shared link back; the last one out ends the supervisor."""
    with _REGISTRY.lock:
        link.users -= 1
        last = link.users <= 0 and _REGISTRY.links.get(link.state) is link
        if last:
            del _REGISTRY.links[link.state]
    if last:
        link.close()
