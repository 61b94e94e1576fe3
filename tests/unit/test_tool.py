"""`@sandboxed` gives a plain function back; the runtime that it calls is a fake here."""

from __future__ import annotations

import asyncio
import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import pytest

import sandbox.runtime
from sandbox import sandboxed
from sandbox.context import CallContext, call_context, current_context, parse_traceparent
from sandbox.errors import Denied, ManifestError, SandboxError, Unenforceable

if TYPE_CHECKING:
    from nowhere import Missing


class FakeOutcome:
    def __init__(self, value: Any, record: Any, error: Exception | None = None) -> None:
        self.value, self.record, self.error = value, record, error

    def unwrap(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class FakeRuntime:
    """Runs the body here, unless told otherwise, and remembers each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.contexts: list[CallContext] = []
        self.error: Exception | None = None
        self.refusal: Exception | None = None
        self.threads: list[int] = []

    def run_function(self, func: Any, args: Any, kwargs: Any, *, resolved_source: Any, context: Any) -> FakeOutcome:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append((func, args, kwargs, resolved_source))
        self.contexts.append(context)
        self.threads.append(threading.get_ident())
        value = None if self.error else func(*args, **kwargs)
        if inspect.iscoroutine(value):
            value = asyncio.run(value)
        return FakeOutcome(value, f"record {len(self.calls)}", self.error)

    async def arun_function(self, func: Any, args: Any, kwargs: Any, **rest: Any) -> FakeOutcome:
        return await asyncio.to_thread(self.run_function, func, args, kwargs, **rest)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> FakeRuntime:
    fake = FakeRuntime()
    monkeypatch.setattr(sandbox.runtime, "run_function", fake.run_function)
    monkeypatch.setattr(sandbox.runtime, "arun_function", fake.arun_function)
    return fake


@sandboxed
def bare(a: int, b: int = 2, *, mode: Literal["x", "y"] = "x") -> int:
    """Adds."""
    return a + b


@sandboxed("shell", memory="1MiB", read=["/data"])
def configured(repo: Annotated[str, "a note"], number: Missing | None = None) -> dict[str, Any]:
    return {"repo": repo}


@sandboxed(profile="python")
async def later(n: int) -> int:
    await asyncio.sleep(0)
    return n + 1


def test_the_result_is_a_plain_function_with_the_metadata_of_the_body() -> None:
    assert inspect.isfunction(bare)
    assert (bare.__name__, bare.__doc__, bare.__module__) == ("bare", "Adds.", __name__)
    assert str(inspect.signature(bare)) == "(a: 'int', b: 'int' = 2, *, mode: \"Literal['x', 'y']\" = 'x') -> 'int'"
    assert get_type_hints(bare) == {"a": int, "b": int, "mode": Literal["x", "y"], "return": int}
    assert inspect.isfunction(bare.__wrapped__)
    assert bare.__wrapped__(1) == 3


def test_sync_stays_sync_and_async_stays_async(runtime: FakeRuntime) -> None:
    assert not inspect.iscoroutinefunction(bare)
    assert inspect.iscoroutinefunction(later)
    assert bare(1) == 3
    assert asyncio.run(later(1)) == 2


def test_a_call_goes_to_the_runtime_with_body_profile_and_overrides(runtime: FakeRuntime) -> None:
    assert configured("r", number=None) == {"repo": "r"}
    assert bare(1, mode="y") == 3
    assert runtime.calls[0] == (
        configured.__wrapped__,
        ("r",),
        {"number": None},
        ("shell", {"memory": "1MiB", "read": ["/data"]}),
    )
    assert runtime.calls[1][1:] == ((1,), {"mode": "y"}, ("python", {}))
    bare(2)
    assert runtime.calls[2][3][1] is runtime.calls[1][3][1]


def test_call_gives_the_outcome_whatever_it_is(runtime: FakeRuntime) -> None:
    outcome = bare.call(1, b=5)
    assert (outcome.value, outcome.record) == (6, "record 1")
    runtime.error = Denied("no")
    assert bare.call(1).error is runtime.error
    with pytest.raises(Denied):
        bare(1)


def test_acall_works_for_sync_and_async_bodies_and_leaves_the_loop_free(runtime: FakeRuntime) -> None:
    async def main() -> list[Any]:
        ticks = []

        async def tick() -> None:
            for _ in range(3):
                ticks.append(1)
                await asyncio.sleep(0)

        outcomes = await asyncio.gather(bare.acall(1), later.acall(1, why="w"), tick())
        return [outcomes[0].value, outcomes[1].value, len(ticks)]

    assert asyncio.run(main()) == [3, 2, 3]
    assert threading.get_ident() not in runtime.threads


def test_last_record_is_of_the_call_that_ended_last(runtime: FakeRuntime) -> None:
    @sandboxed
    def tool() -> None: ...

    assert tool.last_record is None
    tool()
    assert tool.last_record == "record 1"
    asyncio.run(tool.acall())
    assert tool.last_record == "record 2"
    runtime.refusal = Unenforceable("cannot", record="refused")
    with pytest.raises(Unenforceable):
        tool()
    assert tool.last_record == "refused"


def test_context_goes_beside_the_arguments(runtime: FakeRuntime) -> None:
    bare.call(1, why="because", agent="a", session="s", trace_id="t", parent="p")
    assert runtime.contexts[-1] == CallContext("because", "a", "s", "t", "", "p")
    assert runtime.calls[-1][1:3] == ((1,), {})
    with call_context(agent="outer", session="outer", span_id="0a"), call_context(agent="inner"):
        bare(1)
        assert runtime.contexts[-1] == CallContext(agent="inner", session="outer", span_id="0a")
        bare.call(1, session="given", why=None)
        assert runtime.contexts[-1] == CallContext(agent="inner", session="given", span_id="0a")
    bare(1)
    assert runtime.contexts[-1] == CallContext()
    assert current_context() == CallContext()


def test_context_is_text() -> None:
    with pytest.raises(TypeError, match="why must be text, not int"):
        bare.call(1, why=5)
    with pytest.raises(TypeError, match="no 'wy'; it has why, agent"), call_context(wy="x"):
        pass


def test_a_parameter_of_the_tools_own_is_the_tools(runtime: FakeRuntime) -> None:
    @sandboxed
    def tool(why: str, agent: str = "") -> str:
        return why + agent

    outcome = tool.call(why="mine", agent="!", session="s")
    assert outcome.value == "mine!"
    assert runtime.contexts[-1] == CallContext(session="s")
    with call_context(why="the context's"):
        assert tool("x") == "x"
    assert runtime.contexts[-1].why == "the context's"


def test_open_keywords_do_not_claim_the_context(runtime: FakeRuntime) -> None:
    @sandboxed
    def tool(*args: Any, **kwargs: Any) -> Any:
        return kwargs

    assert tool.call(x=1, why="context").value == {"x": 1}
    assert runtime.contexts[-1].why == "context"
    assert tool(x=1, why="the tool's") == {"x": 1, "why": "the tool's"}


def test_a_parameter_named_self_or_func_is_no_trouble(runtime: FakeRuntime) -> None:
    @sandboxed
    def tool(func: int, self: int, args: int) -> int:
        return func + self + args

    assert tool.call(func=1, self=2, args=3).value == 6
    assert tool(func=1, self=2, args=3) == 6


def test_arguments_that_do_not_fit_are_a_type_error_and_nothing_runs(runtime: FakeRuntime) -> None:
    for attempt in (
        lambda: bare(),
        lambda: bare(1, 2, 3),
        lambda: bare.call(1, nope=1),
        lambda: asyncio.run(later()),
        lambda: asyncio.run(bare.acall()),
        lambda: configured(),
    ):
        with pytest.raises(TypeError, match=r"^(bare|later|configured)\(\) "):
            attempt()
    assert runtime.calls == []


def test_a_wrong_keyword_is_an_error_at_decoration() -> None:
    with pytest.raises(ManifestError, match=r"sandboxed\(memroy=...\): unknown keyword\n  hint: did you mean memory"):
        sandboxed("python", memroy="1MiB")
    with pytest.raises(ManifestError, match=r"known: .*wall_time"):
        sandboxed(zzzzzz=1)
    sandboxed("python", **{"resources.memory": "1MiB"})


@pytest.mark.parametrize("profile", [5, None, len, int, ["python"]])
def test_a_wrong_profile_is_an_error_at_decoration(profile: Any) -> None:
    with pytest.raises(TypeError, match="takes a function or a profile"):
        sandboxed(profile)


def generator() -> Any:
    yield 1


async def async_generator() -> Any:
    yield 1


class Things:
    def method(self) -> None: ...

    @classmethod
    def of_class(cls) -> None: ...


@pytest.mark.parametrize(
    ("func", "words"),
    [
        (generator, "is a generator"),
        (async_generator, "is a generator"),
        (Things.method, "is a method: its object would be copied"),
        (Things.__dict__["of_class"], "not a classmethod"),
        (Things, "not a type"),
        (Things(), "not a Things"),
        (len, "not a builtin_function_or_method"),
        (bare, "sandboxed already"),
    ],
)
def test_what_cannot_be_sandboxed_is_refused_at_decoration(func: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        sandboxed("python")(func)


def test_a_decorated_function_under_another_decorator_can_be_sandboxed(runtime: FakeRuntime) -> None:
    import functools

    @functools.wraps(bare)
    def wrapper(*args: Any) -> Any:
        return bare.__wrapped__(*args)

    assert sandboxed("shell")(wrapper)(1) == 3
    assert runtime.calls[-1][0] is wrapper


def test_static_methods_work_in_either_order(runtime: FakeRuntime) -> None:
    class Tools:
        @staticmethod
        @sandboxed
        def under(n: int) -> int:
            return n

        @sandboxed("python")
        @staticmethod
        def over(n: int) -> int:
            return n

        @sandboxed
        @staticmethod
        def bare(n: int) -> int:
            return n

    assert [Tools.under(1), Tools().over(2), Tools().bare(3)] == [1, 2, 3]
    assert Tools.over.call(4).value == 4


def test_functions_within_methods_are_no_methods() -> None:
    class Maker:
        def make(self) -> Any:
            @sandboxed
            def tool(self: int) -> int:
                return self

            return tool

    assert inspect.isfunction(Maker().make())


def test_the_manifest_is_resolved_on_first_use_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sandbox import profiles
    from sandbox.manifest import Manifest

    asked = []
    real = profiles.resolve

    def counting(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(profiles, "resolve", counting)

    @sandboxed({"description": "d"}, memory="7MiB")
    def tool() -> None: ...

    assert asked == []
    assert tool.manifest.resources.memory_bytes == 7 << 20
    assert isinstance(tool.manifest, Manifest)
    assert tool.manifest == real({"description": "d"}, overrides={"memory": "7MiB"}).manifest
    assert "memory_bytes" in repr(tool.manifest)
    assert asked == [(({"description": "d"},), {"overrides": {"memory": "7MiB"}})]
    with pytest.raises(ValueError, match="frozen"):
        tool.manifest.name = "x"


def test_a_profile_that_is_not_there_is_an_error_on_first_use() -> None:
    @sandboxed("no-such-profile")
    def tool() -> None: ...

    with pytest.raises(ManifestError, match="no-such-profile"):
        _ = tool.manifest.name


def test_inside_a_jail_the_plain_body_runs(runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_toolcall_sandbox_inside", True, raising=False)
    assert bare(1) == 3
    assert asyncio.run(later(1)) == 2
    assert runtime.calls == []
    with pytest.raises(SandboxError, match="not there inside a jail"):
        bare.call(1)


@pytest.mark.parametrize("value", ["1", 1, "True"])
def test_nothing_but_the_runners_own_mark_switches_the_sandbox_off(
    runtime: FakeRuntime, monkeypatch: pytest.MonkeyPatch, value: Any
) -> None:
    monkeypatch.setenv("_toolcall_sandbox_inside", "1")
    monkeypatch.setenv("SANDBOX_INSIDE", "1")
    monkeypatch.setattr(sys, "_toolcall_sandbox_inside", value, raising=False)
    bare(1)
    assert len(runtime.calls) == 1


def test_importing_tools_and_decorating_stays_light() -> None:
    script = """
import sys, json
from sandbox import sandboxed
@sandboxed("shell", memory="1MiB")
def tool(a: int) -> int: return a
@sandboxed
async def other(a: int) -> int: return a
heavy = ("pydantic", "numpy", "cloudpickle", "asyncio", "sandbox.runtime", "sandbox.profiles", "sandbox.codec")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, json.loads(done.stdout or "null")) == (0, []), done.stderr


def test_type_checkers_see_signature_and_attributes(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(
        "from sandbox import sandboxed\n"
        "@sandboxed\n"
        "def f(a: int) -> str: return str(a)\n"
        "@sandboxed('python', memory='1MiB')\n"
        "async def g(a: int) -> bytes: return b''\n"
        "x: str = f(1)\n"
        "f('wrong')\n"
        "y: int = f.call(1, why='w').value\n"
        "z: int = f.manifest.resources.memory_bytes\n"
        "async def main() -> bytes: return await g(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), str(tmp_path / "use.py")],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    errors = [line for line in done.stdout.splitlines() if "use.py" in line and "error" in line]
    assert len(errors) == 1, done.stdout
    assert 'use.py:7: error: Argument 1 to "__call__"' in errors[0]


TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.mark.parametrize("text", [f"00-{TRACE}-{SPAN}-01", f"01-{TRACE}-{SPAN}-00-and-more"])
def test_a_traceparent_gives_its_trace_and_span(text: str) -> None:
    assert parse_traceparent(text) == (TRACE, SPAN)


@pytest.mark.parametrize(
    "text",
    [
        "",
        TRACE,
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not 00-TRACE-SPAN-FLAGS"):
        parse_traceparent(text)
