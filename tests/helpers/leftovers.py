"""What a call could leave behind for the next one: each a pair of functions, to plant it and to look for it.

`look` returns what it found, in words; nothing is an empty list. Both run inside, by value.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Callable

SECRET = "planted-by-an-earlier-call"
NICE = os.nice(0)  # of whoever runs the tests, which calls inherit
PLACES = ("/tmp", "/var/tmp", "/home/user", "/dev/shm", "/workspace")


def _text(path: str) -> str:
    with open(path) as file:
        return file.read()


def _quietly(action: Callable[..., object], *args: object) -> str:
    """The errno's name of what failed, else nothing."""
    try:
        action(*args)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
    return ""


# -- in the interpreter ----------------------------------------------------------------------------------------------


def plant_modules() -> None:
    builtins.planted = SECRET  # type: ignore[attr-defined]
    sys.modules["planted"] = types.ModuleType("planted")
    json.planted = SECRET  # type: ignore[attr-defined]
    json.dumps = lambda *_, **__: SECRET  # type: ignore[assignment]
    sys.path.insert(0, "/tmp/planted")
    sys.argv.append(SECRET)
    import colorsys  # noqa: F401 - a module that nothing else loads


def look_modules() -> list[str]:
    found = [name for name, module in (("builtins", builtins), ("json", json)) if hasattr(module, "planted")]
    found += [name for name in ("planted", "colorsys") if name in sys.modules]
    found += [path for path in sys.path if "planted" in path]
    return found + [arg for arg in sys.argv if SECRET in arg] + ([] if json.dumps(1) == "1" else ["json.dumps"])


def plant_process() -> None:
    os.environ["PLANTED"] = SECRET
    os.putenv("PLANTED_IN_C", SECRET)
    os.chdir("/tmp")
    os.umask(0o777)
    os.nice(5)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    signal.setitimer(signal.ITIMER_VIRTUAL, 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (33, 33))
    ctypes.CDLL(None).prctl(15, b"planted", 0, 0, 0)


def look_process() -> list[str]:
    found = [name for name in os.environ if name.startswith("PLANTED")]
    mask = os.umask(0o022)
    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_char_p
    checks = {
        "environment of C": not getenv(b"PLANTED_IN_C"),
        "environment of /proc": SECRET not in _text("/proc/self/environ"),
        "cwd": os.getcwd() == "/workspace",
        "umask": mask == 0o022,
        "nice": os.nice(0) == NICE,
        "handlers": signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL,
        "mask": not signal.pthread_sigmask(signal.SIG_BLOCK, set()),
        "timers": signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0),
        "limits": resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 33,
        "name": "planted" not in _text("/proc/self/comm"),
    }
    return found + [name for name, fine in checks.items() if not fine]


def plant_threads() -> None:
    threading.Thread(target=time.sleep, args=(1000,), daemon=True, name=SECRET).start()


def look_threads() -> list[str]:
    tasks = os.listdir("/proc/self/task")
    return [thread.name for thread in threading.enumerate()][1:] + tasks[1:]


# -- in the kernel ---------------------------------------------------------------------------------------------------


def plant_descriptors() -> None:
    fd = os.memfd_create(SECRET)
    os.write(fd, SECRET.encode())
    for number in range(100, 110):
        os.dup2(fd, number, inheritable=True)


def look_descriptors() -> list[str]:
    # Standard streams, the result, and the one that lists them.
    links = {int(name): _quietly_link(name) for name in os.listdir("/proc/self/fd")}
    return [f"{fd}: {link}" for fd, link in links.items() if fd > 3 and link and not link.startswith("/proc/")]


def _quietly_link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except FileNotFoundError:
        return ""


def plant_files() -> None:
    for place in PLACES:
        with open(f"{place}/.planted", "w") as file:
            file.write(SECRET)
        os.mkdir(f"{place}/planted")
        fd = os.open(f"{place}/.planted", os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)


def look_files() -> list[str]:
    return [f"{place}/{name}" for place in PLACES for name in os.listdir(place)]


def plant_processes() -> None:
    """Daemons that have left the session, ignore signals and hold a listening socket."""
    listeners = [socket.socket(socket.AF_UNIX), socket.socket(socket.AF_INET)]
    listeners[0].bind("\0planted")
    listeners[1].bind(("127.0.0.1", 4711))
    for listener in listeners:
        listener.listen()
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(1000)


def look_processes() -> list[str]:
    found = [f"pid {name}" for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
    # Without warm start the jail's own pid 1 stands beside the tool.
    found = [] if found == ["pid 1"] else found
    for family, address in ((socket.AF_UNIX, "\0planted"), (socket.AF_INET, ("127.0.0.1", 4711))):
        with socket.socket(family) as client:
            if _quietly(client.connect, address) != "ECONNREFUSED":
                found.append(f"somebody listens at {address!r}")
    return found


def plant_shared_memory() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    shm = libc.shmget(0x4711, 4096, 0o1666)
    if shm >= 0:
        libc.shmat.restype = ctypes.c_void_p
        ctypes.memmove(libc.shmat(shm, None, 0), SECRET.encode(), len(SECRET))
    libc.semget(0x4711, 1, 0o1666)
    libc.msgget(0x4711, 0o1666)
    libc.mq_open(b"/planted", os.O_CREAT | os.O_RDWR, 0o666, None)
    fd = os.open("/dev/shm/planted-memory", os.O_CREAT | os.O_RDWR, 0o666)
    os.ftruncate(fd, 4096)
    mmap.mmap(fd, 4096)[: len(SECRET)] = SECRET.encode()


def look_shared_memory() -> list[str]:
    libc = ctypes.CDLL(None, use_errno=True)
    found = [name for name in ("shmget", "semget", "msgget") if getattr(libc, name)(0x4711, 0, 0) >= 0]
    if libc.mq_open(b"/planted", os.O_RDWR) >= 0:
        found.append("mq_open")
    for kind in ("shm", "sem", "msg"):
        path = f"/proc/sysvipc/{kind}"
        if os.path.exists(path):
            found += [f"{path}: {line}" for line in _text(path).splitlines()[1:]]
    return found + os.listdir("/dev/shm")


def plant_names() -> None:
    """What other namespaces hold: the host's name, keys, an interface's address."""
    _quietly(socket.sethostname, "planted")
    libc = ctypes.CDLL(None, use_errno=True)
    add_key = {"x86_64": 248, "aarch64": 217}[os.uname().machine]
    libc.syscall(ctypes.c_long(add_key), b"user", b"planted", SECRET.encode(), len(SECRET), ctypes.c_int(-3))


def look_names() -> list[str]:
    found = [] if socket.gethostname() == "sandbox" else ["hostname"]
    libc = ctypes.CDLL(None, use_errno=True)
    request_key = {"x86_64": 249, "aarch64": 218}[os.uname().machine]
    if libc.syscall(ctypes.c_long(request_key), b"user", b"planted", None, 0) >= 0:
        found.append("a key in the session's keyring")
    return found


KINDS = tuple(sorted(name.removeprefix("plant_") for name in globals() if name.startswith("plant_")))


def act_table() -> Callable[[bool, str], list[str]]:
    """`act` as a function that carries all pairs with it: a jail cannot import this module."""
    pairs = {kind: (globals()[f"plant_{kind}"], globals()[f"look_{kind}"]) for kind in KINDS}

    def act(plants: bool, kind: str) -> list[str]:
        plant, look = pairs[kind]
        return (plant() or []) if plants else look()

    return act


def draw() -> dict[str, str]:
    """Numbers from every source of randomness that programs use."""
    import hashlib
    import secrets
    import ssl
    import tempfile
    import uuid

    numbers = {
        "random": random.random(),
        "secrets": secrets.token_hex(8),
        "ssl": ssl.RAND_bytes(8).hex(),
        "uuid1": uuid.uuid1().hex,
        "uuid4": uuid.uuid4().hex,
        "urandom": os.urandom(8).hex(),
        "tempfile": next(tempfile._get_candidate_names()),  # type: ignore[attr-defined]
        "hashlib": hashlib.scrypt(os.urandom(8), salt=os.urandom(8), n=2, r=1, p=1).hex()[:16],
    }
    try:
        import numpy as np
    except ImportError:
        pass
    else:
        numbers["numpy"] = np.random.random()
        numbers["numpy generator"] = np.random.default_rng().random()
    return {name: str(value) for name, value in numbers.items()}


def sealed() -> dict[str, str]:
    """Everything by which a process can tell how it is confined."""
    status = dict(line.split(":\t", 1) for line in _text("/proc/self/status").splitlines() if ":\t" in line)
    wanted = ("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Seccomp_filters", "THP_enabled", "SigIgn", "SigBlk")
    facts = {name: status[name].strip() for name in (*wanted, *(key for key in status if key.startswith("Cap")))}
    facts.update({name: _text(f"/proc/self/{name}") for name in ("uid_map", "gid_map", "setgroups", "limits")})
    facts["cgroup"] = _text("/proc/self/cgroup")
    mounts = [line.split() for line in _text("/proc/self/mountinfo").splitlines()]
    shown = sorted(" ".join([m[3], m[4], m[5], *m[m.index("-") + 1 :]]) for m in mounts)
    facts["mounts"] = "\n".join(shown)
    libc = ctypes.CDLL(None, use_errno=True)
    facts["securebits"] = str(libc.prctl(27, 0, 0, 0, 0))
    facts["dumpable"] = str(libc.prctl(3, 0, 0, 0, 0))
    for number in (16, 101, 155, 165, 250, 272, 298, 310, 321, 323, 425, 435, 442, 448):
        # Arguments that no call accepts: what is permitted says EFAULT or EINVAL, what is not EPERM or ENOSYS.
        ctypes.set_errno(0)
        libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6)
        facts[f"system call {number}"] = errno.errorcode.get(ctypes.get_errno(), "-")
    for path in ("/", "/usr", "/etc", "/proc/sys/kernel/hostname", "/sys", "/dev/null", "/tmp", "/workspace"):
        facts[f"write {path}"] = _quietly(lambda path=path: os.close(_open_for_write(path)))
    facts["interfaces"] = str(socket.if_nameindex())
    facts["hostname"] = os.uname().nodename
    facts["tty"] = _quietly(lambda: os.close(os.open("/dev/tty", os.O_RDWR)))
    facts["cpus"] = str(len(os.sched_getaffinity(0)))
    facts["oom_score_adj"] = _text("/proc/self/oom_score_adj")
    return facts


def _open_for_write(path: str) -> int:
    if os.path.isdir(path):
        return os.open(f"{path}/probe", os.O_CREAT | os.O_WRONLY)
    return os.open(path, os.O_WRONLY)


def identities() -> dict[str, str]:
    """What names this call's namespaces: no two calls have one in common."""
    return {name: os.readlink(f"/proc/self/ns/{name}") for name in os.listdir("/proc/self/ns") if "for" not in name}
