"""Runs one function inside the jail: `python -I runner.py REQUEST_FD RESULT_FD`.

Reads a request (a JSON header line, then a pickle made by the caller), calls the function, writes one container
(`encode`) to the result descriptor. Standard library only; `encode.py` lies beside it. Pickle is read here
because the request comes from the caller, who may run any code inside anyway; nothing pickled ever goes out.

Exit status: 0 a value was written, 1 an error was written (the tool's exception, or a value that cannot leave),
2 the request or the result descriptor was unusable.

Header: `by` ("reference": the pickle is (args, kwargs); "value": (function, args, kwargs)), `module`, `qualname`,
`unwrap` (how many `__wrapped__` lead from that name to the body), `async`, `sys_path`, `limits`.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

if TYPE_CHECKING or __package__:
    from sandbox._jail import encode
else:
    # -I keeps our directory off sys.path. It is there for this one import only: a tool that has an `encode`
    # module of its own must find that one.
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import encode

    del sys.path[0]
    sys.modules["_sandbox_encode"] = sys.modules.pop("encode")

# The decorator asks for this attribute and runs the plain body where it is set. It is neither an environment
# variable nor a file, so that nothing a caller inherits can switch a sandbox off.
INSIDE = "_toolcall_sandbox_inside"


def run_call(request: bytes) -> bytes:
    """Run the call that `request` (bytes) describes and return the reply's bytes. Never raises."""
    setattr(sys, INSIDE, True)
    limits = encode.DEFAULT_LIMITS
    phase = "load"
    try:
        header, payload = _read_request(request)
        limits = header.get("limits") or limits
        function, args, kwargs = _load(header, payload)
        del payload
        phase = "call"
        result = _call(header, function, args, kwargs)
        phase = "encode"
        return encode.encode_value(result, limits)
    except encode.Refused as refused:
        return encode.pack({"error": {"type_name": "UnsupportedResult", "message": str(refused), "phase": phase}})
    except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt of the tool are its ending too
        return _report(error, phase)


def is_value(reply: bytes) -> bool:
    """Whether a reply of `run_call` carries a value, so that the exit status can say so."""
    return not reply.startswith(b'{"error":', 8)


def _report(error: BaseException, phase: str) -> bytes:
    try:
        return encode.encode_error(error, phase)
    except BaseException as inner:  # noqa: BLE001 - out of memory or stack while reporting: say at least that much
        name = type(error).__name__.encode("ascii", "replace").decode()
        text = f"{name} (and {type(inner).__name__} while describing it)"
        return encode.pack({"error": {"type_name": name, "message": text, "phase": phase}})


def _read_request(request: bytes) -> tuple[dict[str, Any], bytes]:
    import json

    line, _, payload = request.partition(b"\n")
    header = json.loads(line)
    for path in header.get("sys_path", ()):
        if path not in sys.path:
            sys.path.append(path)
    return header, payload


def _load(header: dict[str, Any], payload: bytes) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    import pickle

    if header["by"] == "value":
        function, args, kwargs = pickle.loads(payload)  # noqa: S301 - inbound only, see the module's docstring
        _adopt(function)
        return function, args, kwargs
    function = _resolve(header["module"], header["qualname"], header.get("unwrap", 0))
    args, kwargs = pickle.loads(payload)  # noqa: S301
    return function, args, kwargs


def _resolve(module_name: str, qualname: str, unwrap: int) -> Any:
    import importlib

    found: Any = importlib.import_module(module_name)
    for part in qualname.split("."):
        found = getattr(found, part)
    for _ in range(unwrap):
        found = found.__wrapped__
    return found


def _adopt(function: Any) -> None:
    """Let pickle find a function that came by value, and what it refers to, by name.

    Its module does not exist in here, yet a multiprocessing pool inside the tool pickles its workers' functions
    as `module.name`. A module made of the function's own globals makes that work for forked workers.
    """
    name = getattr(function, "__module__", None)
    if not isinstance(name, str) or (name in sys.modules and name != "__main__"):
        return
    module = type(sys)(name)
    module.__dict__.update(function.__globals__)
    module.__dict__.setdefault(function.__name__, function)
    sys.modules[name] = module


def _call(header: dict[str, Any], function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not header.get("async"):
        return function(*args, **kwargs)
    import asyncio

    return asyncio.run(function(*args, **kwargs))


def _read_all(fd: int) -> bytes:
    with open(fd, "rb") as file:
        return file.read()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _flush() -> None:
    """Flush what the tool printed; it may have closed or replaced the streams, and its reply matters more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # A closed or broken stream holds nothing that could still be delivered.
            pass


def main(argv: list[str]) -> int:
    request_fd, result_fd = int(argv[1]), int(argv[2])
    try:
        os.set_inheritable(result_fd, False)
        request = _read_all(request_fd)
    except OSError as error:
        print(f"sandbox runner: cannot use the descriptors {argv[1:]}: {error}", file=sys.stderr)
        return 2
    return finish(request, result_fd)


def finish(request: bytes, result_fd: int) -> int:
    """Run the call and write its one reply; returns the exit status."""
    pid = os.getpid()
    reply = run_call(request)
    _flush()
    if os.getpid() != pid:
        # The tool forked and its child returned from the function too: one call has one reply.
        os._exit(0 if is_value(reply) else 1)
    try:
        _write_all(result_fd, reply)
        os.close(result_fd)
    except OSError as error:
        print(f"sandbox runner: cannot write the result: {error}", file=sys.stderr)
        return 2
    return 0 if is_value(reply) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
