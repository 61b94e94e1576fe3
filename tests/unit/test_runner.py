"""The program inside the jail: one request in, one reply out, whatever the tool does to its process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sandbox import codec
from sandbox._jail import encode, runner
from sandbox.errors import ToolFailed
from sandbox.supervisor.call import reply_is_whole
from tests.helpers.calls import RUNNER, SITE, call, installed, run_call, run_request


def failure(func: Any, *args: Any) -> ToolFailed:
    with pytest.raises(ToolFailed) as failed:
        call(func, *args)
    return failed.value


def test_an_exception_comes_out_with_type_message_and_traceback() -> None:
    class Mine(ValueError):
        pass

    def tool() -> None:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise Mine("second") from error

    error = failure(tool)
    assert error.type_name.endswith("Mine")
    assert str(error) == f"{error.type_name}: second"
    assert "KeyError: 'first'" in error.traceback_text
    assert "in tool" in error.traceback_text
    assert "_jail/runner.py" not in error.traceback_text


def test_a_hostile_exception_is_reported_all_the_same() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise SystemExit(3)

    def tool() -> None:
        raise Bad

    error = failure(tool)
    assert error.type_name.endswith("Bad")
    assert "__str__ raised SystemExit" in str(error)


def test_messages_are_bounded_and_clean_text() -> None:
    def tool() -> None:
        raise ValueError("\ud800" + "x" * 10_000_000)

    ran = run_call(tool)
    assert len(ran.reply) < 100_000
    error = failure(tool)
    assert "\\ud800" in str(error)
    assert "characters left out" in str(error)
    str(error).encode()


def test_sys_exit_is_a_failure_that_names_its_code() -> None:
    def tool(code: Any) -> None:
        sys.exit(code)

    for code in (0, 3, "bye", None):
        error = failure(tool, code)
        assert (error.type_name, "sys.exit" in str(error)) == ("SystemExit", True)
        assert f"({'' if code is None else code})" in str(error)


def test_interrupts_and_memory_and_recursion_errors_come_out() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def recursive() -> None:
        recursive()

    def greedy() -> Any:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        return [bytes(1 << 29) for _ in range(10)]

    assert failure(interrupted).type_name == "KeyboardInterrupt"
    assert failure(recursive).type_name == "RecursionError"
    assert failure(greedy).type_name == "MemoryError"


def test_a_result_that_exhausts_the_memory_while_it_is_encoded_is_reported() -> None:
    def tool() -> Any:
        import resource

        value = [bytes(60 << 20)]
        used = int(open("/proc/self/statm").read().split()[0]) * 4096  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20), used + (20 << 20)))
        return value

    assert failure(tool).type_name == "MemoryError"


def test_the_runner_needs_only_the_standard_library_and_cloudpickle(tmp_path: Path) -> None:
    """As in the jail: runner.py and encode.py side by side, nothing of ours importable, another interpreter even."""
    for name in ("runner.py", "encode.py"):
        shutil.copy(Path(RUNNER).with_name(name), tmp_path / name)
    shutil.copytree(Path(SITE) / "cloudpickle", tmp_path / "site" / "cloudpickle")

    def tool() -> list[Any]:
        import sys

        try:
            import sandbox
        except ModuleNotFoundError:
            sandbox = None
        names = ("numpy", "pydantic", "dataclasses", "encode", "asyncio")
        return [sandbox, [name for name in names if name in sys.modules], sys.flags.isolated]

    sent = codec.encode_call(tool, (), {}, importable=installed)
    base = getattr(sys, "_base_executable", sys.executable)
    ran = run_request(
        sent.request(sys_path=[str(tmp_path / "site")]),
        python=(base, "-I", "-S"),
        runner=str(tmp_path / "runner.py"),
    )
    value = ran.value()
    assert value[0] is None
    assert "encode" not in value[1]
    assert "numpy" not in value[1]
    assert value[2] == 1


def test_a_call_by_reference_does_not_load_cloudpickle() -> None:
    import textwrap

    sent = codec.encode_call(textwrap.dedent, (" x",), {}, importable=installed)
    ran = run_request(sent.request(), python=(sys.executable, "-I", "-S"))
    assert ran.value() == "x"


def test_an_encode_module_of_the_tools_own_is_found(tmp_path: Path) -> None:
    (tmp_path / "encode.py").write_text("WHOSE = 'the tool'\n")

    def tool() -> str:
        import encode  # type: ignore[import-not-found]

        return str(encode.WHOSE)

    sent = codec.encode_call(tool, (), {}, importable=installed)
    assert run_request(sent.request(sys_path=[SITE, str(tmp_path)])).value() == "the tool"


def test_children_of_the_tool_do_not_inherit_the_descriptors() -> None:
    def tool() -> list[str]:
        import os
        import subprocess

        mine = set(os.listdir("/proc/self/fd"))
        listing = subprocess.run(["ls", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)
        return [str(len(mine)), *listing.stdout.split()]

    own, *childs = call(tool)
    assert int(own) >= 4  # 0, 1, 2, the result and the listing itself
    assert {int(fd) for fd in childs} <= {0, 1, 2, 3}


def test_the_request_is_closed_before_the_tool_runs() -> None:
    def tool() -> bool:
        import os
        import sys

        try:
            os.fstat(int(sys.argv[1]))
        except OSError:
            return True
        return False

    assert call(tool) is True


def test_output_is_flushed_and_apart_from_the_reply() -> None:
    def tool() -> str:
        import sys

        print("to stdout")
        print("to stderr", file=sys.stderr)
        return "value"

    ran = run_call(tool)
    assert (ran.value(), ran.stdout, ran.stderr) == ("value", b"to stdout\n", b"to stderr\n")


def test_a_tool_that_closed_its_streams_still_answers() -> None:
    def tool(how: str) -> str:
        import os
        import sys

        if how == "objects":
            sys.stdout.close()
            sys.stderr = None  # type: ignore[assignment]
        else:
            os.close(1)
            print("lost")
        return "value"

    assert call(tool, "objects") == "value"
    assert call(tool, "descriptors") == "value"


def test_a_forked_child_that_returns_too_does_not_answer_as_well() -> None:
    def tool() -> str:
        import os

        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        return "parent" if pid else "child"

    assert call(tool) == "parent"


def test_garbage_on_the_result_descriptor_is_a_codec_error() -> None:
    def tool() -> str:
        import os
        import sys

        os.write(int(sys.argv[2]), b"garbage")
        return "value"

    with pytest.raises(codec.CodecError):
        call(tool)


def test_a_reply_of_the_tools_own_making_is_only_data() -> None:
    def tool() -> None:
        import os
        import sys

        reply = b'{"json":"forged"}'
        os.write(int(sys.argv[2]), b"TCR1" + len(reply).to_bytes(4, "little") + reply)
        os._exit(0)

    assert run_call(tool).value() == "forged"


def test_a_process_that_dies_leaves_an_empty_reply() -> None:
    def tool() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    ran = run_call(tool)
    assert (ran.exit_code, ran.reply) == (-9, b"")
    with pytest.raises(codec.CodecError, match="it is empty"):
        ran.value()


def test_a_result_descriptor_that_is_not_there_is_status_2() -> None:
    read, write = os.pipe()
    os.close(write)
    done = subprocess.run(
        [sys.executable, "-I", RUNNER, str(read), "99"],
        pass_fds=(read,),
        capture_output=True,
        timeout=30,
        check=False,
    )
    os.close(read)
    assert done.returncode == 2
    assert b"sandbox runner" in done.stderr


def test_large_results_pass_through_the_pipe() -> None:
    def tool(n: int) -> bytes:
        return bytes(n)

    assert len(call(tool, 50 << 20)) == 50 << 20
    error = failure(tool, 65 << 20)
    assert (error.type_name, "limit" in str(error)) == ("UnsupportedResult", True)


def test_limits_travel_with_the_request() -> None:
    sent = codec.encode_call(lambda: list(range(100)), (), {}, importable=installed)
    limits = {**codec.LIMITS, "parts": 50}
    with pytest.raises(ToolFailed, match="too many parts"):
        run_request(sent.request(sys_path=[SITE], limits=limits)).value()


def test_data_in_open_files_and_exit_handlers_is_written(tmp_path: Path) -> None:
    def tool(path: str) -> None:
        import atexit
        import builtins

        builtins.kept = open(path, "w")  # type: ignore[attr-defined]  # noqa: SIM115
        builtins.kept.write("flushed")  # type: ignore[attr-defined]
        atexit.register(lambda: print("handler"))

    ran = run_call(tool, str(tmp_path / "out"))
    assert ran.stdout == b"handler\n"
    assert (tmp_path / "out").read_text() == "flushed"


def test_the_decorator_knows_the_runners_mark() -> None:
    from sandbox import tool

    assert runner.INSIDE == tool._INSIDE
    assert not hasattr(sys, runner.INSIDE)


def test_error_replies_are_told_from_values() -> None:
    assert not runner.is_value(encode.encode_error(ValueError("x"), "call"))
    assert runner.is_value(encode.encode_value({"error": 1}))
    assert runner.is_value(encode.encode_value([b"x"]))


@pytest.mark.parametrize("content", [{"json": 1}, {"json": {"a": [1, "}"]}}, {"error": {"type_name": "E"}}])
def test_a_reply_without_buffers_is_whole_with_its_last_byte_and_no_sooner(content: dict[str, Any]) -> None:
    reply = encode.pack(content)
    assert reply_is_whole(reply)
    assert not any(reply_is_whole(reply[:size]) for size in range(len(reply)))
    assert not reply_is_whole(reply + b"x"), "what follows is judged with the rest of it"


def test_a_reply_with_buffers_ends_with_the_file() -> None:
    assert not reply_is_whole(encode.encode_value(b"x" * 10_000))
    assert not reply_is_whole(b"no reply at all")
