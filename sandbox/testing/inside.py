"""Checks of least privilege and of what a call finds inside: files, processes, privileges, system calls, leftovers."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sandbox.errors import ToolFailed
from sandbox.testing.stage import PRELUDE, TIME_FACTOR, NotTried, Stage

# What a wall may answer to a system call that it does not let through.
_NO = ("EPERM", "ENOSYS", "EACCES")


def no_environment(stage: Stage) -> None:
    os.environ["SANDBOX_CHECK_PLANTED"] = "yes"
    try:
        code = "answer(os.environ.get('SANDBOX_CHECK_PLANTED'))"
        assert stage.ask(code) is None, "a variable of the caller's is there"
        allowed = stage.ask(code, environment={"allow": ["SANDBOX_CHECK_PLANTED"]})
        assert allowed == "yes", f"a variable that was allowed is {allowed!r}"
        assert set(stage.ask("answer(sorted(os.environ))")) <= _VARIABLES, "variables that nobody named"
    finally:
        del os.environ["SANDBOX_CHECK_PLANTED"]


_VARIABLES = {"HOME", "LANG", "LC_CTYPE", "LOGNAME", "PATH", "PWD", "SHELL", "USER"}


def no_descriptors(stage: Stage) -> None:
    found = stage.ask("answer([n for n in range(3, 256) if refusal(os.fstat, n) == ''])")
    assert found == [], f"descriptors are open: {found}"
    assert stage.ask("a, b = os.pipe(); os.write(b, b'x'); answer(len(os.read(a, 1)))") == 1


def no_host_files(stage: Stage) -> None:
    path = stage.file("private/secret", "top")
    code = f"answer([refusal(open, {path!r}), os.path.exists({path!r}) and open({path!r}).read()])"
    refused, text = stage.ask(code)
    assert (refused, text) == ("ENOENT", False), f"a file that nobody granted: {refused} {text}"
    refused, text = stage.ask(code, filesystem={"read": [os.path.dirname(path)]})
    assert (refused, text) == ("", "top"), f"the granted file: {refused} {text}"


def read_is_not_write(stage: Stage) -> None:
    path = stage.file("shown/file", "before")
    code = f"answer([refusal(open, {path!r}, 'w'), refusal(os.unlink, {path!r})])"
    found = stage.ask(code, filesystem={"read": [os.path.dirname(path)]})
    assert found == ["EROFS", "EROFS"], f"writing to what may be read: {found}"
    assert Path(path).read_text() == "before"


def write_grant_belongs_to_the_caller(stage: Stage) -> None:
    directory = stage.directory("open")
    made_inside = f"{directory}/made"
    code = f"open({made_inside!r}, 'w').write('inside'); answer(os.stat({made_inside!r}).st_uid == os.getuid())"
    assert stage.ask(code, filesystem={"write": [":workspace", directory]})
    made = Path(directory, "made")
    assert made.read_text() == "inside"
    assert made.stat().st_uid == os.geteuid(), f"the file belongs to {made.stat().st_uid}"


def deny_wins(stage: Stage) -> None:
    path, other = stage.file("mixed/.env", "secret"), stage.file("mixed/plain", "plain")
    code = f"answer([refusal(open, {path!r}), open({other!r}).read()])"
    grant = [os.path.dirname(path)]
    refused, text = stage.ask(code, filesystem={"read": grant, "deny": ["**/.env"]})
    assert (refused, text) == ("EACCES", "plain"), f"denied: {refused}, beside it: {text}"
    assert stage.ask(code, filesystem={"read": grant})[0] == "", "not denied, yet refused"


def read_only_root(stage: Stage) -> None:
    code = (
        "answer([refusal(open, place + '/planted', 'w') for place in ('/', '/usr', '/usr/bin', '/etc', '/run', '/dev')]"
        " + [refusal(open, place + '/made', 'w') for place in ('/tmp', '/workspace', '/dev/shm', os.environ['HOME'])])"
    )
    found = stage.ask(code)
    assert set(found[:6]) <= {"EROFS", "EACCES", "EPERM"}, f"the root can be written: {found[:6]}"
    assert found[6:] == [""] * 4, f"private places: {found[6:]}"


def no_privileges(stage: Stage) -> None:
    code = """
import ctypes
status = dict(line.split(':', 1) for line in open('/proc/self/status').read().splitlines() if ':' in line)
get_no_new_privs = 39
answer([os.getuid(), *(int(status.get(name, '0'), 16) for name in ('CapEff', 'CapPrm', 'CapBnd', 'CapAmb')),
        ctypes.CDLL(None).prctl(get_no_new_privs, 0, 0, 0, 0), refusal(os.setuid, 0), refusal(os.chroot, '/tmp'),
        os.getgroups()])
"""
    uid, *rest = stage.ask(code)
    assert uid != 0, "the tool is root inside"
    assert rest[:5] == [0, 0, 0, 0, 1], f"capabilities and no_new_privs: {rest[:5]}"
    assert {rest[5], rest[6]} <= {*_NO, "EINVAL"}, f"setuid(0) and chroot: {rest[5:7]}"
    assert rest[7] in ([], [uid]), f"groups of the host: {rest[7]}"


def never_host_root(stage: Stage) -> None:
    seconds = f"30.{time.monotonic_ns()}"
    with stage.box() as box, box.stream(["sleep", seconds]) as stream:
        uid = _uid_of_sleeper(f"sleep\0{seconds}\0".encode())
        stream.signal(15)
    if uid == -1:
        raise NotTried("the tool to be a process of the host's kernel: under another kernel it is none")
    assert uid != 0, "the kernel knows the tool as root"


def _uid_of_sleeper(line: bytes) -> int:
    own = os.readlink("/proc/self/ns/pid")
    deadline = time.monotonic() + 10 * TIME_FACTOR
    while time.monotonic() < deadline:
        for entry in Path("/proc").iterdir():
            try:
                is_sleeper = entry.name.isdigit() and (entry / "cmdline").read_bytes() == line
                if is_sleeper and os.readlink(entry / "ns/pid") != own:
                    return entry.stat().st_uid
            except OSError:
                continue
        time.sleep(0.05)
    return -1


def system_calls(stage: Stage) -> None:
    if os.uname().machine != "x86_64":
        raise NotTried("numbers of system calls are those of x86-64 here")
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    if libc.syscall(number, *args) < 0: return errno.errorcode[ctypes.get_errno()]
    return ''
answer({'unshare': call(272, 0x10000000), 'bpf': call(321, 0, 0, 0), 'io_uring_setup': call(425, 1, 0),
        'keyctl': call(250, 0, 0, 0), 'ptrace': call(101, 16, 1, 0, 0),
        'mount': call(165, b'x', b'/tmp', b'tmpfs', 0, 0),
        'perf_event_open': call(298, 0, 0, 0, 0, 0), 'userfaultfd': call(323, 0), 'getpid': call(39)})
"""
    found = stage.ask(code)
    assert found.pop("getpid") == "", "an everyday system call is refused"
    passed = {name: answer for name, answer in found.items() if answer not in _NO}
    assert not passed, f"system calls that are not refused: {passed}"


def sockets(stage: Stage) -> None:
    code = """
import socket
kinds = {'packet': (17, 3), 'netfilter': (16, 3, 12), 'raw': (2, 3, 1), 'vsock': (40, 1)}
found = {name: refusal(socket.socket, *kind) for name, kind in kinds.items()}
a, b = socket.socketpair(); a.send(b'x')
answer([found, b.recv(1) == b'x'])
"""
    found, works = stage.ask(code)
    passed = {name: answer for name, answer in found.items() if answer not in (*_NO, "EAFNOSUPPORT", "EPROTONOSUPPORT")}
    assert not passed, f"sockets that are not refused: {passed}"
    assert works, "a socket pair is refused"


def no_neighbours(stage: Stage) -> None:
    code = """
pids = [int(name) for name in os.listdir('/proc') if name.isdigit()]
answer([len(pids), refusal(os.kill, 1, 9) if os.getpid() != 1 else 'EPERM', os.uname().nodename, os.getpid() in pids])
"""
    count, refused, name, sees_itself = stage.ask(code)
    assert count < 12, f"{count} processes are in sight"
    assert refused in ("EPERM", ""), f"killing the first process: {refused}"
    assert sees_itself
    assert name != os.uname().nodename, "the host's name is in sight"


def masked_proc(stage: Stage) -> None:
    code = """
def read(path):
    with open(path, 'rb') as file: return len(file.read(64))
paths = ('/proc/kcore', '/proc/keys', '/proc/timer_list', '/proc/kallsyms')
def size(path):
    try: return read(path)
    except OSError: return 0
answer([{path: size(path) for path in paths if size(path)}, refusal(open, '/proc/sys/kernel/core_pattern', 'w'),
        refusal(open, '/proc/sysrq-trigger', 'w'), read('/proc/self/status') > 0])
"""
    shown, pattern, sysrq, works = stage.ask(code)
    assert not shown, f"in sight: {shown}"
    assert pattern and sysrq, f"core_pattern {pattern!r}, sysrq-trigger {sysrq!r}"
    assert works


def single_use(stage: Stage) -> None:
    places = "places = ['/tmp', '/workspace', '/dev/shm', os.environ['HOME']]\n"
    plant = PRELUDE + places + "for place in places: open(place + '/planted', 'w')"
    look = PRELUDE + places + "answer([place for place in places if os.path.exists(place + '/planted')])"
    with stage.box() as box:
        for _ in range(2):
            assert box.run(["python3", "-I", "-c", plant]).ok
            done = box.run(["python3", "-I", "-c", look])
            assert done.text.strip() == "[]", f"an earlier call left {done.text}"


def nothing_survives(stage: Stage) -> None:
    mark = f"sandbox-check-{os.getpid()}-{time.monotonic_ns()}"
    code = f"import subprocess\nsubprocess.Popen(['sh', '-c', 'sleep 60; : {mark}'], start_new_session=True)\nanswer(1)"
    assert stage.ask(code) == 1
    deadline = time.monotonic() + 5 * TIME_FACTOR
    while left := _with_argument(mark):
        assert time.monotonic() < deadline, f"processes outlive their call: {left}"
        time.sleep(0.05)


def _with_argument(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return [pid for pid in found if int(pid) != os.getpid()]


def workspace_is_the_callers(stage: Stage) -> None:
    directory = stage.directory("project")
    options = {"workspace": directory, "workspace_mode": "rw"}
    code = (
        "open('made', 'w').write('x'); os.makedirs('.git/hooks', exist_ok=True)\n"
        "open('.git/hooks/pre-commit', 'w').write('x'); answer(os.getcwd())"
    )
    assert stage.ask(code, options=options) == directory
    assert Path(directory, "made").stat().st_uid == os.geteuid()
    assert not Path(directory, ".git/hooks/pre-commit").exists(), "a hook was left for others to run"


def changes_can_be_discarded(stage: Stage) -> None:
    directory = stage.directory("layered")
    Path(directory, "kept").write_text("before")
    options = {"workspace": directory, "workspace_mode": "cow"}
    done = stage.run(["sh", "-c", "echo after > kept; echo x > new"], options=options)
    assert done.ok, done
    assert Path(directory, "kept").read_text() == "before", "the host's file was changed"
    assert done.changes is not None
    done.changes.commit()
    assert Path(directory, "kept").read_text() == "after\n"


def streams(stage: Stage) -> None:
    done = stage.run(["sh", "-c", "cat; echo err >&2; exit 7"], options={"input": b"in" * 100_000})
    assert (done.stdout, done.stderr, done.exit_code) == (b"in" * 100_000, b"err\n", 7), done
    assert stage.run(["no-such-program"]).exit_code == 127
    assert stage.run(["sh", "-c", "kill -9 $$"]).exit_code == 137


def collected(stage: Stage) -> None:
    done = stage.run(["sh", "-c", "echo a > a.txt; ln -s /etc/passwd b.txt"], options={"collect": ["*.txt"]})
    assert done.files == {"a.txt": b"a\n"}, done.files


def _double(value: int) -> dict[str, int]:
    return {"double": 2 * value}


def _fail() -> None:
    raise ValueError("no such luck")


def _unsendable() -> object:
    import threading

    return threading.Lock()


def functions(stage: Stage) -> None:
    with stage.box() as box:
        assert box.call(_double, 21).unwrap() == {"double": 42}
        for function, expected in ((_fail, "ValueError"), (_unsendable, "UnsupportedResult")):
            try:
                box.call(function).unwrap()
            except ToolFailed as error:
                assert error.type_name == expected, error.type_name
            else:
                raise AssertionError(f"{function.__name__} came back with a value")


def recorded(stage: Stage) -> None:
    done = stage.run(["sh", "-c", "exit 3"], options={"why": "to see the record"})
    record = done.record
    assert record.isolation.launcher, "the record names no launcher"
    assert not record.isolation.missing or tuple(record.isolation.missing) == ("landlock",), record.isolation.missing
    assert done.ending.kind == "tool_error" and record.ending.kind == "tool_error"
    assert record.usage.memory_peak_bytes and record.usage.cpu_usage_s > 0, record.usage
