"""Warm calls: nothing of one is visible to the next, they are sealed as cold ones are, and templates come and go."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sandbox import Outcome, Sandbox
from tests.helpers import leftovers
from tests.helpers.escape import TIME_FACTOR
from tests.helpers.waiting import eventually

pytestmark = [pytest.mark.needs("jail")]

# More than there are standbys of one kind: those forked before something was planted, and those forked after it.
LOOKS = 12


def is_warm(done: Outcome) -> bool:
    return "template" in done.record.isolation.applied


def until_warm(call: Callable[[], Outcome], within_s: float = 60.0) -> Outcome:
    """Call until a template serves this kind."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        done = call()
        if is_warm(done):
            return done
        time.sleep(0.05)
    raise AssertionError(f"no template within {within_s:.0f} s: {done.record.isolation}")


@pytest.fixture
def python(state_root: Path) -> Iterator[Sandbox]:
    with Sandbox("python", state=state_root) as made:
        yield made


# -- nothing of one call is visible to the next ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", leftovers.KINDS)
def test_what_a_function_leaves_behind_is_not_there_for_the_next(python: Sandbox, kind: str) -> None:
    act = leftovers.act_table()
    until_warm(lambda: python.call(act, False, kind))
    for _ in range(3):
        assert is_warm(python.call(act, True, kind))
    for _ in range(LOOKS):
        done = python.call(act, False, kind)
        assert done.unwrap() == []
        assert is_warm(done)


@pytest.mark.parametrize("kind", ["files", "processes", "shared_memory", "process"])
def test_the_probes_do_find_what_the_same_call_planted(python: Sandbox, kind: str) -> None:
    act = leftovers.act_table()

    def both() -> list[str]:
        act(True, kind)
        return act(False, kind)

    assert python.call(both).unwrap()


PLANT = r"""
for place in /tmp /var/tmp "$HOME" /dev/shm /workspace; do echo secret > "$place/.planted"; done
(trap '' TERM HUP; setsid sleep 1000 >/dev/null 2>&1 &)
export PLANTED=secret; umask 777; ulimit -n 33; cd /tmp
"""
LOOK = r"""
ls -A /tmp /var/tmp "$HOME" /dev/shm /workspace | grep planted
for one in /proc/[0-9]*; do tr '\0' ' ' < "$one/cmdline" | grep '[s]leep 1000'; done
env | grep PLANTED
[ "$(umask)" = 0022 ] || echo umask
[ "$(ulimit -n)" = 1024 ] || echo ulimit
[ "$(pwd)" = /workspace ] || pwd
exit 0
"""


def test_what_a_program_leaves_behind_is_not_there_for_the_next(box: Sandbox) -> None:
    until_warm(lambda: box.run(["sh", "-c", LOOK]))
    for _ in range(3):
        assert box.run(["sh", "-c", PLANT]).ok
    for _ in range(LOOKS):
        done = box.run(["sh", "-c", LOOK])
        assert (done.stdout, done.stderr) == (b"", b"")
        assert is_warm(done)
    assert b"planted" in box.run(["sh", "-c", f"{PLANT}\n umask 022; cd /workspace\n{LOOK}"]).stdout


def test_no_two_calls_draw_the_same_numbers(python: Sandbox) -> None:
    until_warm(lambda: python.call(leftovers.draw))
    drawn = [python.call(leftovers.draw).unwrap() for _ in range(LOOKS)]
    for source in drawn[0]:
        assert len({numbers[source] for numbers in drawn}) == LOOKS, source


def test_every_call_has_namespaces_and_a_group_of_its_own(python: Sandbox) -> None:
    def held() -> dict[str, str]:
        names = leftovers.identities()
        time.sleep(0.3)  # numbers of namespaces are used again once they are gone
        return names

    until_warm(lambda: python.call(leftovers.identities))
    with ThreadPoolExecutor(6) as pool:
        done = [future.result() for future in [pool.submit(python.call, held) for _ in range(6)]]
    host = leftovers.identities()
    for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup"):
        assert len({one.unwrap()[name] for one in done} | {host[name]}) == len(done) + 1, name


# -- sealed as without a template ------------------------------------------------------------------------------------


def test_a_warm_function_is_sealed_as_a_cold_one(python: Sandbox, state_root: Path) -> None:
    warm = until_warm(lambda: python.call(leftovers.sealed))
    with Sandbox("python", state=state_root, warm=False) as other:
        cold = other.call(leftovers.sealed)
    assert (is_warm(warm), is_warm(cold)) == (True, False)
    ours, theirs = warm.unwrap(), cold.unwrap()
    for facts in (ours, theirs):
        # Each jail has an own uid outside, which its maps and mounts name.
        facts["uid_map"], facts["gid_map"] = (" ".join(facts[name].split()[::2]) for name in ("uid_map", "gid_map"))
        facts["mounts"] = re.sub(r"[ug]id=[0-9]+", "", facts["mounts"])
    # What exec leaves ignored: glibc's own two signals, which no program uses.
    glibcs = 1 << 31 | 1 << 32
    ours["SigIgn"], theirs["SigIgn"] = (f"{int(facts['SigIgn'], 16) & ~glibcs:x}" for facts in (ours, theirs))
    differing = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
    assert not differing
    assert (ours["NoNewPrivs"], ours["Seccomp"], ours["CapBnd"]) == ("1", "2", "0" * 16)


def test_a_warm_program_is_sealed_as_a_cold_one(box: Sandbox, state_root: Path) -> None:
    script = (
        "grep -E '^(Cap|NoNewPrivs|Seccomp|Groups)' /proc/self/status; cat /proc/self/limits;"
        " cut -d' ' -f4-6,8- /proc/self/mountinfo | sed -E 's/[ug]id=[0-9]+//g' | sort;"
        " read inside outside count < /proc/self/uid_map; echo $inside $count;"
        " cat /proc/self/cgroup; cat /proc/net/dev | wc -l; id"
    )
    warm = until_warm(lambda: box.run(["sh", "-c", script]))
    with Sandbox("shell", state=state_root, warm=False) as other:
        cold = other.run(["sh", "-c", script])
    assert (is_warm(warm), is_warm(cold)) == (True, False)
    assert warm.ok
    assert warm.text.splitlines() == cold.text.splitlines()
    assert warm.text.count("0000000000000000") == 5


def test_warm_and_cold_records_list_the_same_protection(box: Sandbox, state_root: Path) -> None:
    warm = until_warm(lambda: box.run(["true"])).record
    with Sandbox("shell", state=state_root, warm=False) as other:
        cold = other.run(["true"]).record
    assert list(warm.isolation.missing) == list(cold.isolation.missing) == []
    assert warm.enforcement == cold.enforcement
    sealing = {"namespaces", "capabilities", "no_new_privs", "seccomp", "rlimits", "close_fds"}
    assert sealing <= set(warm.isolation.applied)
    assert sealing <= set(cold.isolation.applied)


@pytest.mark.needs("cgroup")
def test_memory_and_pids_hold_for_warm_calls(state_root: Path) -> None:
    def grow(mebibytes: int) -> int:
        data = bytearray(mebibytes << 20)
        data[::4096] = b"x" * len(data[::4096])
        return len(data) >> 20

    def fork(count: int) -> int:
        for made in range(count):
            try:
                if os.fork() == 0:
                    time.sleep(60)
            except BlockingIOError:
                return made
        return count

    with Sandbox("python", state=state_root, memory="128MiB", disk="64MiB", pids=20) as box:
        until_warm(lambda: box.call(grow, 1))
        until_warm(lambda: box.call(fork, 1))
        assert [box.call(grow, 40).unwrap(), box.call(fork, 10).unwrap()] == [40, 10]
        done = box.call(grow, 300)
        assert (is_warm(done), done.ending.kind) == (True, "limit:memory")
        done = box.call(fork, 40)
        # Without warm start the jail's pid 1 is one more task beside the tool.
        assert is_warm(done)
        assert 19 <= done.unwrap() <= 20


# -- the reply is the end --------------------------------------------------------------------------------------------


def test_what_a_function_used_is_on_record_although_its_outcome_does_not_wait_for_its_death(python: Sandbox) -> None:
    def work(rounds: int) -> int:
        data = bytearray(24 << 20)
        data[::4096] = b"x" * len(data[::4096])
        print("said")
        return sum(range(rounds))

    until_warm(lambda: python.call(work, 1))
    done = python.call(work, 2_000_000)
    assert (done.unwrap(), done.stdout, done.exit_code) == (sum(range(2_000_000)), b"said\n", 0)
    usage = done.record.usage
    assert usage.cpu_user_s > 0
    assert usage.memory_peak_bytes > 24 << 20
    failed = python.call(work, "no number")
    assert (failed.ending.kind, failed.exit_code) == ("tool_error", 1)


def test_a_function_that_leaves_others_behind_is_over_when_they_are(python: Sandbox) -> None:
    def leave(count: int) -> int:
        for _ in range(count):
            if os.fork() == 0:
                os.close(3)  # the reply's descriptor, which would keep it open
                time.sleep(60)
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return os.getpid()

    until_warm(lambda: python.call(leave, 0))
    started = time.monotonic()
    done = python.call(leave, 3)
    assert (done.unwrap(), done.exit_code) == (1, 0)
    assert time.monotonic() - started < 30
    if getattr(done.record.isolation, "cgroup", None) is not None:
        assert done.record.usage.pids_peak >= 5
        name = done.record.isolation.cgroup
        # os.walk, not a glob: that fails over groups of other calls which go while it looks.
        assert eventually(lambda: not any(name in found for _, found, _ in os.walk("/sys/fs/cgroup")))


def test_what_a_program_used_and_said_is_on_record_although_its_outcome_does_not_wait_for_pid_1(box: Sandbox) -> None:
    code = "import sys; x = bytearray(24 << 20); x[::4096] = b'x' * len(x[::4096]); sum(range(2_000_000));"
    code += "sys.stdout.buffer.write(b'y' * 3_000_001); sys.stderr.write('said')"
    until_warm(lambda: box.run(["python3", "-c", "pass"]))
    done = box.run(["python3", "-c", code])
    assert (done.exit_code, len(done.stdout), done.stderr) == (0, 3_000_001, b"said")
    usage = done.record.usage
    assert usage.cpu_user_s > 0
    assert usage.memory_peak_bytes > 24 << 20
    killed = box.run(["sh", "-c", "kill -TERM $$"])
    assert (killed.ending.kind, killed.ending.signal) == ("tool_error", 15)


def test_a_reader_that_is_slow_gets_all_that_a_program_said_before_its_end(box: Sandbox) -> None:
    read_end, write_end = os.pipe()
    until_warm(lambda: box.run(["head", "--version"]))
    count = 0
    with box.passing(["head", "-c", "400000", "/dev/zero"], {"stdout_to": write_end}) as pending:
        os.close(write_end)
        # More than both pipes hold stays with the supervisor when the program is gone.
        time.sleep(0.5)
        while data := os.read(read_end, 30_000):
            count += len(data)
            time.sleep(0.01)
        pending.take()
    os.close(read_end)
    assert count == 400_000


def test_a_program_that_leaves_others_behind_is_over_when_they_are(box: Sandbox) -> None:
    until_warm(lambda: box.run(["sh", "-c", "true"]))
    started = time.monotonic()
    leave = 'for i in 1 2 3; do setsid sleep 60 <&- >&- 2>&- & left="$left $!"; done; sleep 0.5;'
    look = "for pid in $left; do read name < /proc/$pid/comm; [ $name = sleep ] || exit 9; done"
    done = box.run(["sh", "-c", leave + look])
    assert done.exit_code == 0, "three are there when the program ends"
    assert time.monotonic() - started < 30
    if getattr(done.record.isolation, "cgroup", None) is not None:
        assert done.record.usage.pids_peak >= 5
        name = done.record.isolation.cgroup
        assert eventually(lambda: not any(name in found for _, found, _ in os.walk("/sys/fs/cgroup")))


# -- standbys --------------------------------------------------------------------------------------------------------


def test_no_standby_serves_two_calls(python: Sandbox) -> None:
    def take(mark: str) -> list[str]:
        before = os.listdir("/tmp")
        open(f"/tmp/{mark}", "w").close()
        return before

    until_warm(lambda: python.call(take, "first"))
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda number: python.call(take, f"m{number}"), range(160)))
    assert [one.unwrap() for one in done] == [[]] * len(done)
    if getattr(done[0].record.isolation, "cgroup", None) is not None:
        assert len({one.record.isolation.cgroup for one in done}) == len(done)


def test_calls_given_up_at_once_waste_no_standby_and_reach_no_tool_twice(box: Sandbox) -> None:
    until_warm(lambda: box.run(["true"]))
    for _ in range(40):
        with box.passing(["true"], {}):
            pass
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: box.run(["sh", "-c", "ls -A /tmp; touch /tmp/one"]), range(40)))
    assert [one.text for one in done] == [""] * len(done)


def test_a_crowd_of_calls_is_served_by_the_template_in_the_order_of_asking(own: Sandbox) -> None:
    count = 200
    ended: list[int] = []

    async def submit(number: int) -> bool:
        done = await own.acall(one)
        ended.append(number)
        return done.ok and is_warm(done)

    async def crowd() -> list[bool]:
        return await asyncio.gather(*map(submit, range(count)))

    until_warm(lambda: own.call(one))
    assert all(asyncio.run(crowd())), "none overruns the template, or has to be built without it"
    # Those that are being made at one time may pass each other.
    assert max(abs(place - number) for place, number in enumerate(ended)) <= 16 * (os.cpu_count() or 1)


# -- templates that die, fail, or have nothing to do -----------------------------------------------------------------


def children(pid: int) -> list[int]:
    found = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except OSError:
        return found
    return found


def below(pid: int) -> list[int]:
    direct = children(pid)
    return direct + [lower for child in direct for lower in below(child)]


def zygote(box: Sandbox) -> int:
    assert box._link is not None
    return box._link.zygote_pid


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Sandbox]:
    """A sandbox with a supervisor of its own, whose processes a test may kill."""
    with Sandbox("python", state=tmp_path) as made:
        yield made


def one() -> int:
    return 1


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


@pytest.mark.parametrize("kind", ["function", "program"])
def test_calls_go_on_after_a_template_was_killed(own: Sandbox, kind: str) -> None:
    def call() -> Outcome:
        return own.call(one) if kind == "function" else own.run(["true"])

    until_warm(call)
    for _ in range(2):
        # Everything below the zygote's builders: templates and their standbys, in no order.
        kill_all([lower for builder in children(zygote(own)) for lower in below(builder)])
        for _ in range(5):
            assert call().ok
        until_warm(call)


def test_calls_go_on_after_builders_were_killed(own: Sandbox) -> None:
    until_warm(lambda: own.run(["true"]))
    others = below(zygote(own))
    kill_all(children(zygote(own)))
    # Their jails die with them, which takes a moment. A call that is in one by then would end with it.
    assert eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in others))
    for _ in range(5):
        assert own.run(["true"]).ok
    until_warm(lambda: own.run(["true"]))


def test_killed_standbys_are_replaced(own: Sandbox) -> None:
    def standbys() -> list[int]:
        return [pid for builder in children(zygote(own)) for top in children(builder) for pid in below(top)]

    until_warm(lambda: own.run(["true"]))
    for _ in range(3):
        assert eventually(lambda: bool(standbys()))
        kill_all(standbys())
        done = own.run(["true"])
        assert done.ok, done
    assert is_warm(until_warm(lambda: own.run(["true"])))


def test_an_idle_runtime_keeps_neither_standbys_nor_templates(own: Sandbox) -> None:
    until_warm(lambda: own.run(["true"]))
    until_warm(lambda: own.call(one))
    assert below(zygote(own))
    assert eventually(lambda: not below(zygote(own)), within_s=40)
    assert own.run(["true"]).ok
    assert own.call(one).value == 1


def test_standbys_follow_demand_and_are_bounded(own: Sandbox) -> None:
    def nap() -> int:
        time.sleep(0.02)
        return 1

    until_warm(lambda: own.call(nap))
    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(lambda _: own.call(nap).ok, range(100)))
    assert eventually(lambda: 1 <= len(below(zygote(own))) <= 2 + 1 + 8, within_s=10)


# -- imports ---------------------------------------------------------------------------------------------------------

IMPORTED = """
import errno, os, socket, ssl, random, tempfile, threading, time

AT_IMPORT = {"ssl": ssl.RAND_bytes(8).hex(), "tempfile": next(tempfile._get_candidate_names())}
TRIED = {}


def tried(name, action, *args):
    try:
        action(*args)
        TRIED[name] = "done"
    except OSError as error:
        TRIED[name] = errno.errorcode.get(error.errno, "?")


def connect(address):
    with socket.socket() as client:
        client.settimeout(2)
        client.connect(address)


def try_all():
    # 192.0.2.1 is an address of no host (RFC 5737).
    tried("connect", connect, ("192.0.2.1", 80))
    for place in ("/", "/usr", "/etc", os.path.dirname(__file__), "/sys", "/proc/sys/kernel/hostname"):
        is_directory = os.path.isdir(place)
        target, flags = (f"{place}/probe", os.O_CREAT) if is_directory else (place, 0)
        tried(place, lambda: os.close(os.open(target, os.O_WRONLY | flags)))
    open("/tmp/written-at-import", "w").close()


# The caller imports this module, too.
if os.path.isdir("/run/sandbox/lib"):
    try_all()
ENVIRONMENT = dict(os.environ)
PIDS = [name for name in os.listdir("/proc") if name.isdecimal()]
UIDS = (os.getuid(), os.geteuid())


def seen():
    now = {"ssl": ssl.RAND_bytes(8).hex(), "tempfile": next(tempfile._get_candidate_names())}
    return {"at_import": AT_IMPORT, "now": now, "tried": TRIED, "environment": ENVIRONMENT, "pids": PIDS,
            "uids": UIDS, "tmp": os.listdir("/tmp")}
"""
FAILING = "raise RuntimeError('this module cannot be imported')"
ENDING = "import os; os._exit(3)"
HANGING = "import os, time; os.path.exists('/tmp') and time.sleep(3600)"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment with modules of ours. Not below /tmp: each jail has a /tmp of its own."""
    cache = Path(__file__).resolve().parents[2] / ".cache"
    if str(cache).startswith(("/tmp/", "/var/tmp/", "/dev/shm/", "/home/user/")):
        pytest.skip(f"{cache} lies where each jail has a place of its own: its Python has no templates")
    cache.mkdir(exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="environment-", dir=cache))
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "venv"], check=True, timeout=120)
        packages = next((place / "venv" / "lib").glob("python3*")) / "site-packages"
        roots = [str(Path(__file__).resolve().parents[2])]
        roots += [path for path in sys.path if path.endswith("-packages")]
        (packages / "roots.pth").write_text("\n".join(roots))
        for name, text in (("seen", IMPORTED), ("failing", FAILING), ("ending", ENDING), ("hanging", HANGING)):
            (packages / f"probe_{name}.py").write_text(text)
        yield place / "venv" / "bin" / "python"
    finally:
        shutil.rmtree(place)


def in_environment(python: Path, state: Path, script: str) -> Any:
    """What a caller in that environment prints as JSON. `box` is a sandbox, `warm` as above."""
    prelude = """
    import json, os, sys, time
    from sandbox import Sandbox, ToolFailed
    def is_warm(done):
        return "template" in done.record.isolation.applied
    def warm(call):
        deadline = time.monotonic() + 60
        while not is_warm(done := call()):
            assert time.monotonic() < deadline, done.record.isolation
            time.sleep(0.05)
        return done
    """
    text = textwrap.dedent(prelude) + f"with Sandbox('python', state={str(state)!r}) as box:\n"
    text += textwrap.indent(textwrap.dedent(script), "    ")
    done = subprocess.run([python, "-c", text], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(200)
def test_a_modules_import_reaches_nothing_and_what_it_drew_is_drawn_by_no_call(
    environment: Path, tmp_path: Path
) -> None:
    script = """
    os.environ["CALLERS_SECRET"] = "1"
    import probe_seen
    warm(lambda: box.call(probe_seen.seen))
    print(json.dumps([box.call(probe_seen.seen).unwrap() for _ in range(5)]))
    """
    calls = in_environment(environment, tmp_path, script)
    first = calls[0]
    assert first["at_import"] == calls[1]["at_import"], "the template has imported it once for all of them"
    for source in first["now"]:
        numbers = {one["now"][source] for one in calls} | {first["at_import"][source]}
        assert len(numbers) == len(calls) + 1, source
    assert first["tried"].pop("connect") in ("ENETUNREACH", "ECONNREFUSED")
    assert set(first["tried"].values()) <= {"EROFS", "EACCES", "EPERM", "ENOENT"}, first["tried"]
    assert "CALLERS_SECRET" not in first["environment"]
    assert len(first["pids"]) == 2, "of its own namespace: its first process, and itself"
    assert 0 not in first["uids"]
    assert [one["tmp"] for one in calls] == [[]] * len(calls)


@pytest.mark.timeout(200)
def test_a_module_that_cannot_be_imported_is_the_functions_own_error_and_on_record(
    environment: Path, tmp_path: Path
) -> None:
    script = """
    def use():
        import probe_failing
    done = warm(lambda: box.call(use))
    try:
        done.unwrap()
    except ToolFailed as error:
        print(json.dumps([error.type_name, error.message, done.ending.kind, list(done.record.isolation.notes)]))
    """
    name, message, kind, notes = in_environment(environment, tmp_path, script)
    assert (name, kind) == ("RuntimeError", "tool_error")
    assert "this module cannot be imported" in message
    assert notes == ["import of probe_failing in the template: RuntimeError"]


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["ending", "hanging"])
def test_a_module_whose_import_ends_or_never_ends_costs_only_the_functions_that_use_it(
    environment: Path, tmp_path: Path, name: str
) -> None:
    script = f"""
    def use(imports):
        if imports:
            import probe_{name}
        return 1
    def other():
        return 2
    kinds = [box.call(use, False).ending.kind for _ in range(6)]
    time.sleep(0.5)
    kinds += [box.call(use, False).ending.kind for _ in range(6)]
    done = warm(lambda: box.call(other))
    with Sandbox('python', wall_time="{2 * TIME_FACTOR}s", state=box.state) as short:
        last = short.call(use, True)
    print(json.dumps([sorted(set(kinds)), done.value, last.ending.kind, last.ending.exit_code]))
    """
    kinds, value, ending, code = in_environment(environment, tmp_path, script)
    assert (kinds, value) == (["ok"], 2)
    assert (ending, code) == (("tool_error", 3) if name == "ending" else ("limit:wall_time", None))
