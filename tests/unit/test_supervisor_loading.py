"""A supervisor loads asyncio without what it does not use, and gets it when it does use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOT_LOADED = ["ssl", "inspect", "ast", "traceback", "asyncio.sslproto", "urllib.parse"]
NOT_LOADED += ["logging", "subprocess", "ntpath", "typing"]
_START = f"""
import json, sys
sys.path.append({str(ROOT)!r})
from sandbox.supervisor import loading
loading.load()
import asyncio
loaded = [name for name in {NOT_LOADED!r} if name in sys.modules]
"""


def run(code: str) -> tuple[object, str]:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _START + code], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout), done.stderr


def test_what_asyncio_names_and_a_supervisor_does_not_use_is_not_loaded() -> None:
    loaded, _ = run("print(json.dumps(loaded))")
    assert loaded == []


def test_no_part_of_a_supervisor_loads_them() -> None:
    """Which takes longer than all that is ours."""
    loaded, _ = run(f"""
import sandbox.supervisor.main, sandbox.supervisor.server, sandbox.supervisor.loop
ours = {{"sandbox.outcome", "sandbox.spec", "sandbox.host.table", "sandbox.audit.recover", "sandbox.seccomp.compile"}}
slow = set({NOT_LOADED!r})
if sys.version_info >= (3, 12):
    slow -= {{"inspect", "ast"}}  # dataclasses asks it for annotations there
print(json.dumps(sorted((slow | ours) & set(sys.modules))))
""")
    assert loaded == []


def test_what_is_asked_for_later_is_the_real_module() -> None:
    asked, _ = run("""
import asyncio.sslproto, asyncio.staggered, inspect, pathlib, ssl, traceback
print(json.dumps([inspect.isfunction(loading.load), hasattr(ssl, "SSLContext"),
    pathlib.PurePath("/a b").as_uri() == "file:///a%20b",
    hasattr(asyncio.sslproto, "SSLProtocol"), asyncio.sslproto is sys.modules["asyncio.sslproto"]]))
""")
    assert asked == [True, True, True, True, True]


def test_a_logger_is_the_real_one_for_whoever_listens() -> None:
    found, told = run("""
import asyncio.log
asyncio.log.logger.debug("nobody hears this")
early = "logging" in sys.modules
import logging
logging.basicConfig(level=logging.DEBUG, format="heard %(levelname)s %(name)s: %(message)s")
asyncio.log.logger.debug("this and %s", "that")
asyncio.log.logger.warning("more")
print(json.dumps([early, asyncio.log.logger.isEnabledFor(logging.DEBUG)]))
""")
    assert found == [False, True]
    assert told.splitlines() == ["heard DEBUG asyncio: this and that", "heard WARNING asyncio: more"]


def test_a_program_can_be_started_later() -> None:
    found, _ = run("""
async def main():
    process = await asyncio.create_subprocess_exec("true", stdout=asyncio.subprocess.PIPE)
    return await process.wait()
print(json.dumps(asyncio.run(main())))
""")
    assert found == 0


def test_asyncio_tells_of_a_task_that_failed_as_ever() -> None:
    found, told = run("""
async def failing():
    raise ValueError("as it must")

async def main():
    task = asyncio.get_running_loop().create_task(failing())
    await asyncio.sleep(0)
    frames = len(task.get_stack())
    del task
    return frames, asyncio.iscoroutinefunction(failing)

print(json.dumps(asyncio.run(main(), debug=True)))
""")
    assert found == [1, True]
    assert "Task exception was never retrieved" in told
    assert "source_traceback: Object created at" in told
    assert "ValueError: as it must" in told
