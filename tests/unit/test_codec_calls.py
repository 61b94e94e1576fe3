"""How a function gets in: by reference, by value, from under other decorators, with its arguments."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from sandbox import codec, sandboxed
from sandbox.errors import ToolFailed
from tests.helpers.calls import SITE, call, installed, run_call, run_request

OFFSET = 10


@dataclass
class Job:
    n: int


def double(n: int) -> int:
    return 2 * n


def uses_its_module(job: Job) -> Job:
    return Job(double(job.n) + OFFSET)


@pytest.fixture
def module_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on our sys.path that the runner does not see."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def load(directory: Path, name: str, source: str) -> types.ModuleType:
    path = directory / (name.replace(".", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from __future__ import annotations\n" + textwrap.dedent(source))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def encoded(func: Any, *args: Any, importable: Any = installed, **kwargs: Any) -> codec.EncodedCall:
    return codec.encode_call(func, args, kwargs, importable=importable)


def test_a_function_of_an_installed_module_goes_by_reference() -> None:
    import textwrap

    call_bytes = encoded(textwrap.dedent, "  x")
    assert (call_bytes.by, call_bytes.module, call_bytes.qualname) == ("reference", "textwrap", "dedent")
    assert b"dedent" not in call_bytes.payload
    assert call(textwrap.dedent, "  x") == "x"


def test_a_function_of_a_local_module_goes_by_value_with_what_it_uses() -> None:
    assert encoded(uses_its_module, Job(1)).by == "value"
    assert call(uses_its_module, Job(1)) == Job(12)


def test_lambdas_closures_and_defaults_travel() -> None:
    factor = 3

    def outer(n: int, extra: int = 4, *, more: int = 5) -> int:
        def inner(m: int) -> int:
            return m * factor

        return inner(n) + extra + more

    assert call(outer, 2) == 15
    assert call(outer, 2, 0, more=0) == 6
    assert call(lambda x: x + 1, 1) == 2


def test_the_functions_of_a_local_package_travel_with_their_imports(module_dir: Path) -> None:
    load(module_dir, "pkg_a.helpers", "LIMIT = 7\ndef cap(n):\n    return min(n, LIMIT)\n")
    tools = load(
        module_dir,
        "pkg_a.tools",
        """
        import json
        from pkg_a import helpers
        from pkg_a.helpers import cap
        class Reading:
            def __init__(self, n): self.n = n
            def capped(self): return cap(self.n)
        def run(n: int) -> list:
            return [Reading(n).capped(), helpers.cap(n), json.dumps({"n": n})]
        """,
    )
    assert call(tools.run, 9) == [7, 7, '{"n": 9}']


def test_globals_of_cloudpickle_are_as_before(module_dir: Path) -> None:
    tools = load(module_dir, "mod_b", "def run(n): return n\nclass C: pass\n")
    threads = [threading.Thread(target=lambda: [encoded(tools.run, tools.C()) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cloudpickle.list_registry_pickle_by_value() == set()


def test_a_registration_of_the_users_own_stays(module_dir: Path) -> None:
    tools = load(module_dir, "mod_c", "def run(n): return n\n")
    cloudpickle.register_pickle_by_value(tools)
    try:
        encoded(tools.run, 1)
        assert "mod_c" in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(tools)


MAIN = """
from __future__ import annotations
from dataclasses import dataclass
from tests.helpers.calls import call

BASE = 5

@dataclass
class Point:
    x: int

def helper(n):
    return n + BASE

def tool(p: Point) -> list[Point]:
    from multiprocessing import get_context
    with get_context("fork").Pool(2) as pool:
        return [Point(n) for n in pool.map(helper, [p.x, 2])]

if __name__ == "__main__":
    print(call(tool, Point(1)))
"""


def test_functions_of_main_travel_and_work_in_a_pool_inside(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "[Point(x=6), Point(x=7)]\n"), done.stderr


class FrameworkTool:
    """What a framework's decorator leaves under the name: no function, no __wrapped__."""

    def __init__(self, func: Any) -> None:
        self.invoke = func


STACKED = """
    import functools
    class Tool:
        def __init__(self, func): self.invoke = func
    def framework(func): return Tool(func)
    def passing(func):
        @functools.wraps(func)
        def wrapper(*args, **kwargs): return ("outer", func(*args, **kwargs))
        return wrapper
    from sandbox import sandboxed
    BASE = 1
    @framework
    @sandboxed
    def hidden(n: int) -> int: return n + BASE
    @passing
    @sandboxed
    def wrapped(n: int) -> int: return n + BASE
    @sandboxed
    @passing
    def inner(n: int): return n + BASE
    @sandboxed
    def plain(n: int) -> int: return n + BASE
"""


def test_the_decorated_body_travels_from_under_other_decorators(module_dir: Path) -> None:
    tools = load(module_dir, "mod_d", STACKED)
    assert call(tools.hidden.invoke.__wrapped__, 1) == 2
    assert call(tools.wrapped.__wrapped__.__wrapped__, 1) == 2
    assert call(tools.inner.__wrapped__, 1) == ("outer", 2)
    assert call(tools.plain, 1) == 2


def test_by_reference_the_body_is_found_behind_the_decorators(module_dir: Path) -> None:
    tools = load(module_dir, "mod_e", STACKED)
    everything = lambda name: True  # noqa: E731
    root = str(Path(__file__).resolve().parents[2])
    for func, expected_by, unwrap, value in [
        (tools.plain.__wrapped__, "reference", 1, 2),
        (tools.wrapped.__wrapped__.__wrapped__, "reference", 2, 2),
        (tools.inner.__wrapped__, "reference", 1, ["outer", 2]),
        (tools.hidden.invoke.__wrapped__, "value", 0, 2),
    ]:
        sent = encoded(func, 1, importable=everything)
        assert (sent.by, sent.unwrap) == (expected_by, unwrap)
        ran = run_request(sent.request(sys_path=[SITE, str(module_dir), root]))
        assert ran.exit_code == 0, ran.value()
        assert json.loads(json.dumps(ran.value())) == value


def test_where_we_are_not_importable_decorated_functions_go_by_value(module_dir: Path) -> None:
    tools = load(module_dir, "mod_f", STACKED)
    sent = encoded(tools.plain, 1, importable=lambda name: name != "sandbox")
    assert sent.by == "value"
    assert run_request(sent.request(sys_path=[SITE])).value() == 2


@sandboxed
def factorial(n: int) -> int:
    return 1 if n < 2 else n * factorial(n - 1)


@sandboxed
def even(n: int) -> bool:
    return n == 0 or odd(n - 1)


@sandboxed
def odd(n: int) -> bool:
    return n != 0 and even(n - 1)


def test_a_sandboxed_function_that_calls_itself_runs_plainly_inside() -> None:
    assert call(factorial, 5) == 120
    assert call(even, 10) is True
    assert call(odd, 10) is False


def shouting(func: Any) -> Any:
    @functools.wraps(func)
    def wrapper(text: str) -> str:
        return str(func(text)).upper()

    return wrapper


@shouting
@sandboxed("no-such-profile")
def greeting(text: str) -> str:
    return f"hello {text}"


def test_a_decorator_above_ours_keeps_its_effect_inside() -> None:
    def tool(text: str) -> str:
        return greeting(text)

    assert call(tool, "x") == "HELLO X"
    assert b"no-such-profile" not in encoded(tool, "x").payload


class Unpicklable:
    def __reduce__(self) -> Any:
        raise OSError("not me")


def takes(first: Any, *rest: Any, named: Any = None, **more: Any) -> None: ...


def test_what_cannot_be_sent_is_named() -> None:
    lock = threading.Lock()
    for args, kwargs, words in [
        ((lock,), {}, "argument 'first' cannot be sent into the jail: TypeError: cannot pickle '_thread.lock'"),
        ((1, 2, Unpicklable()), {}, "argument '*1' cannot be sent into the jail: OSError: not me"),
        ((1,), {"named": [lock]}, "argument 'named'"),
        ((1,), {"other": {"k": lock}}, "argument 'other'"),
        (((n for n in [1]),), {}, "argument 'first'"),
    ]:
        with pytest.raises(TypeError) as refused:
            encoded(takes, *args, **kwargs)
        assert words in str(refused.value)
        assert refused.value.__cause__ is not None

    def closes_over() -> Any:
        return lock

    with pytest.raises(TypeError, match=r"the function .*closes_over' itself cannot be sent"):
        encoded(closes_over)


def test_arguments_of_any_picklable_form_arrive() -> None:
    np = pytest.importorskip("numpy")

    def describe(*args: Any, **kwargs: Any) -> list[str]:
        return [type(a).__name__ for a in (*args, *kwargs.values())]

    sent = (Job(1), np.arange(3), {1, 2}, double, json, len, Path("/x"), object())
    assert call(describe, *sent, k=b"x") == [
        "Job",
        "ndarray",
        "set",
        "function",
        "module",
        "builtin_function_or_method",
        "PosixPath",
        "object",
        "bytes",
    ]


def test_the_digest_of_arguments_is_stable_and_by_name() -> None:
    def f(a: Any, b: Any = None) -> None: ...

    digests = {
        encoded(f, {"x": 1, "y": [1, 2]}, 3).arguments_sha256,
        encoded(f, {"y": [1, 2], "x": 1}, b=3).arguments_sha256,
        encoded(f, b=3, a={"y": [1, 2], "x": 1}).arguments_sha256,
    }
    assert len(digests) == 1
    assert encoded(f, {"y": [1, 2], "x": 1}, 4).arguments_sha256 not in digests
    assert encoded(f, 1, "\ud800").arguments_json == b'{"a":1,"b":"\\ud800"}'
    assert encoded(f, object()).arguments_json == b""
    assert encoded(f, object()).arguments_sha256.startswith("sha256:")


def test_the_digest_of_the_source_follows_the_source(module_dir: Path) -> None:
    def compiled(body: str) -> Any:
        space: dict[str, Any] = {}
        exec(f"def f(): return {body}", space)
        return space["f"]

    assert encoded(compiled("1")).source_sha256 == encoded(compiled("1")).source_sha256
    assert encoded(compiled("1")).source_sha256 != encoded(compiled("2")).source_sha256
    assert encoded(compiled("{'a', 'b'} and x")).source_sha256 != encoded(compiled("{'a', 'c'} and x")).source_sha256
    import hashlib

    tools = load(module_dir, "mod_g", "def run():\n    return 1\n")
    assert encoded(tools.run).source_sha256 == "sha256:" + hashlib.sha256(b"def run():\n    return 1\n").hexdigest()


def test_importable_under_goes_by_the_modules_file(tmp_path: Path, module_dir: Path) -> None:
    load(module_dir, "mod_h", "")
    inside = codec.importable_under([str(module_dir)])
    assert inside("mod_h")
    assert not inside("json")
    assert not inside("__main__")
    assert not inside("not_loaded_at_all")
    assert not codec.importable_under([str(module_dir)[:-1]])("mod_h")
    assert codec.importable_under([])("sys")


def test_a_granted_directory_makes_its_modules_importable(module_dir: Path) -> None:
    (module_dir / "sub").mkdir()
    tools = load(module_dir, "mod_j", "def run():\n    import mod_k\n    return mod_k.X\n")
    (module_dir / "mod_k.py").write_text("X = 5\n")
    granted = codec.granted_sys_path([str(module_dir)])
    assert granted == [str(module_dir)]
    assert codec.granted_sys_path([str(module_dir / "sub"), "/nowhere"]) == []
    sent = encoded(tools.run, importable=codec.importable_under(granted))
    assert sent.by == "reference"
    assert run_request(sent.request(sys_path=granted)).value() == 5
    assert run_request(sent.request()).exit_code == 1


def test_a_module_that_is_loaded_later_is_seen(module_dir: Path) -> None:
    inside = codec.importable_under([str(module_dir)])
    assert not inside("mod_later")
    load(module_dir, "mod_later", "")
    assert inside("mod_later")


def test_a_module_missing_inside_comes_with_a_hint(module_dir: Path) -> None:
    load(module_dir, "mod_i", "")

    def tool() -> None:
        import mod_i  # noqa: F401

    def other() -> None:
        import module_that_nobody_has  # noqa: F401

    with pytest.raises(ToolFailed) as failed:
        call(tool)
    assert failed.value.type_name == "ModuleNotFoundError"
    assert f"read=[{str(module_dir)!r}]" in failed.value.hint
    with pytest.raises(ToolFailed) as failed:
        call(other)
    assert "'module_that_nobody_has' is not visible inside" in failed.value.hint


def test_a_partial_wrapper_below_ours_is_followed_for_annotations() -> None:
    def passing(func: Any) -> Any:
        @functools.wraps(func)
        def wrapper(*args: Any) -> Any:
            return func(*args)

        return wrapper

    @passing
    def tool(n: int) -> Job:
        return Job(n)

    assert call(tool, 3) == Job(3)


def test_a_bad_request_is_answered_not_crashed_on() -> None:
    for request in (b"", b"{}\n", b"not json", b'{"by":"value"}\nnot a pickle', b"[]\n"):
        ran = run_request(request)
        assert ran.exit_code == 1
        with pytest.raises(ToolFailed, match="could not be loaded"):
            ran.value()


def test_async_functions_run_on_a_loop_of_their_own() -> None:
    async def tool(n: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return n + len(asyncio.all_tasks())

    assert encoded(tool, 1).is_async
    assert call(tool, 1) == 2


def test_a_coroutine_of_a_sync_function_is_refused() -> None:
    async def inner() -> int:
        return 1

    def tool() -> Any:
        coroutine = inner()
        coroutine.close()
        return coroutine

    with pytest.raises(ToolFailed, match="a coroutine cannot leave"):
        call(tool)


def test_the_runner_says_why_a_reference_does_not_resolve() -> None:
    sent = codec.encode_call(textwrap.dedent, ("x",), {}, importable=installed)
    for change, words in [
        ({"module": "no_such_module"}, "ModuleNotFoundError"),
        ({"qualname": "gone"}, "AttributeError"),
        ({"unwrap": 3}, "AttributeError"),
    ]:
        header, _, payload = sent.request().partition(b"\n")
        ran = run_request(json.dumps({**json.loads(header), **change}).encode() + b"\n" + payload)
        with pytest.raises(ToolFailed, match=words):
            ran.value()


def test_run_call_reports_exit_codes() -> None:
    assert run_call(double, 1).exit_code == 0
    assert run_call(double, None).exit_code == 1
