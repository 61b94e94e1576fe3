"""Runs the jail's runner as a plain program, without a jail: what the codec's tests need of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sandbox
from sandbox import codec

RUNNER = str(Path(sandbox.__file__).parent / "_jail" / "runner.py")
SITE = codec.cloudpickle_directory()


@dataclass(frozen=True)
class Ran:
    exit_code: int
    reply: bytes
    stdout: bytes
    stderr: bytes

    def value(self, annotation: Any = Any) -> Any:
        return codec.decode_reply(self.reply, annotation)


def installed(name: str) -> bool:
    """The predicate of a jail that sees the standard library and site-packages, but neither us nor the tests."""
    if name.partition(".")[0] in ("sandbox", "tests"):
        return False
    return codec.importable_under([SITE, os.path.dirname(os.__file__)])(name)


def run_request(request: bytes, *, python: tuple[str, ...] = (), runner: str = RUNNER) -> Ran:
    request_read, request_write = os.pipe()
    result_read, result_write = os.pipe()
    argv = [*(python or (sys.executable, "-I")), runner, str(request_read), str(result_write)]
    with subprocess.Popen(
        argv, pass_fds=(request_read, result_write), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        os.close(request_read)
        os.close(result_write)
        with open(request_write, "wb") as file:
            file.write(request)
        with open(result_read, "rb") as file:
            reply = file.read()
        stdout, stderr = process.communicate(timeout=60)
    return Ran(process.returncode, reply, stdout, stderr)


def run_call(
    func: Callable[..., Any], *args: Any, _importable: Callable[[str], bool] = installed, **kwargs: Any
) -> Ran:
    encoded = codec.encode_call(func, args, kwargs, importable=_importable)
    return run_request(encoded.request(sys_path=[SITE]))


def call(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call through the runner and return the value as the function's annotation declares it."""
    return run_call(func, *args, **kwargs).value(codec.return_annotation(func))
