"""Ordinary programs work inside, under the fitting profile and without special pleading.

No test here loosens anything for its program: what a profile grants has to be enough. The wheels and packages that
some of them need are granted read-only, as a caller would do it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import Outcome, Sandbox

pytestmark = [pytest.mark.needs("jail"), pytest.mark.once]

Run = Callable[..., str]


@pytest.fixture
def run(state_root: Path) -> Iterator[Run]:
    """Run `source` as a script of `program` in an empty workspace; gives its standard output, stripped."""
    boxes: dict[str, Sandbox] = {}

    def start(profile: str, program: str, source: str, **options: Any) -> str:
        if profile not in boxes:
            boxes[profile] = Sandbox(profile, state=state_root)
        script = f"cat > .script && exec {program} .script"
        done = boxes[profile].run(["sh", "-c", script], input=textwrap.dedent(source), **options)
        return good(done)

    yield start
    for made in boxes.values():
        made.close()


def good(done: Outcome) -> str:
    """Its standard output; fails with everything that it said when it did not end well."""
    assert done.ok, f"{done!r}\n{done.text[-3000:]}\n{done.stderr.decode(errors='replace')[-3000:]}"
    return done.text.strip()


@pytest.fixture
def sh(run: Run) -> Run:
    return lambda source, **options: run("shell", "sh -eu", source, **options)


@pytest.fixture
def python(run: Run) -> Run:
    return lambda source, **options: run("python", "python3 -W error", source, **options)


def needs_inside(*programs: str) -> None:
    """Skip unless the system has these programs: the jail shows /usr, not what lies in somebody's home."""
    for name in programs:
        if shutil.which(name, path="/usr/local/bin:/usr/bin:/bin") is None:
            pytest.skip(f"needs {name}: not installed")


def packages(*names: str) -> dict[str, Any]:
    """Options that show installed packages inside, also where they lie outside the interpreter's own prefix."""
    places = set()
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            pytest.skip(f"needs python:{name}: not installed")
        place = str(Path(spec.origin).parents[1 if spec.submodule_search_locations else 0])
        if not place.startswith((sys.prefix, "/usr/lib")):
            places.add(place)
    if not places:
        return {}
    return {"read": sorted(places), "env": {"PYTHONPATH": ":".join(sorted(places)), "PYTHONDONTWRITEBYTECODE": "1"}}


def granted(options: dict[str, Any], path: Path) -> dict[str, Any]:
    return {**options, "read": [*options.get("read", ()), str(path)]}


# -- Python ---------------------------------------------------------------------------------------------------------


def test_numpy_computes_with_threads_of_its_own(run: Run) -> None:
    source = "import numpy as n; a = n.ones((400, 400)); print(int((a @ a).sum()), round(n.linalg.svd(a)[1][0]))"
    assert run("data-science", "python3", source, **packages("numpy")) == f"{400**3} 400"


def test_threads_share_queues_and_locks(python: Run) -> None:
    out = python("""
        import queue, threading
        from concurrent.futures import ThreadPoolExecutor
        q, lock, seen = queue.Queue(), threading.Lock(), []
        def work():
            while (item := q.get()) is not None:
                with lock:
                    seen.append(item)
        threads = [threading.Thread(target=work) for _ in range(32)]
        [t.start() for t in threads]; [q.put(n) for n in range(1000)]; [q.put(None) for _ in threads]
        [t.join() for t in threads]
        with ThreadPoolExecutor(16) as pool:
            print(len(seen), sum(pool.map(len, ["x"] * 100)))
    """)
    assert out == "1000 100"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_pools_managers_and_queues_work(python: Run, method: str) -> None:
    out = python(f"""
        import multiprocessing as mp
        def square(n):
            return n * n
        def fill(shared, values, q):
            shared["n"] = 1
            with values.get_lock():
                values.value += 2
            q.put("three")
        if __name__ == "__main__":
            mp = mp.get_context({method!r})
            with mp.Pool(2) as pool:
                print(sum(pool.map(square, range(10))), end=" ")
            with mp.Manager() as manager:
                shared, values, q = manager.dict(), mp.Value("i", 0), mp.Queue()
                child = mp.Process(target=fill, args=(shared, values, q))
                child.start(); word = q.get(timeout=20); child.join()
                print(shared["n"], values.value, word)
    """)
    assert out == "285 1 2 three"


def test_process_pool_executors_and_shared_memory_work(python: Run) -> None:
    out = python("""
        from concurrent.futures import ProcessPoolExecutor
        from multiprocessing import shared_memory
        def write(name):
            block = shared_memory.SharedMemory(name=name); block.buf[0] = 7; block.close()
        if __name__ == "__main__":
            block = shared_memory.SharedMemory(create=True, size=4096)
            with ProcessPoolExecutor(2) as pool:
                pool.submit(write, block.name).result()
            print(block.buf[0]); block.close(); block.unlink()
    """)
    assert out == "7"


def test_asyncio_runs_subprocesses_and_streams(python: Run) -> None:
    out = python("""
        import asyncio
        async def one(n):
            p = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
            return int((await p.communicate(str(n).encode()))[0])
        async def main():
            shell = await asyncio.create_subprocess_shell("echo out; echo err >&2; exit 3", stdout=-1, stderr=-1)
            out, err = await shell.communicate()
            print(sum(await asyncio.gather(*map(one, range(20)))), out, err, shell.returncode)
        asyncio.run(main())
    """)
    assert out == r"190 b'out\n' b'err\n' 3"


def test_sqlite_keeps_a_write_ahead_log_among_processes(python: Run) -> None:
    out = python("""
        import multiprocessing, sqlite3
        def add(n):
            with sqlite3.connect("db", timeout=20) as db:
                db.execute("insert into t values (?)", (n,))
        if __name__ == "__main__":
            db = sqlite3.connect("db")
            mode = db.execute("pragma journal_mode=wal").fetchone()[0]
            db.execute("create table t (n)"); db.commit()
            with multiprocessing.Pool(4) as pool:
                pool.map(add, range(40))
            print(mode, db.execute("select sum(n), count(*) from t").fetchone()); db.close()
    """)
    assert out == "wal (780, 40)"


def test_an_http_server_and_client_talk_inside_over_both_loopbacks(python: Run) -> None:
    out = python("""
        import http.server, socket, threading, urllib.request
        class V6(http.server.ThreadingHTTPServer):
            address_family = socket.AF_INET6
        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args): pass
        open("page", "w").write("hello")
        for kind, host, shown in ((http.server.ThreadingHTTPServer, "127.0.0.1", "127.0.0.1"), (V6, "::1", "[::1]")):
            with kind((host, 0), Quiet) as server:
                threading.Thread(target=server.serve_forever).start()
                for name in (shown, "localhost") if kind is not V6 else (shown,):
                    with urllib.request.urlopen(f"http://{name}:{server.server_port}/page", timeout=5) as answer:
                        print(answer.read().decode(), end=" ")
                server.shutdown()
    """)
    assert out == "hello hello hello"


def test_unix_sockets_datagrams_and_socket_pairs_work(python: Run) -> None:
    out = python("""
        import array, os, socket
        server = socket.socket(socket.AF_UNIX); server.bind("/tmp/s"); server.listen()
        client = socket.socket(socket.AF_UNIX); client.connect("/tmp/s"); there, _ = server.accept()
        r, w = os.pipe(); socket.send_fds(client, [b"x"], [w]); _, fds, _, _ = socket.recv_fds(there, 1, 1)
        os.write(fds[0], b"passed"); print(os.read(r, 9).decode(), end=" ")
        a = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); a.bind(("127.0.0.1", 0))
        a.sendto(b"udp", a.getsockname()); print(a.recv(9).decode(), end=" ")
        b = socket.socket(socket.AF_UNIX); b.bind("\\0abstract"); b.listen()
        c = socket.socket(socket.AF_UNIX); c.connect("\\0abstract")
        x, y = socket.socketpair(); x.send(b"pair"); print(y.recv(9).decode(), [n for _, n in socket.if_nameindex()])
        [s.close() for s in (server, client, there, a, b, c, x, y)]
    """)
    assert out == "passed udp pair ['lo']"


def test_shared_memory_semaphores_and_message_queues_work(python: Run) -> None:
    out = python("""
        import _posixshmem, ctypes, mmap, os
        libc = ctypes.CDLL(None, use_errno=True)
        fd = _posixshmem.shm_open("/here", os.O_CREAT | os.O_RDWR, mode=0o600); os.ftruncate(fd, 8192)
        with mmap.mmap(fd, 8192) as m:
            m[:2] = b"ok"; print(os.path.exists("/dev/shm/here"), end=" ")
        os.close(fd); _posixshmem.shm_unlink("/here")
        libc.sem_open.restype = ctypes.c_void_p
        sem = libc.sem_open(b"/sem", os.O_CREAT, 0o600, 1)
        assert sem, ctypes.get_errno()
        sem = ctypes.c_void_p(sem)
        print(libc.sem_wait(sem), libc.sem_post(sem), libc.sem_unlink(b"/sem"), end=" ")
        shm = libc.shmget(0, 4096, 0o1600); print(shm >= 0, libc.shmctl(shm, 0, None), end=" ")
        queue = libc.mq_open(b"/q", os.O_CREAT | os.O_RDWR, 0o600, None)
        assert queue >= 0, ctypes.get_errno()
        print(libc.mq_unlink(b"/q"))
    """)
    assert out == "True 0 0 0 True 0 0"


def test_files_of_every_kind_work_in_the_workspace(python: Run) -> None:
    out = python("""
        import fcntl, os, shutil, stat, tempfile, threading
        name = "ünïcödé 文件 \\U0001f600"
        open(name, "w").write("x"); os.link(name, "hard"); os.symlink("hard", "soft")
        print(os.stat("hard").st_nlink, os.path.realpath("soft") == os.path.abspath("hard"), end=" ")
        os.mkfifo("fifo")
        threading.Thread(target=lambda: open("fifo", "w").write("through")).start()
        print(open("fifo").read(), end=" ")
        with open("hard", "r+") as f:
            fcntl.flock(f, fcntl.LOCK_EX); fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            pid = os.fork()
            if pid == 0:
                try:
                    fcntl.lockf(open("hard", "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os._exit(7)
                os._exit(0)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), end=" ")
        with tempfile.TemporaryDirectory() as d, tempfile.NamedTemporaryFile(dir=d) as f, tempfile.TemporaryFile() as g:
            shutil.copy("hard", d); print(d.startswith("/tmp/"), oct(os.stat(d).st_mode & 0o777), end=" ")
        os.makedirs("a/b/c"); shutil.copytree("a", "z"); shutil.move("z", "y"); shutil.rmtree("y")
        os.chmod("hard", 0o755); os.utime("hard", (1, 1)); os.truncate("hard", 100); os.setxattr("hard", "user.a", b"b")
        print(os.getxattr("hard", "user.a").decode(), os.stat("hard").st_size, len(os.listdir(os.fsencode("."))))
    """)
    assert out == "2 True through 7 True 0o700 b 100 6"


def test_mmap_inotify_eventfd_and_signalfd_work(python: Run) -> None:
    out = python("""
        import ctypes, mmap, os, select, signal, struct
        with open("m", "w+b") as f:
            f.truncate(1 << 20)
            with mmap.mmap(f.fileno(), 0) as m:
                m[-2:] = b"ok"; m.flush()
            f.seek(-2, 2); print(f.read().decode(), end=" ")
        with mmap.mmap(-1, 64 << 20) as m:
            m[::4096] = b"x" * (64 << 8)
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.inotify_init1(0); libc.inotify_add_watch(fd, b".", 0x100); open("new", "w").close()
        print(b"new" in os.read(fd, 4096), end=" ")
        event = os.eventfd(3); print(os.eventfd_read(event), end=" ")
        memory = os.memfd_create("m"); os.write(memory, b"x"); print(os.fstat(memory).st_size, end=" ")
        p = select.epoll(); p.register(event, select.EPOLLOUT); print(len(p.poll(1)))
    """)
    assert out == "ok True 3 1 1"


def test_resource_limits_and_the_machine_can_be_asked_for(python: Run) -> None:
    out = python("""
        import getpass, grp, os, platform, pwd, resource, socket, sys, time
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE); resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        assert os.cpu_count() >= 1 and os.sched_getaffinity(0) and os.getloadavg() and os.sysconf("SC_PAGE_SIZE")
        assert time.clock_gettime(time.CLOCK_MONOTONIC) and platform.platform() and os.uname() and platform.libc_ver()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss and os.statvfs(".").f_bavail and os.times()
        os.nice(5); os.getpriority(os.PRIO_PROCESS, 0)
        print(getpass.getuser(), pwd.getpwuid(os.getuid()).pw_dir, grp.getgrgid(os.getgid()).gr_name,
              os.path.expanduser("~"), socket.gethostname(), socket.gethostbyname(socket.gethostname()), os.getcwd())
        os.mkdir(os.path.expanduser("~/made"))
    """)
    assert out == "user /home/user user /home/user sandbox 127.0.0.1 /workspace"


def test_signals_timers_and_children_behave(python: Run) -> None:
    out = python("""
        import os, signal, subprocess, sys, time
        seen = []
        for s in (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
            signal.signal(s, lambda n, f: seen.append(n))
        os.kill(os.getpid(), signal.SIGUSR1); signal.raise_signal(signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
        child = subprocess.Popen(["sleep", "60"], start_new_session=True)
        os.killpg(child.pid, signal.SIGINT); child.wait()
        orphan = subprocess.check_output(["sh", "-c", "(sleep 0.05; echo $$ > orphan) >/dev/null 2>&1 & echo gone"])
        print(sorted({signal.Signals(n).name for n in seen}), child.returncode, orphan)
        scripts = ("exit 0", "exit 255", "kill -9 $$", "kill -SEGV $$")
        codes = [subprocess.run(["sh", "-c", c]).returncode for c in scripts]
        while not os.path.exists("orphan"): time.sleep(0.01)
        print(codes)
    """)
    assert out.splitlines() == [
        r"['SIGALRM', 'SIGCHLD', 'SIGTERM', 'SIGUSR1'] -2 b'gone\n'",
        "[0, 255, -9, -11]",
    ]


def test_time_zones_and_locales_work(python: Run, sh: Run) -> None:
    assert sh("TZ=Asia/Tokyo date -d @0 '+%H %Z'; TZ=UTC date -d @0 +%H; date +%Z >/dev/null") == "09 JST\n00"
    zones = Path("/usr/share/zoneinfo/Europe/Berlin").exists()
    if not zones:
        pytest.skip("needs the system's time zone data")
    out = python("""
        import datetime, locale, os, time, zoneinfo
        when = datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
        print(when.utcoffset(), end=" ")
        os.environ["TZ"] = "America/New_York"; time.tzset(); print(time.localtime(0).tm_hour, end=" ")
        print(locale.setlocale(locale.LC_ALL, ""), locale.getencoding())
    """)
    assert out == "2:00:00 19 C.UTF-8 UTF-8"


def test_a_time_zone_and_a_locale_of_the_callers_come_in(state_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "C")
    with Sandbox("shell", state=state_root) as box:
        assert good(box.run(["sh", "-c", "date -d @0 +%H; echo $LC_ALL"])) == "09\nC"


def test_large_arguments_and_environments_pass(box: Sandbox) -> None:
    # A single string is limited by the kernel to 128 KiB (MAX_ARG_STRLEN), all together to a quarter of the stack.
    many = [f"{n:06}" for n in range(60_000)]
    count = ["python3", "-c", "import sys, os; print(len(sys.argv), len(sys.argv[-1]), len(os.environ['BIG']))"]
    done = box.run([*count, *many, "x" * 131_000], env={"BIG": "y" * 100_000})
    assert good(done) == "60002 131000 100000"


def test_every_byte_of_binary_standard_input_arrives(box: Sandbox) -> None:
    data = bytes(range(256)) * 40_000 + b"\x04\x03\xff\x00"
    done = box.run(["sha256sum"], input=data)
    assert good(done).split()[0] == hashlib.sha256(data).hexdigest()
    assert box.run(["cat"], input=data).stdout == data
    assert box.run(["cat"]).stdout == b""


def test_fifty_megabytes_of_output_come_out_whole(box: Sandbox) -> None:
    done = box.run(["sh", "-c", "yes 0123456789abcdef | head -c 50000000; echo end >&2"])
    assert done.ok
    assert done.stderr == b"end\n"
    expected = (b"0123456789abcdef\n" * (50_000_000 // 17 + 1))[:50_000_000]
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(expected).digest()
    assert done.record.output.stdout_bytes == 50_000_000


def test_exit_codes_and_signals_are_the_programs_own(box: Sandbox) -> None:
    assert [box.run(["sh", "-c", f"exit {n}"]).exit_code for n in (0, 1, 7, 255)] == [0, 1, 7, 255]
    for number in (6, 9, 11, 15):
        ended = box.run(["sh", "-c", f"kill -{number} $$"])
        assert (ended.exit_code, ended.ending.signal, ended.ending.kind) == (128 + number, number, "tool_error")


# -- shells and the usual tools -------------------------------------------------------------------------------------


def test_pipelines_here_documents_and_job_control_work(run: Run) -> None:
    out = run(
        "shell",
        "bash -euo pipefail",
        """
        seq 1000 | sort -rn | head -n 3 | paste -sd, -
        cat <<< here; cat <(echo process) <(echo substitution)
        find /etc -maxdepth 1 -name passwd | xargs -I{} grep -c root {}
        printf '%s\\n' b a b | sort | uniq -c | awk '{print $2 $1}' | tr '\\n' ' '
        (sleep 0.01; exit 3) & wait $! || echo "job $?"
        trap 'echo trapped' TERM; kill -TERM $$
        mkdir -p d && cd d && echo x > f && sed -i s/x/y/ f && cmp f <(echo y) && diff -u f f && echo done
        timeout 0.1 sleep 5 || echo "timeout $?"
        echo ok > /dev/stderr; echo null > /dev/null; head -c 8 /dev/urandom | wc -c
        """.replace("\n        ", "\n"),
    )
    assert out.splitlines() == [
        "1000,999,998",
        "here",
        "process",
        "substitution",
        "1",
        "a1 b2 job 3",
        "trapped",
        "done",
        "timeout 124",
        "8",
    ]


def test_tools_that_look_at_the_system_work(sh: Run) -> None:
    out = sh("""
        ps -ef | grep -c '[s]h -eu'; ps aux >/dev/null; test "$(nproc)" -ge 1; uptime >/dev/null
        df -h . /tmp /dev/shm >/dev/null; df >/dev/null; free >/dev/null; id -un; whoami; hostname; uname -s
        tty || true; env >/dev/null; groups; pgrep -x sh >/dev/null; kill -0 $$; ls -la / /proc /dev >/dev/null
        stat -c %U . ; du -sh .
        lscpu >/dev/null; nice -n 3 true; sync .script; umask; getconf PAGESIZE >/dev/null; which sh >/dev/null
        cat /proc/self/status /proc/meminfo /proc/cpuinfo /proc/self/mountinfo /proc/self/cgroup >/dev/null
    """)
    assert out.split("\n")[:6] == ["1", "user", "user", "sandbox", "Linux", "not a tty"]
    assert "user\n4.0K\t." in out


def test_top_works(sh: Run) -> None:
    needs_inside("top")
    assert "Tasks:" in sh("top -b -n1")


def test_archives_and_compression_work(sh: Run) -> None:
    needs_inside("xz", "bzip2")
    out = sh("""
        mkdir t; echo data > t/a; ln -s a t/l; ln t/a t/h; chmod 750 t
        for z in gzip xz bzip2; do tar -c --$z -f t.$z t; mkdir x$z; tar -x -C x$z -f t.$z; diff -r t x$z/t; done
        gzip -c t/a > a.gz; zcat a.gz; cpio --version >/dev/null 2>&1 || true
    """)
    assert out == "data"


def test_zip_files_are_made_and_unpacked(sh: Run) -> None:
    needs_inside("zip", "unzip")
    assert sh("echo data > a; zip -q a.zip a; rm a; unzip -q a.zip; unzip -l a.zip | tail -n1; cat a").endswith("data")


def test_perl_and_awk_work(sh: Run) -> None:
    needs_inside("perl")
    out = sh(r"""
        perl -MPOSIX -MFile::Temp=tempfile -e 'my ($f) = tempfile(); print $f; print "ok ", POSIX::getpid() > 0, "\n"'
        perl -e 'print join(",", sort { $a <=> $b } map { $_ ** 2 } 1 .. 3), " ", `echo sub`'
        awk 'BEGIN { printf "%d %s\n", 2 ^ 10, toupper("x") }'
    """)
    assert out.splitlines()[1:] == ["1,4,9 sub", "1024 X"]


@pytest.mark.needs("git")
def test_git_makes_a_history_and_clones_it(sh: Run) -> None:
    out = sh("""
        git init -q -b main r; cd r; git config user.name n; git config user.email e@example.org
        echo 1 > f; git add f; git commit -qm first; echo 2 >> f; git commit -qam second
        git branch side; git tag t1; git stash -q || true; git gc -q
        cd ..; git clone -q r copy; cd copy; git log --format=%s; git fsck 2>/dev/null; git status --porcelain
        git checkout -q -b work; echo 3 >> f; git diff --stat | tail -n1
        git -c user.name=n -c user.email=e@example.org commit -qam third
        git push -q origin work; git -C ../r log --oneline work | wc -l; git worktree add -q ../wt; ls ../wt
    """)
    assert out.splitlines() == ["second", "first", " 1 file changed, 1 insertion(+)", "3", "f"]


@pytest.mark.needs("git")
def test_git_works_on_a_repository_of_the_callers(state_root: Path, tmp_path: Path) -> None:
    from subprocess import check_call

    repo = tmp_path / "repo"
    check_call(["git", "init", "-q", "-b", "main", str(repo)])
    (repo / "f").write_text("1\n")
    with Sandbox("shell", state=state_root, workspace=str(repo), workspace_mode="rw") as box:
        commit = "git add f && git -c user.name=n -c user.email=e@x commit -qm one"
        assert good(box.run(["sh", "-c", f"{commit} && git status --porcelain && git log --format=%s"])) == "one"
    check_call(["git", "-C", str(repo), "fsck"])
    assert {(path.stat().st_uid, path.stat().st_gid) for path in repo.rglob("*")} == {(os.geteuid(), os.getegid())}


@pytest.mark.needs("gcc", "make")
def test_gcc_and_make_build_in_parallel(run: Run) -> None:
    out = run(
        "build",
        "sh -eu",
        r"""
        for n in 1 2 3 4; do echo "int f$n(void) { return $n; }" > f$n.c; done
        cat > main.c <<'E'
        #include <math.h>
        #include <pthread.h>
        #include <stdio.h>
        int f1(void), f2(void), f3(void), f4(void);
        static void *run(void *p) { *(double *)p = sqrt(16.0); return p; }
        int main(void) { pthread_t t; double d; pthread_create(&t, 0, run, &d); pthread_join(t, 0);
            printf("%d %.0f\n", f1() + f2() + f3() + f4(), d); return 0; }
        E
        printf 'CFLAGS = -O2 -g -fPIC\nprog: main.o f1.o f2.o f3.o f4.o\n\t$(CC) -o $@ $^ -lm -lpthread\n' > Makefile
        printf 'clean:\n\trm -f *.o prog\n' >> Makefile
        make -s -j4 CC=gcc; ./prog; gcc -shared -o lib.so f1.o; ar rcs lib.a f1.o; strip prog; ./prog
        make -s clean; ls *.o 2>/dev/null || echo clean
        """.replace("\n        ", "\n"),
    )
    assert out.splitlines() == ["10 4", "10 4", "clean"]


@pytest.mark.needs("ssh-keygen")
def test_ssh_keygen_makes_and_uses_keys(sh: Run) -> None:
    out = sh("""
        for t in ed25519 ecdsa rsa; do
            ssh-keygen -q -t $t -N '' -f ~/k_$t; ssh-keygen -l -f ~/k_$t.pub | grep -ci $t
        done
        echo m > m; ssh-keygen -q -Y sign -n file -f ~/k_ed25519 m 2>/dev/null; ls m.sig; stat -c %a ~/k_rsa
    """)
    assert out.split() == ["1", "1", "1", "m.sig", "600"]


@pytest.mark.needs("node")
def test_node_runs_files_children_workers_and_servers(run: Run) -> None:
    needs_inside("node")
    out = run(
        "node",
        "node",
        """
        const fs = require('fs'), cp = require('child_process'), http = require('http'), os = require('os');
        const { Worker } = require('worker_threads');
        (async () => {
            fs.writeFileSync('a.txt', 'x'); await fs.promises.mkdir('d/e', { recursive: true });
            const made = fs.readdirSync('.', { recursive: true }).filter((n) => !n.startsWith('.')).length;
            const child = cp.execFileSync('sh', ['-c', 'cat; echo out'], { input: 'in ' }).toString().trim();
            const forked = await new Promise((done) => {
                fs.writeFileSync('c.js', 'process.send(process.argv[2])');
                cp.fork('./c.js', ['ipc']).on('message', done);
            });
            const worker = await new Promise((done) => new Worker(
                'require("worker_threads").parentPort.postMessage([...Array(1e5).keys()].reduce((a, b) => a + b))',
                { eval: true }).on('message', done));
            const server = http.createServer((_, r) => r.end('web')).listen(0, '127.0.0.1');
            await new Promise((r) => server.on('listening', r));
            const body = await (await fetch(`http://127.0.0.1:${server.address().port}/`)).text(); server.close();
            const watch = await new Promise((done) => { const w = fs.watch('d', () => { w.close(); done('watched'); });
                setTimeout(() => fs.writeFileSync('d/f', ''), 20); });
            console.log(made, child, forked, worker, body, watch, os.cpus().length > 0, os.userInfo().username);
        })();
        """,
    )
    assert out == "3 in out ipc 4999950000 web watched true user"


@pytest.mark.needs("java")
def test_java_compiles_and_runs(run: Run) -> None:
    needs_inside("java")
    source = """
        mkdir -p src; cat > src/Hello.java <<'E'
        import java.util.concurrent.*;
        public class Hello { public static void main(String[] a) throws Exception {
            var pool = Executors.newFixedThreadPool(4);
            System.out.println("hello " + pool.submit(() -> 6 * 7).get()); pool.shutdown(); } }
        E
        java src/Hello.java
    """
    if shutil.which("javac", path="/usr/bin") is None:
        pytest.skip("needs javac: not installed")
    assert run("build", "sh -eu", textwrap.dedent(source)) == "hello 42"


# -- Python's own tools ---------------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A directory with one hand-made wheel in it."""
    shelf = tmp_path / "wheels"
    shelf.mkdir()
    info = "tiny_tool-1.0.dist-info"
    files = {
        "tiny_tool.py": "def main():\n    print('tiny', __name__)\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-tool\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\ntiny = tiny_tool:main\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(shelf / "tiny_tool-1.0-py3-none-any.whl", "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return shelf


@pytest.mark.needs("python:pip")
def test_pip_installs_local_wheels(sh: Run, wheel: Path) -> None:
    out = sh(
        f"""
        python3 -m pip install -q --disable-pip-version-check --no-index --find-links {wheel} --target lib tiny-tool
        cd lib; python3 -c 'import tiny_tool; tiny_tool.main()'; PYTHONPATH=. bin/tiny; cd ..
        python3 -m pip list --path lib --disable-pip-version-check | grep -c tiny
        """,
        **granted(packages("pip"), wheel),
    )
    assert out.splitlines() == ["tiny tiny_tool", "tiny tiny_tool", "1"]


@pytest.mark.needs("python:ensurepip")
def test_a_virtual_environment_is_made_inside_and_installs_wheels(sh: Run, wheel: Path) -> None:
    out = sh(
        f"""
        python3 -m venv env; . env/bin/activate
        pip install -q --disable-pip-version-check --no-index --find-links {wheel} tiny-tool; tiny; which tiny
        """,
        read=[str(wheel)],
    )
    assert out.splitlines() == ["tiny tiny_tool", "/workspace/env/bin/tiny"]


def test_pytest_runs_inside(sh: Run) -> None:
    out = sh(
        """
        cat > test_it.py <<'E'
        import subprocess, pytest
        def test_good(tmp_path, monkeypatch, capfd):
            monkeypatch.setenv("A", "b"); (tmp_path / "f").write_text("x")
            subprocess.run(["sh", "-c", "echo $A"]); assert capfd.readouterr().out == "b\\n"
        @pytest.mark.parametrize("n", range(3))
        def test_n(n):
            assert n != 1
        E
        python3 -m pytest -q -p no:cacheprovider test_it.py | tail -n 1 | sed 's/ in .*//'
        """.replace("\n        ", "\n"),
        **packages("pytest"),
    )
    assert out == "1 failed, 3 passed"


# -- terminals ------------------------------------------------------------------------------------------------------


def test_pseudo_terminals_work(python: Run) -> None:
    out = python("""
        import os, pty, select
        pid, master = pty.fork()
        if pid == 0:
            script = "tty; stty rows 30 cols 90; stty size; test -t 0 && echo is a terminal; read x; echo got $x"
            os.execvp("sh", ["sh", "-c", script])
        os.write(master, b"typed\\n"); seen = b""
        try:
            while data := os.read(master, 1024): seen += data
        except OSError:
            pass
        os.waitpid(pid, 0); print(sorted(set(seen.decode().split("\\r\\n"))))
    """)
    assert eval(out) == ["", "/dev/pts/0", "30 90", "got typed", "is a terminal", "typed"]


def test_script_records_a_session(sh: Run) -> None:
    needs_inside("script")
    assert "typed here" in sh("script -qec 'echo typed here; test -t 1' /dev/null")


def test_tmux_keeps_a_session(sh: Run) -> None:
    needs_inside("tmux")
    out = sh("""
        export TERM=xterm; tmux -f /dev/null new-session -d -s s 'echo in tmux; sleep 5'
        for i in $(seq 50); do tmux capture-pane -p -t s | grep 'in tmux' && break; sleep 0.1; done
        tmux kill-server
    """)
    assert out == "in tmux"


def test_editors_and_pagers_work_in_the_background(sh: Run) -> None:
    needs_inside("vim", "less")
    assert sh("vim -es -u NONE -c 'normal ihello' -c 'wq! out' </dev/null; cat out; less out") == "hello\nhello"
