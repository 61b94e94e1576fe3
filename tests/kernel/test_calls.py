"""Functions called in jails: where they may come from, what comes back, and how their failures look."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import json
import math
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sandbox.runtime as runtime
from sandbox import CallTimeout, LimitExceeded, ManifestError, Sandbox, ToolFailed, Unenforceable, sandboxed
from sandbox.context import call_context
from tests.helpers.escape import TIME_FACTOR

pytestmark = [pytest.mark.needs("jail")]


@pytest.fixture(autouse=True)
def tools(state_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decorated functions keep their records with this session's, and give their supervisor back afterwards."""
    monkeypatch.setenv("SANDBOX_STATE", str(state_root))
    yield
    for _, made in runtime._TOOL_BOXES._boxes.values():
        made.close()
    runtime._TOOL_BOXES._boxes.clear()


@dataclass
class Point:
    x: int
    y: float


@sandboxed("python")
def add(a: int, b: int = 2) -> int:
    """Add."""
    return a + b


@sandboxed(wall_time=f"{30 * TIME_FACTOR}s")
async def add_later(a: int, b: int) -> int:
    await asyncio.sleep(0.01)
    return a + b


@sandboxed("python", wall_time=f"{2 * TIME_FACTOR}s")
def sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)


@sandboxed
def shift(point: Point, by: int) -> Point:
    return Point(point.x + by, point.y)


def helper(value: int) -> int:
    return value * 10


@sandboxed
def uses_module_level_names(value: int) -> dict[str, Any]:
    return {"value": helper(value), "pid": os.getpid()}


class CustomError(Exception):
    pass


@sandboxed
def fail(message: str) -> None:
    raise CustomError(message)


def test_a_decorated_function_gives_its_value() -> None:
    assert add(1) == 3
    assert add(1, b=5) == 6
    assert (add.__name__, add.__doc__) == ("add", "Add.")


def test_the_body_runs_in_another_process_and_not_here() -> None:
    seen = uses_module_level_names(4)
    assert seen["value"] == 40
    assert seen["pid"] < 10 != os.getpid()


def test_an_outcome_carries_value_record_and_context() -> None:
    done = add.call(1, 2, why="a sum", agent="tester")
    assert (done.value, done.unwrap(), done.ok) == (3, 3, True)
    assert (done.record.context.why, done.record.agent.name) == ("a sum", "tester")
    assert (done.record.tool.type, done.record.tool.name) == ("function", "add")
    assert done.record.tool.arguments_sha256.startswith("sha256:")
    with call_context(session="s1"):
        assert add.call(1).record.context.session == "s1"
    assert add.last_record.record_id != done.record.record_id


def test_async_functions_stay_async() -> None:
    async def main() -> tuple[list[int], Any]:
        values = await asyncio.gather(*(add_later(n, 1) for n in range(20)))
        return list(values), await add.acall(4, 5)

    values, outcome = asyncio.run(main())
    assert values == [n + 1 for n in range(20)]
    assert outcome.value == 9
    assert asyncio.run(add_later.acall(1, 2)).value == 3
    assert add_later.call(1, 2).value == 3


def test_threads_share_a_decorated_function() -> None:
    results: list[int] = []
    threads = [threading.Thread(target=lambda n=n: results.append(add(n))) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [n + 2 for n in range(16)]


def test_values_come_back_as_the_annotation_says() -> None:
    assert shift(Point(1, 2.5), 3) == Point(4, 2.5)
    with Sandbox("python") as box:
        many = {"list": [1, 2.5, None, True], "text": "ünï", "bytes": b"\0\xff", "nested": {"a": [{}]}}
        assert box.call(lambda value: value, many).value == many
        assert box.call(lambda: None).value is None
        assert box.call(lambda: ({1, 2}, (3, 4), 10**30)).value == ({1, 2}, (3, 4), 10**30)


def test_closures_lambdas_and_local_functions_cross() -> None:
    factor, seen = 7, []

    @sandboxed
    def times(value: int) -> int:
        seen.append(value)
        return value * factor

    def recursive(n: int) -> int:
        return 1 if n < 2 else n * recursive(n - 1)

    assert times(6) == 42
    assert seen == [], "what the body changes stays inside"
    with Sandbox("python") as box:
        assert box.call(recursive, 5).value == 120
        assert box.call(lambda *args, **kwargs: [args, kwargs], 1, b=2).value == [(1,), {"b": 2}]
        assert asyncio.run(box.acall(add_later.__wrapped__, 2, 3)).value == 5


class Counter:
    def __init__(self, start: int) -> None:
        self.start = start

    def __call__(self, by: int) -> int:
        return self.start + by

    async def later(self, by: int) -> int:
        return self.start + by


def test_builtins_partials_methods_and_callable_objects_can_be_called() -> None:
    with Sandbox("python") as box:
        assert box.call(math.sqrt, 16).value == 4.0
        assert box.call(functools.partial(divmod, 17), 5).value == (3, 2)
        assert box.call("a,b".split, ",").value == ["a", "b"]
        assert box.call(Counter(5), 2).value == 7
        assert asyncio.run(box.acall(Counter(5).later, 3)).value == 8
        assert box.call(math.sqrt, 16).record.tool.name == "sqrt"
        with pytest.raises(TypeError, match="str cannot be called"):
            box.call("not a function")  # type: ignore[arg-type]


@pytest.mark.needs("python:numpy")
def test_numpy_arrays_go_in_and_come_out() -> None:
    if not __import__("numpy").__file__.startswith((sys.prefix, "/usr/lib")):
        pytest.skip("needs python:numpy in the interpreter's own prefix")
    import numpy as np

    with Sandbox("data-science") as box:
        out = box.call(lambda a: {"sum": a.sum(), "twice": a * 2}, np.arange(12.0).reshape(3, 4)).value
    assert out["sum"] == 66.0
    assert (out["twice"] == np.arange(12.0).reshape(3, 4) * 2).all()


def test_an_exception_comes_back_as_tool_failed() -> None:
    with pytest.raises(ToolFailed) as caught:
        fail("it broke")
    error = caught.value
    assert error.type_name.endswith("CustomError")
    assert "it broke" in str(error)
    assert "raise CustomError(message)" in error.traceback_text or "in fail" in error.traceback_text
    assert (error.outcome.ending.kind, error.outcome.ending.fault) == ("tool_error", "tool")
    assert error.record.record_id == fail.last_record.record_id
    done = fail.call("again")
    assert not done.ok
    assert done.ending.error_type.endswith("CustomError")
    assert done.error is not None


def test_what_cannot_come_out_is_a_failure_that_says_so() -> None:
    with Sandbox("python") as box, pytest.raises(ToolFailed, match=r"generator|cannot"):
        box.call(lambda: (n for n in range(3))).unwrap()


def test_a_body_that_ends_its_process_is_a_failure() -> None:
    with Sandbox("python") as box:
        for body in (lambda: os._exit(3), os.abort, lambda: ctypes.string_at(0), lambda: sys.exit(4)):
            done = box.call(body)
            assert (done.ok, done.ending.kind, done.ending.fault) == (False, "tool_error", "tool")
            with pytest.raises(ToolFailed):
                done.unwrap()


def test_limits_end_functions_too() -> None:
    assert sleep(0) is None
    with pytest.raises(CallTimeout) as caught:
        sleep(60)
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.record.ending.kind == "limit:wall_time"

    @sandboxed("python", memory="96MiB")
    def grow() -> int:
        return len(bytearray(1 << 29)) and sum(bytearray(1 << 29)[::4096])

    with pytest.raises((LimitExceeded, ToolFailed)) as ended:
        grow()
    assert not isinstance(ended.value, LimitExceeded) or ended.value.limit == "memory"


def test_output_of_a_function_is_kept_beside_its_value() -> None:
    def talk() -> int:
        print("said")
        print("complained", file=sys.stderr)
        return 1

    with Sandbox("python") as box:
        done = box.call(talk)
    assert (done.value, done.stdout, done.stderr) == (1, b"said\n", b"complained\n")


def test_bad_manifests_and_refusals_raise_from_a_call() -> None:
    @sandboxed("no-such-profile")
    def nowhere() -> None: ...

    @sandboxed("python", **{"isolation.minimum": "microvm"})
    def stronger() -> None: ...

    with pytest.raises(ManifestError, match="no-such-profile"):
        nowhere()
    with pytest.raises(Unenforceable) as caught:
        stronger()
    assert caught.value.record.ending.kind == "refused"
    with pytest.raises(TypeError, match="argument"):
        add()  # type: ignore[call-arg]


def test_arguments_and_results_are_digests_in_the_record_unless_captured() -> None:
    secret = "a-secret-argument"
    with Sandbox("python") as box:
        record = box.call(lambda text: text + "-result", secret).record.to_json()
        assert secret not in json.dumps(record)
        assert record["output"]["result_sha256"].startswith("sha256:")
    with Sandbox("python", capture=["args"]) as box:
        assert secret in json.dumps(box.call(lambda text: text, secret).record.to_json())


@sandboxed
def everyday(number: int) -> list[Any]:
    import multiprocessing
    import random
    import signal
    import socket
    import sqlite3
    import subprocess
    import tempfile
    import time

    with multiprocessing.get_context("fork").Pool(2) as pool:
        squares = pool.map(abs, range(-3, 1))
    said = subprocess.run(["sh", "-c", "cat; echo $0 >&2; exit 3"], input=b"in", capture_output=True)
    with tempfile.NamedTemporaryFile() as file, sqlite3.connect(file.name) as db:
        total = db.execute("select sum(value) from json_each('[1,2,3]')").fetchone()[0]
    a, b = socket.socketpair()
    a.send(b"x")
    seen: list[int] = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.05)
    threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    me = [os.getuid(), os.environ["HOME"], os.getcwd(), os.path.exists("/proc/self/status")]
    random_bits = random.getrandbits(64)
    return [squares, said.returncode, said.stdout, total, b.recv(1), len(seen), *me, random_bits, number]


def test_ordinary_code_works_in_a_function_cold_and_warm() -> None:
    with ThreadPoolExecutor(4) as pool:
        results = [*(everyday(n) for n in range(3)), *pool.map(everyday, range(3, 11))]
    for number, result in enumerate(results):
        expected = [[3, 2, 1, 0], 3, b"in", 6, b"x", 4, 1000, "/home/user", "/workspace", True]
        assert result[:-2] == expected
        assert result[-1] == number
    assert len({result[-2] for result in results}) == len(results), "two calls drew the same random numbers"


def run_script(tmp_path: Path, source: str, state: Path, *, as_module: bool = False) -> str:
    """Run `source` in an interpreter of its own, as a script or as a module."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(source))
    argv = [sys.executable, *(("-m", "script") if as_module else (str(path),))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SANDBOX_STATE": str(state)}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.mark.parametrize("as_module", [False, True])
def test_functions_of_a_main_script_and_its_modules_cross(tmp_path: Path, state_root: Path, as_module: bool) -> None:
    (tmp_path / "beside.py").write_text("BASE = 100\ndef shifted(n):\n    return BASE + n\n")
    source = """
        from __future__ import annotations
        import dataclasses
        from sandbox import sandboxed
        import beside

        @dataclasses.dataclass
        class Result:
            total: int

        @sandboxed("python")
        def total(numbers: list[int]) -> Result:
            return Result(sum(map(beside.shifted, numbers)))

        if __name__ == "__main__":
            print(total([1, 2, 3]))
    """
    assert run_script(tmp_path, source, state_root, as_module=as_module) == "Result(total=306)"


def test_functions_of_a_notebook_cross(tmp_path: Path, state_root: Path) -> None:
    # A notebook's cells are compiled from text and run in __main__'s namespace; there is no file behind them.
    source = """
        import __main__
        cells = [
            "from sandbox import sandboxed, Sandbox",
            "import math\\nK = 3",
            "@sandboxed\\ndef area(r: float) -> float:\\n    return K * math.floor(r) ** 2",
            "async def later(n):\\n    return n + K",
            "print(area(2.5)); K = 4; print(area(2.5))",
            "import asyncio\\nwith Sandbox() as box:\\n    print(asyncio.run(box.acall(later, 1)).value)",
        ]
        for n, cell in enumerate(cells):
            exec(compile(cell, f"<ipython-input-{n}>", "exec"), __main__.__dict__)
    """
    assert run_script(tmp_path, source, state_root).split() == ["12", "16", "5"]
