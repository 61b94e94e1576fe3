"""`@sandboxed`: a plain function whose body runs in a jail.

The result is a function, never a callable object, because agent frameworks refuse or mishandle those; sync stays
sync and async stays async. A wrong keyword or a function that cannot be sandboxed is an error at decoration; files
and paths are looked at on first use (`.manifest` or a call), so that importing a module of tools stays cheap and
needs no profile to be there. Inside the jail the decorated name is the plain function: a call from within stays in
the same jail, under the same manifest.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, overload

from sandbox.context import NAMES, CallContext, current_context
from sandbox.errors import ManifestError, SandboxError

if TYPE_CHECKING:
    from sandbox.manifest import Manifest
    from sandbox.outcome import Outcome

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

# Set by the runner in its own process: see `sandbox/_jail/runner.py`, INSIDE.
_INSIDE = "_toolcall_sandbox_inside"


class Sandboxed(Protocol[P, R]):
    """What `@sandboxed` returns: the function, with these attributes.

    `call`: run and return an `Outcome` for whatever the tool can cause; `acall`: the same, awaited, for a sync body
    too. Both take `why`, `agent`, `session`, `trace_id` and `parent` (a record id) beside the tool's own arguments; a
    parameter of the tool with such a name is the tool's, then use `call_context`. `manifest`: what a call may do,
    resolved on first use. `last_record`: the record of the call that ended last, in any thread.
    """

    __name__: str
    __wrapped__: Callable[..., Any]
    last_record: Any

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def call(self, *args: Any, **kwargs: Any) -> Outcome: ...
    def acall(self, *args: Any, **kwargs: Any) -> Awaitable[Outcome]: ...
    @property
    def manifest(self) -> Manifest: ...


@overload
def sandboxed(profile: Callable[P, R], /) -> Sandboxed[P, R]: ...
@overload
def sandboxed(
    profile: str | os.PathLike[str] | Mapping[str, Any] | Manifest = ..., **overrides: Any
) -> Callable[[Callable[P, R]], Sandboxed[P, R]]: ...
def sandboxed(profile: Any = "python", **overrides: Any) -> Any:
    """Run each call of a function in a single-use jail of its own.

    Args:
        profile: name of a profile, path of a profile file, a mapping or a `Manifest`.
        overrides: the manifest's keys under their flat names, over the profile: `memory="256MiB"`,
            `read=["./data"]`, `wall_time="10s"` (`sandbox profile schema` lists them). Beside them
            `secret_values`, as for `Sandbox`.

    Returns:
        A function of the same signature. Calling it returns the value. See `Sandboxed` for its attributes.

    Raises:
        ManifestError: an unknown keyword.
        TypeError: not a function that can be sandboxed: a generator, a method, a class, a callable object.

    A call raises ToolFailed for an exception of the body, LimitExceeded or CallTimeout, Denied, Revoked, CallLost;
    TypeError for arguments that do not fit; ManifestError, Unenforceable or LaunchError when nothing could run.
    """
    if isinstance(profile, types.FunctionType | staticmethod):
        return _decorate(profile, "python", {})
    if not isinstance(profile, str | os.PathLike | Mapping) and not hasattr(profile, "model_dump"):
        raise TypeError(f"sandboxed() takes a function or a profile, not {type(profile).__name__}")
    _check_overrides(overrides)
    return functools.partial(_decorate, profile=profile, overrides=overrides)


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    from sandbox.profile_fields import ALIASES, BY_KEY

    for name in overrides:
        if name == "secret_values":
            continue  # no setting of the manifest, but an argument of `Sandbox`
        if name in ALIASES or name in BY_KEY or "." in name:
            continue
        import difflib

        close = difflib.get_close_matches(name, ALIASES, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(sorted(ALIASES))}"
        raise ManifestError("unknown keyword", where=f"sandboxed({name}=...)", hint=hint)


def _decorate(func: Any, profile: Any, overrides: Mapping[str, Any]) -> Any:
    if isinstance(func, staticmethod):
        return staticmethod(_decorate(func.__func__, profile, overrides))
    _check_function(func)
    tool = _Tool(func, profile, overrides)
    wrapper = _async_wrapper(tool) if inspect.iscoroutinefunction(func) else _sync_wrapper(tool)
    tool.wrapper = wrapper
    attributes = {
        "__sandboxed__": tool,
        "call": tool.call,
        "acall": tool.acall,
        "manifest": _LazyManifest(tool),
        "last_record": None,
    }
    for name, value in attributes.items():
        setattr(wrapper, name, value)
    return wrapper


def _sync_wrapper(tool: _Tool) -> Any:
    @functools.wraps(tool.func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_inside():
            return tool.func(*args, **kwargs)
        return tool.run(args, kwargs, current_context()).unwrap()

    return wrapper


def _async_wrapper(tool: _Tool) -> Any:
    @functools.wraps(tool.func)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_inside():
            return await tool.func(*args, **kwargs)
        return (await tool.arun(args, kwargs, current_context())).unwrap()

    return wrapper


class _Tool:
    """A function with its profile; what the wrapper's attributes are made of."""

    def __init__(self, func: Any, profile: Any, overrides: Mapping[str, Any]) -> None:
        self.func = func
        self.profile = profile
        self.overrides = dict(overrides)
        self.wrapper: Any = None
        code = func.__code__
        # Its own parameters of these names are the tool's; `**kwargs` does not claim them.
        own = code.co_varnames[code.co_posonlyargcount : code.co_argcount + code.co_kwonlyargcount]
        self.context_names = tuple(name for name in NAMES if name not in own)

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        # What the function itself takes: a wrapper's advertised signature need not be what it accepts.
        if sys.version_info >= (3, 14):
            import annotationlib

            # Annotations may name what exists for type checkers only; their text will do here.
            return inspect.signature(self.func, follow_wrapped=False, annotation_format=annotationlib.Format.STRING)
        return inspect.signature(self.func, follow_wrapped=False)

    @functools.cached_property
    def manifest(self) -> Manifest:
        from sandbox.profiles import resolve

        settings = {name: value for name, value in self.overrides.items() if name != "secret_values"}
        manifest: Manifest = resolve(self.profile, overrides=settings).manifest
        return manifest

    def call(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """Run in a jail and return the `Outcome`; takes the call's context beside the tool's arguments."""
        context = self._take_context(kwargs)
        return self.run(args, kwargs, context)

    async def acall(self, /, *args: Any, **kwargs: Any) -> Outcome:
        """`call`, awaited: the event loop goes on meanwhile, also when the body is not async."""
        context = self._take_context(kwargs)
        return await self.arun(args, kwargs, context)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: CallContext) -> Outcome:
        self._check_call(args, kwargs)
        from sandbox import runtime

        source = (self.profile, self.overrides)
        try:
            outcome: Outcome = runtime.run_function(self.func, args, kwargs, resolved_source=source, context=context)
        except SandboxError as error:
            self._note(error)
            raise
        self._note(outcome)
        return outcome

    async def arun(self, args: tuple[Any, ...], kwargs: dict[str, Any], context: CallContext) -> Outcome:
        self._check_call(args, kwargs)
        from sandbox import runtime

        source = (self.profile, self.overrides)
        try:
            outcome: Outcome = await runtime.arun_function(
                self.func, args, kwargs, resolved_source=source, context=context
            )
        except SandboxError as error:
            self._note(error)
            raise
        self._note(outcome)
        return outcome

    def _take_context(self, kwargs: dict[str, Any]) -> CallContext:
        """Take the call's context out of `kwargs`, over what `call_context` has set."""
        given = {name: kwargs.pop(name) for name in self.context_names if name in kwargs}
        return current_context().updated(**given)

    def _check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_inside():
            raise SandboxError(f"{self.func.__qualname__}.call() is not there inside a jail", hint="call the function")
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            # Arguments that do not fit are the caller's mistake: no jail is started for them.
            raise TypeError(f"{self.func.__qualname__}() {error}") from None

    def _note(self, ended: Outcome | SandboxError) -> None:
        if ended.record is not None:
            self.wrapper.last_record = ended.record


class _LazyManifest:
    """Stands for the manifest and resolves it on first use: a function's attribute cannot be computed otherwise."""

    __slots__ = ("_tool",)

    def __init__(self, tool: _Tool) -> None:
        object.__setattr__(self, "_tool", tool)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tool.manifest, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tool.manifest, name, value)

    @property  # type: ignore[misc]  # isinstance(tool.manifest, Manifest) is to hold
    def __class__(self) -> type:
        return type(self._tool.manifest)

    def __eq__(self, other: object) -> bool:
        return bool(self._tool.manifest == (other._tool.manifest if type(other) is _LazyManifest else other))

    def __hash__(self) -> int:
        return hash(self._tool.manifest)

    def __repr__(self) -> str:
        return repr(self._tool.manifest)


def _is_inside() -> bool:
    """Whether this process is a jail's tool. An attribute that only the runner sets: nothing inherited can fake it."""
    return getattr(sys, _INSIDE, False) is True


def _check_function(func: Any) -> None:
    if not isinstance(func, types.FunctionType):
        kind = "a classmethod" if isinstance(func, classmethod) else f"a {type(func).__name__}"
        raise TypeError(f"sandboxed() takes a function written with def or lambda, not {kind}")
    name = func.__qualname__
    if getattr(getattr(func, "__sandboxed__", None), "wrapper", None) is func:
        raise TypeError(f"{name} is sandboxed already: give one profile with all it needs")
    if inspect.isgeneratorfunction(func) or inspect.isasyncgenfunction(func):
        raise TypeError(f"{name} is a generator: its frame cannot leave the jail; return a list instead")
    first = func.__code__.co_varnames[:1] if func.__code__.co_argcount else ()
    # The body is in a class, and not in a function inside a class's method.
    in_class = "." in name.rpartition("<locals>.")[2]
    if in_class and first in (("self",), ("cls",)):
        raise TypeError(
            f"{name} is a method: its object would be copied into the jail and every change to it lost; "
            "sandbox a function or a staticmethod that takes and returns data"
        )
