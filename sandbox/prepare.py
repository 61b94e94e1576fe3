"""What the caller gathers for a plan: where granted paths stand now, the interpreter's places, the environment.

This is the one place of the caller's side that looks at files; the planner itself looks at nothing.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import os
import site
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.audit.store import usual_state_dir
from sandbox.errors import ManifestError
from sandbox.manifest import Manifest
from sandbox.planner import PathFact, Surroundings
from sandbox.prepare_places import allowed_variables, shown_prefixes, terminal_size
from sandbox.prepare_secrets import extra_roots
from sandbox.profiles import Resolved
from sandbox.spec import CallSpec, Workspace

if TYPE_CHECKING:
    from sandbox.codec import EncodedCall

LIB = "/run/sandbox/lib"
SITE = "/run/sandbox/site"
REQUEST_FD = "3"
RESULT_FD = "4"
_JAIL_CODE = Path(__file__).parent / "_jail"


@dataclass(frozen=True, slots=True)
class Interpreter:
    """Where this interpreter and its packages live: `paths` (host, jail), `search` for PATH, `roots` of sys.path."""

    paths: tuple[tuple[str, str], ...]
    search: tuple[str, ...]
    roots: tuple[str, ...]


@functools.cache
def interpreter() -> Interpreter:
    """Of this process: what the jail shows read-only, so that `python3` inside is the caller's own."""
    paths, search = shown_prefixes()
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    roots = [*(sysconfig.get_path(name) for name in names), *site.getsitepackages()]
    return Interpreter(paths, search, tuple(dict.fromkeys(roots)))


@functools.cache
def own_code() -> tuple[str, ...]:
    """Real paths of what runs outside a jail: this interpreter's places and this package."""
    return tuple(dict.fromkeys((*(real for real, _ in interpreter().paths), os.path.realpath(Path(__file__).parent))))


def path_facts(manifest: Manifest) -> dict[str, PathFact]:
    """Device and inode of every granted host path, and of our own code, right now.

    Raises ManifestError for one that has gone since the profile was resolved.
    """
    filesystem = manifest.filesystem
    paths = [path for path in (*filesystem.read, *filesystem.write) if path.startswith("/")]
    if filesystem.workspace:
        paths.append(filesystem.workspace)
    writable = tuple(f"{path}/" for path in (*filesystem.write, filesystem.workspace) if path.startswith("/"))
    paths += [path for path in own_code() if path.startswith(writable)]
    return {path: _fact(path) for path in paths}


def granted_directories(manifest: Manifest) -> list[str]:
    """Host paths that are readable inside, the workspace among them."""
    filesystem = manifest.filesystem
    paths = [path for path in (*filesystem.read, *filesystem.write, filesystem.workspace) if path.startswith("/")]
    return list(dict.fromkeys(paths))


def _fact(path: str) -> PathFact:
    try:
        info = os.lstat(path)
    except OSError as error:
        raise ManifestError(f"{path}: {error.strerror}", where="filesystem") from error
    return PathFact(info.st_dev, info.st_ino)


def workspace(manifest: Manifest) -> Workspace:
    """The workspace that the manifest names."""
    filesystem = manifest.filesystem
    if not filesystem.workspace:
        return Workspace()
    mode = filesystem.workspace_mode
    return Workspace("rw" if mode == "private" else mode, filesystem.workspace, filesystem.workspace)


def allowed_environment(manifest: Manifest, source: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables that the manifest names; `NAME*` names all that begin so."""
    return allowed_variables(manifest.environment.allow, source)


def surroundings(resolved: Resolved, spec: CallSpec, state: Path, extra_env: Mapping[str, str]) -> Surroundings:
    """Everything `planner.decide` wants to know of the caller's side."""
    manifest = resolved.manifest
    python = interpreter()
    columns, rows = terminal_size() if spec.tty else (80, 24)
    runtime_files: tuple[tuple[str, str], ...] = ()
    if spec.kind == "function":
        runtime_files = function_files()
    return Surroundings(
        paths=path_facts(manifest),
        caller_env=allowed_environment(manifest, os.environ),
        extra_env=dict(extra_env),
        extra_roots=extra_roots(manifest),
        python_paths=python.paths,
        runtime_files=runtime_files,
        search_path=python.search,
        links=tuple(sorted(resolved.links.items())),
        # Where records are usually kept, too: those there are another supervisor's.
        hidden=tuple(dict.fromkeys(os.path.realpath(path) for path in (state, usual_state_dir()))),
        own_code=own_code(),
        engine=engine(manifest),
        terminal_rows=rows,
        terminal_columns=columns,
    )


def engine(manifest: Manifest) -> str:
    """Where the caller's container engine is asked for; empty for the usual place, or where none is needed."""
    return os.environ.get("DOCKER_HOST", "") if manifest.isolation.image else ""


@functools.cache
def function_files() -> tuple[tuple[str, str], ...]:
    """(host path, jail path) of the runner and of cloudpickle: all that a function call needs of ours inside."""
    code = os.path.realpath(_JAIL_CODE)
    from sandbox.codec import cloudpickle_directory

    pickle_dir = os.path.realpath(f"{cloudpickle_directory()}/cloudpickle")
    package = os.path.dirname(code)
    ours = tuple(
        (f"{package}/{name}", f"{LIB}/sandbox/{name}") for name in ("__init__.py", "errors.py", "_jail", "_linux")
    )
    return (*ours, (pickle_dir, f"{SITE}/cloudpickle"))


def function_fields(encoded: EncodedCall, *, capture_arguments: bool) -> dict[str, Any]:
    """What makes the spec of a program that of a function: the caller's interpreter runs it with our runner."""
    return {
        "argv": (sys.executable, "-I", f"{LIB}/sandbox/_jail/runner.py", REQUEST_FD, RESULT_FD),
        "module": encoded.module,
        "source_sha256": encoded.source_sha256,
        "arguments_sha256": encoded.arguments_sha256,
        "arguments": encoded.arguments_json.decode() if capture_arguments else None,
    }


def preload_modules(func: Callable[..., Any], importable: Callable[[str], bool]) -> tuple[str, ...]:
    """The modules that a template should import for `func`: its own, those it refers to and those it imports."""
    from sandbox.codec import sandboxed_body

    body = sandboxed_body(func) or func
    names = {"cloudpickle", body.__module__ or ""}
    pending = [body.__code__]
    while pending:
        code = pending.pop()
        pending.extend(const for const in code.co_consts if isinstance(const, types.CodeType))
        names.update(_imported(code))
        referred = (body.__globals__.get(name) for name in code.co_names)
        names.update(value.__name__ for value in referred if isinstance(value, types.ModuleType))
    return tuple(sorted(name for name in names if name == "cloudpickle" or (name and _can_preload(name, importable))))


def _imported(code: types.CodeType) -> Iterator[str]:
    return (item.argval for item in dis.get_instructions(code) if item.opname == "IMPORT_NAME")


def _can_preload(name: str, importable: Callable[[str], bool]) -> bool:
    """Whether it is there inside. A module that the function imports late may not be loaded here yet."""
    if name in sys.modules:
        return importable(name)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return False
    if spec is None or not spec.origin:
        return False
    roots = tuple(f"{os.path.realpath(root)}/" for root in interpreter().roots)
    return spec.origin in ("built-in", "frozen") or os.path.realpath(spec.origin).startswith(roots)


def policy(resolved: Resolved) -> dict[str, Any]:
    """What the record says about the manifest, and which files it came from."""
    return {
        "profile": resolved.profile,
        "manifest_sha256": resolved.digest,
        "manifest": resolved.manifest.model_dump(mode="json"),
        "sources": [list(source) for source in resolved.sources],
        "notes": list(resolved.notes),
    }


def call_data(spec: CallSpec) -> dict[str, Any]:
    """The call as plain data for the supervisor."""
    # Not dataclasses.asdict, which copies all that it passes on.
    data = {name: getattr(spec, name) for name in CallSpec.__slots__}
    data["workspace"] = {name: getattr(spec.workspace, name) for name in Workspace.__slots__}
    return data
