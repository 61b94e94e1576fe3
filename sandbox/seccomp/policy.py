"""Which system calls a tool may make, and what the others are answered. Pure data and pure functions.

A policy is JSON data: `calls` maps a name to an action or a guard, `unknown` answers every other number and
`foreign_abi` every call of another architecture. An action is "allow", "notify", "log", "kill_process" or the name of
an errno. A guard looks at arguments:

    {"rules": [{"when": [{"arg": 0, "mask": M, "value": V}, ...], "then": <action or guard>}, ...], "else": <action>}

A rule applies when `args[arg] & M == V` for each condition; at most one rule may apply, unless those that do say the
same. Masks never reach above bit 31 for arguments that the kernel truncates to 32 bits (all that are checked here),
so nothing in the upper half of the register can turn a denial into a permission, or the other way round.

What it does not defend against: a filter sees registers only. Whatever stands behind a pointer (paths, socket
addresses, the structures of clone3 and openat2) it cannot judge; namespaces, mounts and Landlock do that.
Source: seccomp(2), and the man page of each call. docs/seccomp.md says the same for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from sandbox.digests import sha256

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    Guard = dict[str, Any]

NAME = "default"
VERSION = 1
_LOW_32 = 0xFFFF_FFFF
_LOW_64 = 0xFFFF_FFFF_FFFF_FFFF

# What a program needs to work. Grouped by purpose; each call stands in one group only (a test counts).
ALLOWED: Mapping[str, str] = {
    "data": """
        read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile copy_file_range
        splice tee vmsplice readahead fadvise64 fsync fdatasync sync syncfs sync_file_range fallocate truncate
        ftruncate io_setup io_destroy io_getevents io_submit io_cancel io_pgetevents""",
    "descriptors": """
        close close_range dup dup2 dup3 fcntl flock pipe pipe2 memfd_create eventfd eventfd2 signalfd signalfd4
        inotify_init inotify_init1 inotify_add_watch inotify_rm_watch""",
    "names": """
        stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents getdents64 getcwd
        chdir fchdir statfs fstatfs rename renameat renameat2 mkdir mkdirat rmdir link linkat unlink unlinkat symlink
        symlinkat umask chown fchown lchown fchownat utime utimes futimesat utimensat cachestat
        setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr
        lremovexattr fremovexattr setxattrat getxattrat listxattrat removexattrat""",
    "memory": """
        mmap mprotect munmap brk mremap msync mincore madvise mlock mlock2 munlock mlockall munlockall
        remap_file_pages pkey_mprotect pkey_alloc pkey_free mseal map_shadow_stack membarrier
        get_mempolicy set_mempolicy set_mempolicy_home_node mbind""",
    "processes": """
        fork vfork execve execveat exit exit_group wait4 waitid getpid getppid gettid set_tid_address getpgid
        setpgid getpgrp getsid setsid pidfd_open pidfd_send_signal kill tkill tgkill rt_sigqueueinfo
        rt_tgsigqueueinfo arch_prctl rseq restart_syscall uretprobe uprobe""",
    "threads": """
        futex futex_waitv futex_wake futex_wait futex_requeue set_robust_list get_robust_list sched_yield getcpu""",
    "signals": """
        rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause""",
    "time": """
        time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep getitimer setitimer alarm times
        timer_create timer_settime timer_gettime timer_getoverrun timer_delete
        timerfd_create timerfd_settime timerfd_gettime""",
    "events": """
        poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2""",
    "sockets": """
        connect accept accept4 bind listen shutdown getsockname getpeername setsockopt getsockopt
        sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg""",
    "ipc": """
        shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl
        mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr""",
    "scheduling": """
        sched_setaffinity sched_getaffinity sched_setparam sched_getparam sched_setscheduler sched_getscheduler
        sched_setattr sched_getattr sched_get_priority_max sched_get_priority_min sched_rr_get_interval
        getpriority setpriority ioprio_set ioprio_get getrlimit setrlimit getrusage""",
    # Without capabilities and with one id mapped these can only give up what is not there.
    "identity": """
        getuid geteuid getgid getegid getgroups getresuid getresgid setuid setgid setreuid setregid setgroups
        setresuid setresgid setfsuid setfsgid capget capset uname sysinfo getrandom""",
    # A program may only tighten what holds already, so man-db, Chromium and xz keep their own walls.
    "self_restriction": "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
}

# Known and refused: EPERM, as the kernel itself answers who lacks the privilege.
REFUSED: Mapping[str, tuple[str, str]] = {
    "other processes": (
        "reads or steers another process past its own interface",
        "ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd",
    ),
    "kernel surface": (
        "large kernel interfaces with a long record of holes, which tools can do without",
        """bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register fanotify_init fanotify_mark
        memfd_secret lookup_dcookie""",
    ),
    "keyrings": ("kernel keyrings are in no namespace", "add_key request_key keyctl"),
    "mounts": (
        "changes what the tool sees of the file system",
        """mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr
        mount_setattr""",
    ),
    "namespaces": ("makes or enters namespaces, where more of the kernel can be reached", "unshare setns"),
    "handles": ("opens files by handle, past every path rule", "name_to_handle_at open_by_handle_at"),
    "machine": (
        "administers the machine",
        """reboot kexec_load kexec_file_load init_module finit_module delete_module swapon swapoff acct quotactl
        quotactl_fd syslog vhangup iopl ioperm sethostname setdomainname move_pages migrate_pages""",
    ),
    "clock": ("sets the clock", "clock_settime settimeofday clock_adjtime adjtimex"),
}

# Answered with ENOSYS, as by a kernel without them, so that libraries take the older way, which can be checked:
# clone3 and openat2 pass their flags and modes in memory, where a filter cannot look. The rest is obsolete.
ABSENT: str = """
    clone3 openat2 statmount listmount listns lsm_get_self_attr lsm_set_self_attr lsm_list_modules file_getattr
    file_setattr modify_ldt set_thread_area get_thread_area uselib ustat sysfs _sysctl create_module get_kernel_syms
    query_module nfsservctl getpmsg putpmsg afs_syscall tuxcall security vserver epoll_ctl_old epoll_wait_old
"""

CLONE_NEW_FLAGS = 0x7E02_0000  # CLONE_NEWNS|CGROUP|UTS|IPC|USER|PID|NET; NEWTIME collides with the exit signal here
SET_ID_BITS = 0o6000  # S_ISUID | S_ISGID
# Calls by which a file gets a mode.
SET_ID_CALLS = frozenset(("chmod", "fchmod", "fchmodat", "fchmodat2", "creat", "open", "openat", "mknod", "mknodat"))
O_CREAT_OR_TMPFILE = 0o100 | 0o20000000  # the mode argument counts only with one of these
S_IFMT = 0o170000
PLAIN_NODE_TYPES = (0, 0o100000, 0o010000, 0o140000)  # regular (twice), FIFO, socket
TERMINAL_IOCTLS = {"TIOCSTI": 0x5412, "TIOCLINUX": 0x541C, "TIOCCONS": 0x541D, "TIOCSETD": 0x5423}
REFUSED_PRCTLS = {"PR_SET_SECUREBITS": 28, "PR_SET_MM": 35}
# PER_LINUX, PER_LINUX32, both with UNAME26, and the query: what Docker allows.
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFF_FFFF)
AF_UNIX, AF_INET, AF_INET6, AF_NETLINK = 1, 2, 10, 16
SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_TYPE_MASK = 1, 2, 3, 0xF
IPPROTO_TCP, IPPROTO_UDP, NETLINK_ROUTE = 6, 17, 0

Condition = dict[str, int]


def _is(arg: int, value: int, mask: int = _LOW_32) -> Condition:
    return {"arg": arg, "mask": mask, "value": value}


def _rule(then: str | Guard, *when: Condition) -> dict[str, Any]:
    return {"when": list(when), "then": then}


def _only(arg: int, mask: int, values: Iterable[int], otherwise: str) -> Guard:
    return {"rules": [_rule("allow", _is(arg, value, mask)) for value in values], "else": otherwise}


def _except(arg: int, values: Iterable[int]) -> Guard:
    return {"rules": [_rule("EPERM", _is(arg, value)) for value in values], "else": "allow"}


def _open_guard(flags_arg: int) -> Guard:
    may_create = _is(flags_arg, 0, O_CREAT_OR_TMPFILE)
    return {
        "rules": [_rule("allow", may_create), _rule("allow", _is(flags_arg + 1, 0, SET_ID_BITS))],
        "else": "EPERM",
    }


def _socket_guard() -> Guard:
    """The families and protocols that a tool needs; for the rest, what a kernel built without them answers.

    EAFNOSUPPORT and EPROTONOSUPPORT make libraries fall back (PAM without audit, Go without MPTCP), where EPERM is an
    error to report. Raw sockets are EPERM, as for anyone without CAP_NET_RAW. AF_PACKET, also by its old name
    (AF_INET, SOCK_PACKET), vsock, AF_ALG, XDP, Bluetooth, SCTP and the like never reach their modules.
    """
    kind, protocol = 1, 2
    inet = {
        "rules": [
            *(
                _rule("allow", _is(kind, SOCK_STREAM, SOCK_TYPE_MASK), _is(protocol, number))
                for number in (0, IPPROTO_TCP)
            ),
            *(
                _rule("allow", _is(kind, SOCK_DGRAM, SOCK_TYPE_MASK), _is(protocol, number))
                for number in (0, IPPROTO_UDP)
            ),
            _rule("EPERM", _is(kind, SOCK_RAW, SOCK_TYPE_MASK)),
        ],
        "else": "EPROTONOSUPPORT",
    }
    return {
        "rules": [
            _rule("allow", _is(0, AF_UNIX)),
            _rule(inet, _is(0, AF_INET)),
            _rule(inet, _is(0, AF_INET6)),
            _rule(_only(protocol, _LOW_32, [NETLINK_ROUTE], "EPROTONOSUPPORT"), _is(0, AF_NETLINK)),
        ],
        "else": "EAFNOSUPPORT",
    }


def _guards() -> dict[str, Guard]:
    """Calls that are allowed for some arguments. mkdir needs none: the kernel itself drops set-id bits there."""
    mode = {"chmod": 1, "fchmod": 1, "fchmodat": 2, "fchmodat2": 2, "creat": 1}
    node = {"mknod": 1, "mknodat": 2}
    return {
        "clone": _only(0, CLONE_NEW_FLAGS, [0], "EPERM"),
        "open": _open_guard(1),
        "openat": _open_guard(2),
        **{name: _only(arg, SET_ID_BITS, [0], "EPERM") for name, arg in mode.items()},
        **{name: _only(arg, S_IFMT | SET_ID_BITS, PLAIN_NODE_TYPES, "EPERM") for name, arg in node.items()},
        "ioctl": _except(1, TERMINAL_IOCTLS.values()),
        "prctl": _except(0, REFUSED_PRCTLS.values()),
        # A jail's pid 1 has the tool's uid, which is all the kernel asks: with a CPU limit of a second for pid 1 a tool
        # could end its jail as if from outside.
        "prlimit64": _except(0, [1]),
        # ENOSYS and not EPERM: libc and `setarch` users carry on without it.
        "personality": _only(0, _LOW_32, PERSONALITIES, "ENOSYS"),
        "socket": _socket_guard(),
        # Only these come in pairs; for any other family it is the kernel's own answer, after it made two sockets.
        "socketpair": _only(0, _LOW_32, [AF_UNIX], "EOPNOTSUPP"),
    }


def default_policy(*, deny_set_affinity: bool = False) -> dict[str, Any]:
    """The policy of a call. `deny_set_affinity` keeps the call on the cores that were chosen for it."""
    calls: dict[str, Any] = {name: "allow" for names in ALLOWED.values() for name in names.split()}
    calls.update((name, "EPERM") for _, names in REFUSED.values() for name in names.split())
    calls.update((name, "ENOSYS") for name in ABSENT.split())
    calls.update(_guards())
    if deny_set_affinity:
        calls["sched_setaffinity"] = "EPERM"
    policy = {
        "name": NAME,
        "version": VERSION,
        "deny_set_affinity": deny_set_affinity,
        "unknown": "ENOSYS",
        "foreign_abi": "kill_process",
        "calls": calls,
    }
    return {**policy, "digest": digest(policy)}


def digest(policy: Mapping[str, Any]) -> str:
    """`sha256:` over everything but the digest itself."""
    content = {key: value for key, value in policy.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return "sha256:" + sha256(text.encode()).hexdigest()


def resolve(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A whole policy from itself or from its short form in a plan, `{"name": "default", "deny_set_affinity": false}`.

    Raises ValueError for another name, another version or a digest that does not fit: what runs is what was planned.
    """
    if "calls" in spec:
        policy = dict(spec)
    elif spec.get("name") == NAME and spec.get("version", VERSION) == VERSION:
        policy = default_policy(deny_set_affinity=bool(spec.get("deny_set_affinity", False)))
    else:
        raise ValueError(f"seccomp policy {spec.get('name')!r} version {spec.get('version')!r} is not known here")
    fresh = digest(policy)
    if spec.get("digest", fresh) != fresh:
        raise ValueError(f"seccomp policy {spec.get('name')!r}: digest is {spec['digest']}, content is {fresh}")
    return {**policy, "digest": fresh}


def evaluate(policy: Mapping[str, Any], name: str, args: Sequence[int] = ()) -> str:
    """The action for one call, straight from the definition: what every compiled form must agree with."""
    padded = [*args, *([0] * (6 - len(args)))]
    answer = policy["calls"].get(name, policy["unknown"])
    while not isinstance(answer, str):
        matching = (rule["then"] for rule in answer["rules"] if _applies(rule["when"], padded))
        answer = next(matching, answer["else"])
    return answer


def _applies(when: Iterable[Condition], args: Sequence[int]) -> bool:
    return all(args[c["arg"]] & _LOW_64 & c["mask"] == c["value"] for c in when)


def refusal_reason(name: str) -> str:
    """Why `name` is refused whatever its arguments; empty when it is not."""
    for reason, names in REFUSED.values():
        if name in names.split():
            return reason
    return "answered as by a kernel without it" if name in ABSENT.split() else ""
