"""A throw-away world: namespaces of its own, in which stand-ins own every address and the home is planted.

What runs here sees a root file system built for it (the system read-only, everything writable on small tmpfs
mounts), a network with nothing but `lo`, and only its own processes. The world ends with its pid 1, which a timer
kills. As root it is made of mount, pid, network, ipc and uts namespaces; as an ordinary user a user namespace
comes first, and the agent lives in one more below it, so that it has no power over the world either.

It is a stage for a demonstration, not a security boundary: namespaces(7), pivot_root(2), rtnetlink(7).
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
# Both numbers are in the table that all architectures share: x86-64 and arm64 agree from 424 upwards.
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = -100, 0x8000, 1

USER_NAME = "rome"
HOME = Path("/home") / USER_NAME
ROOT_UID_FOR_AGENT = 61000  # as root: a uid that no account of Debian's has
TASKS_MAX = 300  # of the agent, all together: what bounds a fork bomb that nothing else stops
MEMORY_BYTES = 1 << 30  # address space of each of the agent's processes
HOME_SIZE, TMP_SIZE = "32m", "64m"


class NoWorld(Exception):
    """This host does not let us make the world; the text says which step failed."""


@dataclass(frozen=True)
class Setting:
    """What the world shows: read-only trees, addresses that its stand-ins own, a directory on disk for the work.

    `names`: the hosts that resolve there, and their addresses.
    """

    read: tuple[Path, ...]
    addresses: tuple[str, ...]
    work: Path
    names: Mapping[str, str]
    lifetime_s: int = 150


def check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise NoWorld(f"{what}: {os.strerror(code)}")


def unshare(flags: int, what: str) -> None:
    check(libc.unshare(flags), what)


def mount(source: str, target: Path | str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    arguments = [text.encode() or None for text in (source, str(target), fstype)]
    check(libc.mount(*arguments, ctypes.c_ulong(flags), data.encode() or None), f"mount {fstype or 'bind'} {target}")


def bind(source: Path | str, target: Path, *, read_only: bool = False) -> None:
    """Show `source` at `target`, with everything mounted below it."""
    is_dir = Path(source).is_dir()
    (target if is_dir else target.parent).mkdir(parents=True, exist_ok=True)
    if not is_dir:
        target.touch()
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if read_only:
        attributes = struct.pack("=QQQQ", MOUNT_ATTR_RDONLY, 0, 0, 0)
        path = str(target).encode()
        check(
            libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, AT_RECURSIVE, attributes, len(attributes)),
            f"read-only {target}",
        )


def write_file(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def map_single_uid(inside: int, outside: int, outside_gid: int) -> None:
    """Give a fresh user namespace its one uid and gid; as an ordinary user nothing more is allowed."""
    write_file("/proc/self/setgroups", "deny")
    write_file("/proc/self/uid_map", f"{inside} {outside} 1")
    write_file("/proc/self/gid_map", f"{inside} {outside_gid} 1")


# --- network -----------------------------------------------------------------------------------------------


def bring_up_lo() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
        answer = fcntl.ioctl(sock, siocgifflags, struct.pack("16sh14x", b"lo", 0))
        flags = struct.unpack("16sh14x", answer)[1]
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sh14x", b"lo", flags | iff_up))


def add_address(address: str) -> None:
    """Make `address` one of lo's own (RTM_NEWADDR): packets to it never look for a way out."""
    rtm_newaddr, nlm_flags = 20, 0x1 | 0x4 | 0x400  # REQUEST, ACK, CREATE
    packed = socket.inet_aton(address)
    attributes = b"".join(struct.pack("=HH4s", 8, kind, packed) for kind in (1, 2))  # IFA_ADDRESS, IFA_LOCAL
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, 1) + attributes
    message = struct.pack("=IHHII", 16 + len(body), rtm_newaddr, nlm_flags, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:
        sock.send(message)
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
    if code:
        raise NoWorld(f"address {address}: {os.strerror(-code)}")


def make_network(addresses: Sequence[str]) -> None:
    """Give lo the addresses, after checking that nothing but lo is there: no packet can leave for a real host."""
    # A kernel may create tunnel devices (sit0, tunl0) in every network namespace; they are down and lead nowhere.
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    for name in others:
        flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) if Path("/sys/class/net").exists() else 0
        if flags & 1:
            raise NoWorld(f"the network namespace is not empty: {name} is up")
    bring_up_lo()
    for address in addresses:
        add_address(address)


# --- files -------------------------------------------------------------------------------------------------


def make_dev(root: Path) -> None:
    dev = root / "dev"
    dev.mkdir()
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        bind(f"/dev/{name}", dev / name)
    (dev / "pts").mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID, "newinstance,ptmxmode=0666,mode=0666")
    (dev / "shm").mkdir()
    mount("tmpfs", dev / "shm", "tmpfs", MS_NOSUID | MS_NODEV, f"size={TMP_SIZE},mode=1777")
    for name, target in (("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")):
        (dev / name).symlink_to(target)
    for node in sorted(Path("/dev").glob("nvidia*")):
        bind(node, dev / node.name)


def make_names(root: Path, names: Mapping[str, str]) -> None:
    """The world's own hosts(5)."""
    file = root / "run" / "hosts"
    file.write_text("".join(f"{address} {name}\n" for name, address in {"localhost": "127.0.0.1", **names}.items()))
    file.chmod(0o644)
    mount(str(file), root / "etc" / "hosts", flags=MS_BIND)


def make_accounts(root: Path, uid: int) -> None:
    """ssh(1) refuses to run for a uid without an account, so the agent gets one."""
    for name, line in (
        ("passwd", f"{USER_NAME}:x:{uid}:{uid}:agent:{HOME}:/bin/sh"),
        ("group", f"{USER_NAME}:x:{uid}:"),
    ):
        kept = [entry for entry in Path("/etc", name).read_text().splitlines() if f":x:{uid}:" not in entry]
        file = root / "run" / name
        file.write_text("\n".join([*kept, line]) + "\n")
        file.chmod(0o644)
        mount(str(file), root / "etc" / name, flags=MS_BIND)


def is_below(path: Path, parents: Sequence[Path]) -> bool:
    return any(path == parent or parent in path.parents for parent in parents)


def make_root(root: Path, setting: Setting, agent_uid: int) -> None:
    """Build the world's files below `root` and make them the root directory."""
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    bind("/usr", root / "usr", read_only=True)
    bind("/etc", root / "etc", read_only=True)
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        top = Path("/", name)
        if top.is_symlink():
            (root / name).symlink_to(os.readlink(top))
        elif top.is_dir():
            bind(top, root / name, read_only=True)
    (root / "run").mkdir()
    make_accounts(root, agent_uid)
    make_names(root, setting.names)
    for name, size in (("tmp", TMP_SIZE), (str(HOME)[1:], HOME_SIZE)):
        (root / name).mkdir(parents=True)
        mount("tmpfs", root / name, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size},mode=1777")
    # No link may stand where a tree is shown later: it would lead out of the new root, to the host's own directory.
    (root / "var" / "tmp").mkdir(parents=True, mode=0o1777)
    if any(is_below(tree, (HOME,)) for tree in setting.read):
        raise NoWorld(f"{HOME} is the planted home's name, and the checkout lies there")
    shown = [Path("/usr"), Path("/etc")]
    for tree in sorted(set(setting.read), key=lambda path: len(path.parts)):
        if not is_below(tree, shown):
            bind(tree, root / tree.relative_to("/"), read_only=True)
            shown.append(tree)
    bind(setting.work, root / "srv" / "work")
    make_dev(root)
    (root / "proc").mkdir()
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV)
    if Path("/sys").is_dir():
        bind("/sys", root / "sys")
    os.chdir(root)
    check(libc.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(libc.umount2(b".", MNT_DETACH), "umount of the old root")
    os.chdir("/")


# --- processes ---------------------------------------------------------------------------------------------


def become_agent(*, is_root: bool) -> None:
    """Turn this process into the agent: a bounded ordinary user without power over the world."""
    resource.setrlimit(resource.RLIMIT_NPROC, (TASKS_MAX, TASKS_MAX))
    if is_root:
        os.setgroups([])
        os.setresgid(ROOT_UID_FOR_AGENT, ROOT_UID_FOR_AGENT, ROOT_UID_FOR_AGENT)
        os.setresuid(ROOT_UID_FOR_AGENT, ROOT_UID_FOR_AGENT, ROOT_UID_FOR_AGENT)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    else:
        unshare(CLONE_NEWUSER, "a user namespace for the agent")
        map_single_uid(1000, 0, 0)


def bound_memory_and_time() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pids_in_world() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def wait_as_pid_1(director: int, deadline: float) -> int:
    """Reap whatever dies until the director ends or time is up; leaving kills everything in the world."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == director:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            time.sleep(0.02)
    return 124


def die_with_parent() -> None:
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if 0 <= code < 256 else 1)


def run_director(setting: Setting, direct: Callable[[], Any], answer_fd: int, root: Path, *, is_root: bool) -> int:
    """Pid 1 of the world: build it, run `direct` in a child, pass its answer out as JSON."""
    die_with_parent()
    # Held until the child has mounted; after that nothing in the world can name the host's namespaces.
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    make_root(root, setting, ROOT_UID_FOR_AGENT if is_root else 1000)
    make_network(setting.addresses)
    socket.sethostname("throw-away-world")
    director = os.fork()
    if director == 0:
        os.setsid()
        try:
            answer = {"answer": direct()}
        except Exception:  # noqa: BLE001 - whatever it is, it is shown by the process outside, which fails with it
            answer = {"failed": traceback.format_exc()}
        with os.fdopen(answer_fd, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        leave(0)
    os.close(answer_fd)
    return wait_as_pid_1(director, time.monotonic() + setting.lifetime_s)


def enter(setting: Setting, direct: Callable[[], Any], answer_fd: int, root: Path, *, is_root: bool) -> int:
    """The process between us and the world's pid 1: unshares, forks it, waits."""
    die_with_parent()
    uid, gid = os.geteuid(), os.getegid()
    if not is_root:
        unshare(CLONE_NEWUSER, "a user namespace")
        map_single_uid(0, uid, gid)
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    unshare(spaces, "mount, pid, network, ipc and uts namespaces")
    pid_1 = os.fork()
    if pid_1 == 0:
        leave(guarded(lambda: run_director(setting, direct, answer_fd, root, is_root=is_root), answer_fd))
    os.close(answer_fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid_1, 0)[1])


def guarded(work: Callable[[], int], answer_fd: int) -> int:
    """Run `work` in a forked child; a world that cannot be made becomes the answer."""
    try:
        return work()
    except (NoWorld, OSError) as err:
        os.write(answer_fd, json.dumps({"no_world": str(err)}).encode())
        return 3


def run_in_world(setting: Setting, direct: Callable[[], Any]) -> Any:
    """Make a world, run `direct` in it and return what it returned (JSON data).

    Raises NoWorld when there could be none, RuntimeError with the text of what `direct` raised.

    Nothing of the world is left when this returns, also when `direct` started processes that ignore signals.
    """
    is_root = os.geteuid() == 0
    read_fd, write_fd = os.pipe()
    root = Path(tempfile.mkdtemp(prefix="toolcall-sandbox-world-"))
    try:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.close(read_fd)
            leave(guarded(lambda: enter(setting, direct, write_fd, root, is_root=is_root), write_fd))
        os.close(write_fd)
        with os.fdopen(read_fd, "rb") as pipe:
            text = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    if not text:
        raise NoWorld("its timer ran out" if code == 124 else f"it ended with status {code}")
    answer = json.loads(text)
    if "no_world" in answer:
        raise NoWorld(answer["no_world"])
    if "failed" in answer:
        raise RuntimeError(f"the demonstration itself failed:\n{answer['failed']}")
    return answer["answer"]


def is_char_device(path: Path) -> bool:
    try:
        return stat.S_ISCHR(path.stat().st_mode)
    except OSError:
        return False
