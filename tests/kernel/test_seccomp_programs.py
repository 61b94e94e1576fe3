"""Ordinary programs run under the real filter, and programs of foreign ABIs die by it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sandbox.seccomp import compile as compiler
from sandbox.seccomp import policy as policies

pytestmark = [pytest.mark.needs("seccomp")]

ROOT = Path(__file__).parents[2]
LAUNCH = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sandbox._linux import process, seccomp
program = open(sys.argv[2], "rb").read()
process.set_no_new_privs()
if program:
    seccomp.install(program)
os.execvp(sys.argv[3], sys.argv[3:])
"""


@pytest.fixture(scope="module")
def filter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seccomp") / "filter"
    path.write_bytes(compiler.program(policies.default_policy()))
    return path


def run(filter_file: Path | None, cwd: Path, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program under the filter, or without one."""
    program = str(filter_file) if filter_file else os.devnull
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCH, str(ROOT), program, *argv],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "LC_ALL": "C.UTF-8"},
        timeout=120,
        check=False,
    )


def works(filter_file: Path, cwd: Path, *argv: str, stdin: str = "") -> str:
    done = run(filter_file, cwd, *argv, stdin=stdin)
    if done.returncode != 0 and run(None, cwd, *argv, stdin=stdin).returncode != 0:
        pytest.skip(f"fails here without the filter as well: {done.stderr[:200]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(filter_file: Path, cwd: Path, source: str) -> str:
    return works(filter_file, cwd, sys.executable, "-W", "error", "-c", textwrap.dedent(source))


def test_python_threads_processes_and_pools_work(filter_file: Path, tmp_path: Path) -> None:
    script = tmp_path / "pools.py"
    script.write_text(
        textwrap.dedent("""
        import asyncio, concurrent.futures, multiprocessing, subprocess, threading

        def square(number):
            return number * number

        async def ask():
            process = await asyncio.create_subprocess_exec("echo", "async", stdout=subprocess.PIPE)
            return (await process.communicate())[0].decode().strip()

        if __name__ == "__main__":
            seen = []
            threads = [threading.Thread(target=seen.append, args=(n,)) for n in range(8)]
            [t.start() for t in threads]; [t.join() for t in threads]
            for method in ("fork", "spawn", "forkserver"):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    seen += pool.map(square, range(4))
            with concurrent.futures.ProcessPoolExecutor(2) as pool:
                seen += list(pool.map(square, range(4)))
            queue = multiprocessing.Queue(); queue.put(1); seen.append(queue.get(timeout=20))
            print(len(seen), subprocess.check_output(["echo", "sub"], text=True).strip(), asyncio.run(ask()))
        """)
    )
    assert works(filter_file, tmp_path, sys.executable, str(script)).split() == ["25", "sub", "async"]


def test_sqlite_shared_memory_sockets_and_files_work(filter_file: Path, tmp_path: Path) -> None:
    out = python(
        filter_file,
        tmp_path,
        """
        import mmap, os, pathlib, shutil, socket, sqlite3, tempfile
        from multiprocessing import shared_memory
        db = sqlite3.connect("x.db"); db.execute("pragma journal_mode=wal"); db.execute("create table t(a)")
        db.execute("insert into t values (1)"); db.commit(); db.close()
        memory = shared_memory.SharedMemory(create=True, size=4096); memory.close(); memory.unlink()
        a, b = socket.socketpair(); a.sendall(b"x"); assert b.recv(1) == b"x"; a.close(); b.close()
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname()); client.close(); server.close()
        socket.if_nameindex(), socket.getaddrinfo("localhost", 80)
        with tempfile.TemporaryDirectory(dir=".") as folder:
            path = pathlib.Path(folder, "f"); path.write_text("x"); path.chmod(0o755)
            shutil.copytree(folder, "copy"); os.rename("copy", "copy2"); shutil.rmtree("copy2")
        fd = os.memfd_create("m"); os.ftruncate(fd, 4096); mmap.mmap(fd, 4096).close(); os.close(fd)
        print(os.sched_getaffinity(0) and "ok")
        """,
    )
    assert out == "ok\n"


@pytest.mark.needs("python:numpy")
def test_numpy_works(filter_file: Path, tmp_path: Path) -> None:
    out = python(filter_file, tmp_path, "import numpy; a = numpy.ones((300, 300)); print(int((a @ a).sum()))")
    assert out == f"{300**3}\n"


@pytest.mark.needs("node")
def test_node_works(filter_file: Path, tmp_path: Path) -> None:
    source = (
        "const {execSync} = require('child_process'); const {Worker} = require('worker_threads');"
        "require('fs').promises.readdir('.').then(() => {"
        " const w = new Worker('require(\"worker_threads\").parentPort.postMessage(1)', {eval: true});"
        " w.on('message', () => console.log(execSync('echo hi').toString().trim())); });"
    )
    assert works(filter_file, tmp_path, "node", "-e", source) == "hi\n"


@pytest.mark.needs("git")
def test_git_works(filter_file: Path, tmp_path: Path) -> None:
    script = (
        "git init -q . && echo x > f && git add f && git -c user.name=n -c user.email=e@x commit -qm m"
        " && git gc -q && git status --porcelain && git log --oneline | wc -l"
    )
    assert works(filter_file, tmp_path, "sh", "-c", script).strip() == "1"


@pytest.mark.needs("gcc", "make")
def test_gcc_and_make_work(filter_file: Path, tmp_path: Path) -> None:
    (tmp_path / "hello.c").write_text('#include <stdio.h>\nint main(void){puts("built");return 0;}\n')
    (tmp_path / "Makefile").write_text("hello: hello.c\n\tgcc -O2 -pipe -o $@ $<\n")
    works(filter_file, tmp_path, "make", "-j2")
    assert run(filter_file, tmp_path, "./hello").stdout == "built\n"


@pytest.mark.needs("ssh-keygen")
def test_ssh_keygen_works(filter_file: Path, tmp_path: Path) -> None:
    works(filter_file, tmp_path, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "key")
    assert (tmp_path / "key.pub").read_text().startswith("ssh-ed25519")


def test_shell_pipelines_tar_and_compressors_work(filter_file: Path, tmp_path: Path) -> None:
    script = (
        "set -e; mkdir d; printf 'b\\na\\n' > d/f; mkfifo d/p; ln -s f d/l; chmod 755 d/f; install -m 644 d/f d/g;"
        " cp -a d e; rm e/p d/p; tar czf t.tgz d; rm -r d; tar xzf t.tgz; sort d/f | head -1;"
        " find . -name f | wc -l; timeout 5 true; nice true; setsid true;"
        " { date; id -u; df .; } >/dev/null"
    )
    assert works(filter_file, tmp_path, "bash", "-c", script).split() == ["a", "2"]


def build(tmp_path: Path, source: str) -> str:
    (tmp_path / "probe.c").write_text(textwrap.dedent(source))
    subprocess.run(["gcc", "-O1", "-o", "probe", "probe.c"], cwd=tmp_path, check=True, timeout=60)
    return str(tmp_path / "probe")


@pytest.mark.needs("x86_64", "gcc")
def test_i386_system_calls_kill_the_process(filter_file: Path, tmp_path: Path) -> None:
    """getpid is 20 there and 20 is writev on x86-64: a filter that did not look at the ABI would be fooled."""
    probe = build(
        tmp_path,
        """
        #include <stdio.h>
        #include <unistd.h>
        int main(void) {
            long result;
            __asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "memory", "r8", "r9", "r10", "r11");
            puts((int)result == getpid() ? "same" : "other");
            return 0;
        }
        """,
    )
    twin = run(None, tmp_path, probe)
    if twin.stdout != "same\n":
        pytest.skip("this kernel has no i386 system calls")
    assert run(filter_file, tmp_path, probe).returncode == -signal.SIGSYS


@pytest.mark.needs("x86_64", "gcc")
def test_x32_system_calls_kill_the_process(filter_file: Path, tmp_path: Path) -> None:
    probe = build(
        tmp_path,
        """
        #define _GNU_SOURCE
        #include <errno.h>
        #include <stdio.h>
        #include <stdlib.h>
        #include <unistd.h>
        int main(int count, char **args) {
            long result = syscall(strtol(args[1], 0, 16) | 39);
            printf("%s\\n", result == getpid() ? "pid" : errno == ENOSYS ? "absent" : "other");
            return 0;
        }
        """,
    )
    assert run(None, tmp_path, probe, "40000000").stdout in ("pid\n", "absent\n")
    assert run(filter_file, tmp_path, probe, "40000000").returncode == -signal.SIGSYS
    assert run(filter_file, tmp_path, probe, "0").stdout == "pid\n"


INSTALL = """
import ctypes, errno, fcntl, json, os, struct, sys, threading
sys.path.insert(0, sys.argv[1])
from sandbox._linux import process, seccomp
LD, JEQ, RET = 0x20, 0x15, 0x06
def program(nr, answer):
    parts = [(LD, 0, 0, 0), (JEQ, 0, 1, nr), (RET, 0, 0, answer), (RET, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("<HBBI", *part) for part in parts)
GETPPID = {"x86_64": 110, "aarch64": 173}[os.uname().machine]
libc = ctypes.CDLL(None, use_errno=True)
def getppid():
    ctypes.set_errno(0)
    return [libc.syscall(GETPPID), ctypes.get_errno()][1]
"""


def install(body: str) -> str:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", INSTALL + textwrap.dedent(body), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_covers_the_calling_thread_or_all() -> None:
    out = install("""
        process.set_no_new_privs()
        gate, answers = [threading.Event() for _ in range(2)], []
        def worker(event):
            event.wait()
            answers.append(getppid())
        threads = [threading.Thread(target=worker, args=(event,)) for event in gate]
        [thread.start() for thread in threads]
        seccomp.install(program(GETPPID, 0x00050000 | errno.EPERM))
        gate[0].set(); threads[0].join()
        gate[1].set(); threads[1].join()
        print(getppid(), answers)
    """)
    assert out == "1 [0, 0]"
    out = install("""
        process.set_no_new_privs()
        event, answers = threading.Event(), []
        thread = threading.Thread(target=lambda: (event.wait(), answers.append(getppid())))
        thread.start()
        assert seccomp.install(program(GETPPID, 0x00050000 | errno.EPERM), tsync=True) is None
        event.set(); thread.join()
        print(getppid(), answers)
    """)
    assert out == "1 [1]"


def test_install_with_notify_returns_a_close_on_exec_listener() -> None:
    out = install("""
        process.set_no_new_privs()
        fd = seccomp.install(program(GETPPID, 0x7FC00000), notify=True)
        print(fd > 2, fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC)
        try:
            seccomp.install(program(GETPPID, 0x7FC00000), notify=True)
        except OSError as error:
            print(errno.errorcode[error.errno], str(error).split(":")[0])
    """)
    assert out.split("\n") == ["True True", "EBUSY [Errno 16] seccomp SET_MODE_FILTER"]


def test_install_refuses_what_is_no_program() -> None:
    out = install("""
        process.set_no_new_privs()
        for bad in (b"", b"1234567", struct.pack("<HBBI", LD, 0, 0, 0), bytes(8 * 4097)):
            try:
                seccomp.install(bad)
            except OSError as error:
                print(errno.errorcode[error.errno])
        print(getppid())
    """)
    assert out.split() == ["EINVAL"] * 4 + ["0"]


NO_NEW_PRIVS = "NoNewPrivs:\t1" in Path("/proc/self/status").read_text()


@pytest.mark.skipif(NO_NEW_PRIVS, reason="no_new_privs is set already and is inherited")
def test_install_needs_no_new_privs() -> None:
    out = install("""
        if os.geteuid() == 0:
            process.drop_all_caps(process.last_cap())
        try:
            seccomp.install(program(GETPPID, 0x00050001))
        except OSError as error:
            print(errno.errorcode[error.errno])
        process.set_no_new_privs()
        seccomp.install(program(GETPPID, 0x00050001))
        print(getppid())
    """)
    assert out.split() == ["EACCES", "1"]


def test_probe_changes_nothing_and_names_what_is_there() -> None:
    out = install("""
        facts = seccomp.probe()
        print(facts["filter"], {"errno", "user_notif", "kill_process"} <= set(facts["actions"]),
              {"tsync", "new_listener"} <= set(facts["flags"]), repr(facts["error"]))
        print([line for line in open("/proc/self/status") if line.startswith("Seccomp:")][0].split()[1])
    """)
    before = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Seccomp:")]
    assert out.split("\n") == ["True True True ''", before[0].split()[1]]


def test_probe_says_when_a_filter_around_us_refuses() -> None:
    out = install("""
        process.set_no_new_privs()
        seccomp.install(program(seccomp._NUMBERS[os.uname().machine], 0x00050000 | errno.EPERM))
        facts = seccomp.probe()
        print(facts["filter"], facts["error"])
    """)
    assert out == "False EPERM"
