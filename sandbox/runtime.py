"""The caller's side: resolve a manifest, decide the plan, hand the call to the supervisor, give back the outcome.

`Sandbox` may be used from any number of threads and event loops at once. It does nothing privileged and never forks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import selectors
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sandbox import link as supervisor_link
from sandbox import prepare_places
from sandbox._linux import wire
from sandbox.audit.store import state_dir
from sandbox.audit.view import Record
from sandbox.context import CallContext, current_context
from sandbox.errors import ManifestError, ToolFailed, Unenforceable
from sandbox.link import Link, NotHandedOver, Pending, Slots, Ticket
from sandbox.outcome import Outcome
from sandbox.plan import LaunchPlan
from sandbox.runtime_outcome import program_outcome
from sandbox.spec import CallSpec

if TYPE_CHECKING:
    from typing import Self

    from sandbox.host import HostFacts
    from sandbox.manifest import Manifest
    from sandbox.prepare_secrets import SecretValues
    from sandbox.profiles import Resolved

    Source = str | Path | Manifest | Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One call, ready to go: its spec and manifest, and what decodes its result."""

    spec: CallSpec
    resolved: Resolved
    env: Mapping[str, str]
    input: bytes | None = None
    request: bytes | None = None
    annotation: Any = Any


class Sandbox:
    """Runs programs and functions under one profile, each in a jail of its own.

    Args:
        profile: a profile's name, a path to one, a `Manifest`, or a mapping in the file's form.
        state: where records are kept; by default `$SANDBOX_STATE` or `$XDG_STATE_HOME/sandbox`.
        ceiling: an operator's ceiling file, intersected last.
        secret_values: values of secrets that the manifest names, by name: strings, or functions that give them
            for each call. They go to the gateway, never into the jail or the record.
        **overrides: the manifest's settings by their file names: `memory="256MiB"`, `wall_time="5s"`,
            `read=["./data"]`, `workspace="."`, `workspace_mode="cow"`, ...

    Raises ManifestError (or ProfileError) when the profile or an override is wrong; nothing has run then.
    """

    def __init__(
        self,
        profile: Source = "python",
        *,
        state: str | Path | None = None,
        ceiling: Path | None = None,
        secret_values: SecretValues | None = None,
        **overrides: Any,
    ) -> None:
        self._profile = profile
        self._secret_values = dict(secret_values or {})
        self._ceiling = ceiling
        self._overrides = overrides
        self._state = state_dir(state)
        # Deciding is pure, so equal questions have equal answers. The facts are kept so that their id stays theirs.
        self._plans: dict[Any, tuple[HostFacts, LaunchPlan, tuple[str, dict[str, Any]]]] = {}
        self._link: Link | None = supervisor_link.shared(self._state)
        try:
            self._link.start()
            # Only now: what decides takes as long to load as the supervisor to start.
            from sandbox import planner, prepare  # noqa: F401
            from sandbox.profile_parse import looked_up
            from sandbox.profiles import resolve

            with looked_up() as lookups:
                self._resolved = resolve(profile, overrides=overrides or None, ceiling=ceiling)
            # What the profile says of the host's paths; `runtime_keep` wants to know.
            self._lookups = tuple(lookups)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Sandbox {self._resolved.profile or 'manifest'} {self._resolved.digest[:19]} link={self._link}>"

    def close(self) -> None:
        """Give the supervisor back; it ends when nobody else in this process uses it."""
        link, self._link = self._link, None
        if link is not None:
            supervisor_link.release(link)

    @property
    def manifest(self) -> Manifest:
        return self._resolved.manifest

    @property
    def state(self) -> Path:
        """Where this sandbox's records are."""
        return self._state

    def plan(self, argv: Sequence[str], **overrides: Any) -> LaunchPlan:
        """The plan that `run` would carry out. Raises Unenforceable when this host cannot hold it."""
        job = self._program(argv, overrides=overrides)
        return self._decide(job, self._live_link().facts())[0]

    def run(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        collect: Sequence[str] = (),
        context: CallContext | None = None,
        why: str = "",
        **overrides: Any,
    ) -> Outcome:
        """Run a program in a jail of its own and wait for it.

        Args:
            argv: the program and its arguments; no shell is involved.
            input: what it reads on standard input; nothing by default.
            env: variables for this call, beside those that the manifest allows and sets.
            cwd: where it starts inside; the workspace by default.
            collect: patterns of workspace files to bring out as bytes, `["out/*.json"]`.
            context: ids that join the record to an agent, a session, a trace.
            why: the reason for this call, in a sentence, for the record.
            **overrides: as for `Sandbox`, for this call only.

        Returns:
            The outcome, whatever the tool did: look at `.ok`, `.exit_code`, `.ending`, `.stdout`.

        Raises:
            ManifestError: an override is wrong. Unenforceable: this host cannot hold the manifest.
            AuditError: no record could be written. CallLost: the supervisor died.
        """
        job = self._program(
            argv, input=input, env=env, cwd=cwd, collect=collect, context=context, why=why, overrides=overrides
        )
        return self._wait(job)

    async def arun(self, argv: Sequence[str], **options: Any) -> Outcome:
        """As `run`, without blocking the event loop. Cancelling it ends the call."""
        overrides = {name: options.pop(name) for name in list(options) if name not in _RUN_OPTIONS}
        job = self._program(argv, **options, overrides=overrides)
        return await self._await(job)

    def call(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """Run a Python function in a jail of its own: `.value` is what it returned, `.unwrap()` raises its error."""
        return self._wait(self._function(func, args, kwargs, None))

    async def acall(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
        """As `call`, for sync and async functions, without blocking the event loop."""
        return await self._await(self._function(func, args, kwargs, None))

    def stream(self, argv: Sequence[str], *, input: bytes | str | None = None, **options: Any) -> Stream:
        """Run a program and iterate over its output as it comes: `(stream name, bytes)` pairs, then `.outcome`."""
        overrides = {name: options.pop(name) for name in list(options) if name not in _RUN_OPTIONS}
        return Stream(self, self._program(argv, input=input, **options, overrides=overrides))

    def passing(
        self,
        argv: Sequence[str],
        fds: Mapping[str, int],
        *,
        why: str = "",
        collect: Sequence[str] = (),
        tty: bool = False,
        is_single: bool = False,
    ) -> Pending:
        """Run a program whose streams are pipes of the caller's: `stdin` to read from, `stdout_to` and `stderr_to` (or,
        with a terminal inside, `terminal_to`) to write to. `started` is closed when the tool runs. The command line's
        way, which makes a single call (`is_single`) and no other."""
        job = self._program(argv, why=why, collect=collect, tty=tty, is_single=is_single, overrides={})
        return self._submit(job, fds)

    # -- how a call gets from here to there ---------------------------------------------------------------------

    def _resolve(self, overrides: Mapping[str, Any]) -> Resolved:
        """The manifest of one call. What was resolved already is the base: files edited meanwhile change nothing, and
        a sealed profile stays sealed."""
        from sandbox.profiles import resolve

        return resolve(self._resolved, overrides=overrides, ceiling=self._ceiling)

    def _program(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "",
        collect: Sequence[str] = (),
        context: CallContext | None = None,
        why: str = "",
        tty: bool = False,
        is_single: bool = False,
        overrides: Mapping[str, Any],
    ) -> Job:
        from sandbox import prepare

        _check_program(argv, env or {}, cwd, collect)
        resolved = self._resolve(overrides) if overrides else self._resolved
        context = context or current_context()
        spec = CallSpec(
            kind="program",
            argv=tuple(argv),
            tool=os.path.basename(argv[0]),
            cwd=cwd,
            tty=tty,
            is_single=is_single,
            collect=tuple(collect),
            workspace=prepare.workspace(resolved.manifest),
            **_context_fields(replace(context, why=why) if why else context),
        )
        data = input.encode() if isinstance(input, str) else input
        return Job(spec, resolved, dict(env or {}), input=data)

    def _function(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], context: CallContext | None
    ) -> Job:
        from sandbox import prepare
        from sandbox.codec import as_function, encode_call, granted_sys_path, return_annotation

        func = as_function(func)
        manifest = self._resolved.manifest
        granted = granted_sys_path(prepare.granted_directories(manifest))
        encoded = encode_call(func, args, kwargs, importable=_importable(tuple(granted)))
        spec = CallSpec(
            kind="function",
            tool=func.__qualname__,
            workspace=prepare.workspace(manifest),
            preload=_preload(func, tuple(granted)),
            **prepare.function_fields(encoded, capture_arguments="args" in manifest.audit.capture),
            **_context_fields(context or current_context()),
        )
        request = encoded.request(sys_path=[prepare.SITE, *granted])
        return Job(spec, self._resolved, {}, request=request, annotation=return_annotation(func))

    def _decide(self, job: Job, facts: HostFacts) -> tuple[LaunchPlan, tuple[str, dict[str, Any]]]:
        """The plan, and the part of it that is common to all calls of its kind with a name for that."""
        from sandbox import prepare
        from sandbox.planner import decide

        spec = job.spec
        key = self._plan_key(job, facts)
        cached = self._plans.get(key) if key is not None else None
        if cached is None or cached[0] is not facts:
            around = prepare.surroundings(job.resolved, spec, self._state, job.env)
            plan = decide(job.resolved.manifest, spec, facts, around)
            cached = (facts, plan, _common(plan))
            if key is not None:
                if len(self._plans) > PLANS_MAX:
                    self._plans.clear()
                self._plans[key] = cached
        plan = cached[1]
        return plan if plan.argv == spec.argv else replace(plan, argv=spec.argv), cached[2]

    def _plan_key(self, job: Job, facts: HostFacts) -> Any:
        """What makes two calls' plans the same but for argv; None where the host's files decide, each time anew."""
        from sandbox import prepare

        manifest, spec = job.resolved.manifest, job.spec
        if spec.tty or manifest.network.extra_roots or prepare.path_facts(manifest):
            return None
        caller_env = prepare.allowed_environment(manifest, os.environ)
        env = (tuple(sorted(caller_env.items())), tuple(sorted(job.env.items())))
        kind = (spec.kind, spec.argv[0], spec.cwd, spec.workspace, spec.preload, spec.is_single)
        return (job.resolved.digest, id(facts), kind, env, prepare.engine(manifest))

    def _live_link(self) -> Link:
        if self._link is None:
            self._link = supervisor_link.shared(self._state)
        return self._link

    def _submit(self, job: Job, fds: Mapping[str, int]) -> Pending:
        """Hand the call over when it is its turn."""
        return self._hand_over(job, fds, self._live_link().slots.wait())

    def _hand_over(self, job: Job, fds: Mapping[str, int], ticket: Ticket) -> Pending:
        """Hand the call over with its turn taken, which goes with what is returned."""
        try:
            return self._ask(job, fds, ticket)
        except BaseException:
            ticket.release()
            raise

    def _ask(self, job: Job, fds: Mapping[str, int], ticket: Ticket) -> Pending:
        """Ask for the call; once more when the supervisor died without having heard of it."""
        try:
            return self._ask_once(job, fds, ticket)
        except NotHandedOver:
            return self._ask_once(job, fds, ticket)

    def _ask_once(self, job: Job, fds: Mapping[str, int], ticket: Ticket) -> Pending:
        """Ask for the call. A refusal gets its record first, then it is raised with it."""
        from sandbox import prepare

        link = self._live_link()
        # A supervisor that died is started anew here, before anything is left out that it has not had.
        facts = link.facts()
        ask: dict[str, Any] = {
            "call": prepare.call_data(job.spec),
            "principal": prepare_places.principal(os.getpid()),
            "durability": job.resolved.manifest.audit.durability,
        }
        policy = functools.partial(prepare.policy, job.resolved)
        link.include(ask, "policy", f"{job.resolved.profile} {job.resolved.digest}", policy)
        try:
            plan, common = self._decide(job, facts)
            ask |= {"argv": plan.argv, "env": dict(plan.env), "cwd": plan.cwd}
            link.include(ask, "plan", common[0], lambda: common[1])
        except Unenforceable as refusal:
            ask["refused"] = {"fault": "host", "message": refusal.message}
            with link.submit(ask, None, {}, ticket) as pending:
                refusal.record = Record.of_line(pending.take()["sections"]["record"])
            raise
        from sandbox import prepare_secrets

        secrets = prepare_secrets.values(job.resolved.manifest, self._secret_values)
        # What is large is not carried through the supervisor: it passes the file on.
        is_large = job.request is not None and len(job.request) > REQUEST_INLINE_MAX_BYTES
        request = job.request if is_large else None
        with _memfds(request=request, stdin=job.input, secrets=secrets) as data_fds:
            return link.submit(ask, None if is_large else job.request, {**data_fds, **fds}, ticket)

    def _wait(self, job: Job) -> Outcome:
        with self._submit(job, {}) as pending:
            message = pending.take()
        return outcome_of(job, message)

    async def _await(self, job: Job) -> Outcome:
        import asyncio

        link = self._live_link()
        ticket = await _turn(link.slots)
        if link.is_started:
            pending = self._hand_over(job, {}, ticket)
        else:
            pending = await asyncio.to_thread(self._hand_over, job, {}, ticket)
        with pending:
            message = await _readable(pending)
        return outcome_of(job, message)


PLANS_MAX = 256
REQUEST_INLINE_MAX_BYTES = 16 * 1024


def _common(plan: LaunchPlan) -> tuple[str, dict[str, Any]]:
    """What calls of one kind share, and a name for it: the plan without argv, env and cwd."""
    data = replace(plan, argv=(), env={}, cwd="").to_json()
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest(), data


_RUN_OPTIONS = frozenset(("input", "env", "cwd", "collect", "context", "why"))


def _context_fields(context: CallContext) -> dict[str, Any]:
    return {name: getattr(context, name) for name in context.__slots__}


@functools.lru_cache(maxsize=64)
def _importable(granted: tuple[str, ...]) -> Callable[[str], bool]:
    from sandbox import prepare
    from sandbox.codec import importable_under

    return importable_under([*prepare.interpreter().roots, *granted])


@functools.lru_cache(maxsize=1024)
def _preload(func: Callable[..., Any], granted: tuple[str, ...]) -> tuple[str, ...]:
    from sandbox import prepare

    return prepare.preload_modules(func, _importable(granted))


def _check_program(argv: Sequence[str], env: Mapping[str, str], cwd: str, collect: Sequence[str]) -> None:
    """Refuse what no program can be started with. Raises ManifestError; nothing has run then."""
    if isinstance(argv, str | bytes) or not argv or not argv[0] or not all(map(_is_text, argv)):
        raise ManifestError("the command is a list of strings, the program first", where="argv")
    for name, value in env.items():
        if not _is_text(name) or not name or "=" in name or not _is_text(value):
            raise ManifestError(f"the variable {name!r} cannot be passed: no NUL, and no '=' in its name", where="env")
    if not _is_text(cwd) or (cwd and not cwd.startswith("/")):
        raise ManifestError(f"{cwd!r} is not an absolute path inside, such as /workspace/sub", where="cwd")
    if collect:
        from sandbox.workspace.collect import parse_pattern

        for pattern in collect:
            parse_pattern(pattern)


def _is_text(text: object) -> bool:
    """What the kernel can be given as a C string."""
    return isinstance(text, str) and "\0" not in text


class _memfds:  # noqa: N801 - a context manager used like a function
    """Sealed memory files for a call's input, closed here once they have been sent."""

    def __init__(self, **contents: bytes | None) -> None:
        self._fds: dict[str, int] = {}
        for name, data in contents.items():
            if data is not None:
                self._fds[name] = wire.read_only(wire.memfd(name, data))

    def __enter__(self) -> dict[str, int]:
        return self._fds

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds.values():
            os.close(fd)


async def _turn(slots: Slots) -> Ticket:
    """Take a slot without blocking the event loop."""
    import asyncio

    loop = asyncio.get_running_loop()
    ours = asyncio.Event()

    def when_ours() -> None:
        loop.call_soon_threadsafe(ours.set)

    if not slots.take(when_ours):
        try:
            await ours.wait()
        except BaseException:
            slots.forget(when_ours)
            raise
    return Ticket(slots)


async def _readable(pending: Pending) -> dict[str, Any]:
    import asyncio

    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    loop.add_reader(pending.reply, event.set)
    try:
        await event.wait()
    finally:
        loop.remove_reader(pending.reply)
    return pending.take()


def outcome_of(job: Job, message: Mapping[str, Any]) -> Outcome:
    """As `program_outcome`, with what a function returned."""
    kind, reply = message["ending"]["kind"], message["sections"].get("result", b"")
    if job.request is None or kind not in ("ok", "tool_error") or (not reply and kind != "ok"):
        return program_outcome(message)
    from sandbox.codec import decode_reply

    try:
        return program_outcome(message, value=decode_reply(reply, job.annotation))
    except ToolFailed as error:
        # The ending stays what the processes did; the function's own failure is the tool's.
        outcome = program_outcome(message)
        ending = replace(outcome.ending, kind="tool_error", error_type=error.type_name, message=error.message)
        failed = replace(outcome, ending=ending, error=error)
        error.record, error.outcome = outcome.record, failed
        return failed


class Stream:
    """The output of a running program, piece by piece. Use it in a `with`; leaving early ends the call."""

    def __init__(self, box: Sandbox, job: Job) -> None:
        self._job = job
        self._reads: dict[int, str] = {}
        writes: dict[str, int] = {}
        for name in ("stdout", "stderr"):
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            self._reads[read_end] = name
            writes[f"{name}_to"] = write_end
        try:
            self._pending = box._submit(job, writes)
        except BaseException:
            self._close_reads()
            raise
        finally:
            for fd in writes.values():
                os.close(fd)
        self._outcome: Outcome | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pending.close()
        self._close_reads()

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        with selectors.DefaultSelector() as selector:
            for fd in self._reads:
                selector.register(fd, selectors.EVENT_READ)
            while self._reads:
                for key, _ in selector.select():
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        yield self._reads[key.fd], data
                        continue
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    del self._reads[key.fd]

    def signal(self, number: int) -> None:
        """Send a signal to the tool's process group."""
        self._pending.signal(number)

    @property
    def outcome(self) -> Outcome:
        """How it ended; waits for the end. Output that has not been iterated over is dropped."""
        if self._outcome is None:
            self._close_reads()
            self._outcome = outcome_of(self._job, self._pending.take())
        return self._outcome

    def _close_reads(self) -> None:
        for fd in self._reads:
            os.close(fd)
        self._reads.clear()


class _ToolBoxes:
    """The sandboxes of decorated functions: one per decorator, made on its first call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Keyed by the identity of the decorator's own overrides, which the entry keeps alive.
        self._boxes: dict[int, tuple[dict[str, Any], Sandbox]] = {}

    def get(self, source: tuple[Source, dict[str, Any]]) -> Sandbox:
        profile, overrides = source
        with self._lock:
            entry = self._boxes.get(id(overrides))
            if entry is None:
                entry = self._boxes[id(overrides)] = (overrides, Sandbox(profile, **overrides))
            return entry[1]


_TOOL_BOXES = _ToolBoxes()


def run_function(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    resolved_source: tuple[Source, dict[str, Any]],
    context: CallContext,
) -> Outcome:
    """Call `func` in a jail and wait. Used by `@sandboxed`; `resolved_source` is its profile and overrides."""
    box = _TOOL_BOXES.get(resolved_source)
    return box._wait(box._function(func, args, kwargs, context))


async def arun_function(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    resolved_source: tuple[Source, dict[str, Any]],
    context: CallContext,
) -> Outcome:
    """As `run_function`, on an event loop."""
    box = _TOOL_BOXES.get(resolved_source)
    return await box._await(box._function(func, args, kwargs, context))
