"""A function call as bytes for the jail, and the jail's answer as a value.

Into the jail goes a pickle, because the caller may run any code inside anyway: the function by reference when its
module can be imported inside, by value (cloudpickle) when not, the arguments in any picklable form. Out of it comes
bounded typed data (`sandbox.reply`), checked against the function's return annotation (`sandbox.rebuild`); nothing
that comes out is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import io
import json
import operator
import os
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from typing import Any, Literal

from sandbox.errors import ToolFailed
from sandbox.rebuild import Mismatch, rebuild, return_annotation
from sandbox.reply import LIMITS, CodecError, ToolError, parse

__all__ = [
    "CodecError",
    "EncodedCall",
    "cloudpickle_directory",
    "decode_reply",
    "encode_call",
    "granted_sys_path",
    "importable_under",
    "return_annotation",
    "sandboxed_body",
]

# Where `@sandboxed` leaves its own description of the function (`func`, `wrapper`).
MARK = "__sandboxed__"
_OURS = "sandbox.tool"
_WRAPPERS_MAX = 16
# The request brings cloudpickle along; `__main__` goes by value without being asked.
_ALWAYS_THERE = sys.stdlib_module_names | {"cloudpickle", "__main__"}
# cloudpickle knows "by value" only as a process-wide set of modules; it is changed and restored under this lock.
_BY_VALUE_LOCK = threading.RLock()


@dataclass(frozen=True, slots=True)
class EncodedCall:
    """One call, ready to be sent. `payload` is the pickle, `request` the bytes that the runner reads.

    `arguments_json`: the arguments by parameter name as canonical JSON, empty when they are not JSON-like.
    """

    payload: bytes
    by: Literal["reference", "value"]
    module: str
    qualname: str
    unwrap: int
    is_async: bool
    source_sha256: str
    arguments_sha256: str
    arguments_json: bytes = b""

    def request(self, sys_path: Iterable[str] = (), limits: Mapping[str, int] = LIMITS) -> bytes:
        """Return the bytes for the request descriptor. `sys_path`: directories to append inside."""
        header = {
            "by": self.by,
            "module": self.module,
            "qualname": self.qualname,
            "unwrap": self.unwrap,
            "async": self.is_async,
            "sys_path": list(sys_path),
            "limits": dict(limits),
        }
        return json.dumps(header, separators=(",", ":")).encode() + b"\n" + self.payload


def encode_call(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    importable: Callable[[str], bool],
) -> EncodedCall:
    """Encode a call of a plain Python function.

    `importable(module_name)` says whether that module can be imported inside. Raises TypeError naming the argument
    (or the function) that cannot be pickled.
    """
    func = sandboxed_body(func) or func
    importable = _without_ourselves(func, importable)
    unwrap = _reference(func, importable)
    named = _named_arguments(func, args, kwargs)
    if unwrap is None:
        payload = _dumps((func, args, dict(kwargs)), importable, lambda: _culprits(func, named))
    else:
        payload = _dumps((args, dict(kwargs)), importable, lambda: _culprits(None, named))
    canonical = _canonical(named)
    return EncodedCall(
        payload=payload,
        by="value" if unwrap is None else "reference",
        module=func.__module__ or "",
        qualname=func.__qualname__,
        unwrap=unwrap or 0,
        is_async=inspect.iscoroutinefunction(func),
        source_sha256=_source_sha256(func.__code__),
        arguments_sha256=_sha256(canonical or payload),
        arguments_json=canonical,
    )


def as_function(func: Any) -> Callable[..., Any]:
    """A plain function that does what `func` does: builtins, partials, bound methods and callable objects are none.

    Raises TypeError for what cannot be called.
    """
    if isinstance(func, types.FunctionType):
        return func
    if not callable(func):
        raise TypeError(f"a {type(func).__name__} cannot be called in a jail: give a function and its arguments")
    call: Callable[..., Any]
    if inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None)):  # noqa: B004

        async def call(*args: Any, **kwargs: Any) -> Any:
            return await func(*args, **kwargs)
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            return func(*args, **kwargs)

    call.__module__ = getattr(func, "__module__", None) or type(func).__module__
    call.__name__ = getattr(func, "__name__", type(func).__name__)
    call.__qualname__ = getattr(func, "__qualname__", type(func).__qualname__)
    return call


def decode_reply(data: bytes, annotation: Any = Any, *, limits: Mapping[str, int] = LIMITS) -> Any:
    """Return the value in a jail's reply, as `annotation` declares it (see `return_annotation`).

    Raises ToolFailed for the tool's exception, for a result that could not leave or does not fit the annotation, and
    its subclass CodecError for bytes that are no reply.
    """
    parsed = parse(data, limits)
    if isinstance(parsed, ToolError):
        raise _tool_failed(parsed)
    try:
        return rebuild(parsed.value, annotation, has_objects=parsed.has_objects)
    except Mismatch as mismatch:
        raise ToolFailed(
            f"the tool's result does not fit its return annotation: {mismatch}",
            type_name="ResultMismatch",
            hint="correct the annotation; '-> Any' takes plain data unchecked",
        ) from mismatch
    except RecursionError as error:
        raise CodecError("the caller's stack is too deep to rebuild it") from error


def sandboxed_body(func: Any) -> Any:
    """The function that `@sandboxed` wraps in `func`, or None when `func` is no such wrapper.

    functools.wraps copies attributes: another decorator's wrapper above ours has our mark too, but is not ours.
    """
    mark = getattr(func, MARK, None)
    return mark.func if mark is not None and mark.wrapper is func else None


def importable_under(roots: Iterable[str]) -> Callable[[str], bool]:
    """Return the predicate for `encode_call`: the loaded module's file lies under one of `roots`, or it has none.

    `roots` are directories that the jail sees *and* has on its `sys.path` (or the standard library's).
    """
    prefixes = tuple(os.path.realpath(root).rstrip("/") + "/" for root in roots)

    known: dict[str, bool] = {}

    def importable(name: str) -> bool:
        if name not in known:
            module = sys.modules.get(name)
            if module is None or name in ("__main__", "__mp_main__"):
                # Not remembered: it may be loaded before the next call.
                return False
            known[name] = _lies_under(module, prefixes)
        return known[name]

    return importable


def granted_sys_path(grants: Iterable[str]) -> list[str]:
    """The entries of our `sys.path` that lie under `grants`: what makes a granted directory's modules importable.

    For `EncodedCall.request` and, as roots, for `importable_under`.
    """
    prefixes = tuple(os.path.realpath(grant).rstrip("/") + "/" for grant in grants)
    if not prefixes:
        return []
    entries = (os.path.realpath(entry or ".") for entry in sys.path)
    return list(dict.fromkeys(entry for entry in entries if (entry + "/").startswith(prefixes)))


def _lies_under(module: types.ModuleType, prefixes: tuple[str, ...]) -> bool:
    spec = module.__spec__
    if spec is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    places = [spec.origin] if spec.has_location and spec.origin else list(spec.submodule_search_locations or ())
    return bool(places) and all(os.path.realpath(place).startswith(prefixes) for place in places)


def cloudpickle_directory() -> str:
    """The directory that has to be on `sys.path` inside for a function that goes by value."""
    import cloudpickle

    return os.path.dirname(os.path.dirname(os.path.abspath(str(cloudpickle.__file__))))


def _without_ourselves(func: Any, importable: Callable[[str], bool]) -> Callable[[str], bool]:
    """A module with a decorated function imports us; where we cannot be imported inside, neither can it."""
    if importable("sandbox") or not hasattr(_at(func.__module__, func.__qualname__), MARK):
        return importable
    return lambda name: name != func.__module__ and importable(name)


def _at(module_name: str | None, qualname: str) -> Any:
    """What stands under that name now, or None."""
    found: Any = sys.modules.get(module_name or "")
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _reference(func: Any, importable: Callable[[str], bool]) -> int | None:
    """How many `__wrapped__` lead from the function's name in its module to `func`; None: not reachable by name.

    A framework's decorator on top of ours leaves its own object under that name, often without `__wrapped__`.
    """
    if not func.__module__ or "<locals>" in func.__qualname__ or not importable(func.__module__):
        return None
    found = _at(func.__module__, func.__qualname__)
    for hops in range(_WRAPPERS_MAX):
        if found is func:
            return hops
        found = getattr(found, "__wrapped__", None)
    return None


@functools.cache
def _pickler_class() -> Any:
    """cloudpickle's pickler, with our rule for what goes by value. Made on first use: importing it takes 10 ms."""
    import cloudpickle

    helpers = cloudpickle.Pickler.__module__

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no type information
        importable: Callable[[str], bool]
        registered: list[types.ModuleType]

        def reducer_override(self, obj: Any) -> Any:
            if type(obj) is types.FunctionType and obj.__module__ == helpers:
                # What a function by value is put together with inside, where cloudpickle is: it goes by its name.
                return NotImplemented
            owner = obj.__self__ if type(obj) is types.MethodType else obj
            if type(owner).__module__ == _OURS:
                # What the decorator hung on a function is of no use inside, where the function is a plain one.
                return types.SimpleNamespace, ()
            if isinstance(obj, types.FunctionType):
                body = sandboxed_body(obj)
                if body is not None:
                    # A sandboxed function that the body calls runs plainly inside, so its body alone travels.
                    # getitem([x], 0) is x in words of the standard library, which any interpreter can unpickle.
                    return operator.getitem, ([body], 0)
            if isinstance(obj, types.FunctionType | type):
                self._by_value_unless_importable(getattr(obj, "__module__", None))
            elif isinstance(obj, types.ModuleType):
                self._by_value_unless_importable(obj.__name__)
            return super().reducer_override(obj)

        def _by_value_unless_importable(self, name: object) -> None:
            if not isinstance(name, str) or name.partition(".")[0] in _ALWAYS_THERE or self.importable(name):
                return
            module = sys.modules.get(name)
            if str(getattr(module, "__file__", "")).endswith(tuple(EXTENSION_SUFFIXES)):
                # Machine code does not travel by value; the name is what can be sent, and its absence is reported.
                return
            if isinstance(module, types.ModuleType) and name not in cloudpickle.list_registry_pickle_by_value():
                cloudpickle.register_pickle_by_value(module)
                self.registered.append(module)

    return Pickler


def _dumps(obj: Any, importable: Callable[[str], bool], culprits: Callable[[], list[tuple[str, Any]]]) -> bytes:
    """Pickle; any error of a `__reduce__` (they may raise anything) becomes a TypeError naming the first culprit."""
    try:
        return _pickled(obj, importable)
    except Exception as error:
        for name, part in culprits():
            try:
                _pickled(part, importable)
            except Exception as inner:  # noqa: BLE001 - as above
                reason = f"{type(inner).__name__}: {inner}"
                raise TypeError(f"{name} cannot be sent into the jail: {reason}") from error
        raise TypeError(f"the call cannot be sent into the jail: {type(error).__name__}: {error}") from error


def _pickled(obj: Any, importable: Callable[[str], bool]) -> bytes:
    import cloudpickle

    file = io.BytesIO()
    pickler = _pickler_class()(file, pickle.HIGHEST_PROTOCOL)
    pickler.importable = importable
    pickler.registered = []
    with _BY_VALUE_LOCK:
        try:
            pickler.dump(obj)
        finally:
            for module in pickler.registered:
                cloudpickle.unregister_pickle_by_value(module)
    return file.getvalue()


def _culprits(func: Any, named: Mapping[str, Any]) -> list[tuple[str, Any]]:
    parts = [(f"argument {name!r}", value) for name, value in named.items()]
    return parts if func is None else [*parts, (f"the function {func.__qualname__!r} itself", func)]


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by parameter name, so that f(1) and f(a=1) have one digest."""
    code = func.__code__
    names = code.co_varnames[: code.co_argcount]
    named = dict(zip(names, args, strict=False))
    for index, value in enumerate(args[len(names) :]):
        named[f"*{index}"] = value
    return {**named, **kwargs}


def _canonical(named: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(named, sort_keys=True, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError):
        return b""


@functools.lru_cache(maxsize=1024)
def _source_sha256(code: types.CodeType) -> str:
    """Digest of the source text, or of the compiled code where there is no source to read."""
    try:
        return _sha256(inspect.getsource(code).encode("utf-8", "surrogatepass"))
    except (OSError, TypeError, IndexError, SyntaxError):
        return _sha256(repr(_code_parts(code)).encode("utf-8", "backslashreplace"))


def _code_parts(code: types.CodeType) -> tuple[Any, ...]:
    """What the code does, without addresses: equal in every process of one Python version."""
    constants = tuple(
        _code_parts(item)
        if isinstance(item, types.CodeType)
        else sorted(map(repr, item))
        if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    )
    return code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _tool_failed(error: ToolError) -> ToolFailed:
    message = f"{error.type_name}: {error.message}" if error.message else error.type_name
    hint = ""
    if error.phase == "load":
        message = f"the function could not be loaded inside: {message}"
    if error.missing_module:
        hint = _missing_hint(error.missing_module)
    return ToolFailed(message, type_name=error.type_name, traceback_text=error.traceback_text, hint=hint)


def _missing_hint(name: str) -> str:
    # The name comes from the jail: it is looked up among what is loaded already and never imported.
    module = sys.modules.get(name.partition(".")[0])
    file = getattr(module, "__file__", None)
    if not file:
        return f"the module {name!r} is not visible inside: grant read of the directory it lies in"
    directory = os.path.dirname(file)
    if os.path.basename(file).startswith("__init__."):
        directory = os.path.dirname(directory)
    return f"the module {name!r} is not visible inside: grant it with read=[{directory!r}]"
