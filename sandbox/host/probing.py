"""Find out what this host has: read what can be read, try the rest in a forked child.

`probe` is for a single-threaded process (the supervisor); anyone else asks `probe_apart`, which starts one.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

from sandbox._linux import cgroup
from sandbox.host import programs
from sandbox.host.delegation import delegation_prefix, systemd_user
from sandbox.host.facts import CgroupControl, Feature, HostFacts

TYPE_CHECKING = False

if TYPE_CHECKING:
    from sandbox._linux.probes import Trials

_APART_TIMEOUT_S = 30.0
_APART = (
    "import sys; sys.path.insert(0, sys.argv[1])\n"
    "import json; from sandbox.host import probe\n"
    "print(json.dumps(probe().to_json()))"
)


def probe(trials: Trials | None = None) -> HostFacts:
    """Gather the facts, in some ten milliseconds, or fewer where trials have been begun.

    Without trials it forks: call from single-threaded processes only.
    """
    # ctypes and what the trials need are loaded here, so that a caller that only reads facts does without.
    from sandbox._linux import probes

    layout = cgroup.detect()
    is_root_like = probes.is_root_like()
    results = trials.results() if trials is not None else probes.try_features(as_root=is_root_like)
    status = _status()
    userns = _user_namespaces(results, status, is_root_like=is_root_like)
    return HostFacts(
        kernel=os.uname().release,
        machine=os.uname().machine,
        python=sys.version.partition(" ")[0],
        uid=os.geteuid(),
        is_root_like=is_root_like,
        container=_container(),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_bytes=_meminfo("MemTotal"),
        swap_bytes=_meminfo("SwapTotal"),
        user_namespaces=userns,
        namespaces={name: _feature(results, name, "unshare", userns) for name in probes.NAMESPACES},
        proc_mount=_proc_mount(results, userns),
        overlay_in_userns=_feature(results, "overlay", "mount overlay", userns),
        tmpfs_attributes=_feature(results, "attributes", "user.* attributes on tmpfs", userns),
        idmapped_mounts=_idmap(results, userns, is_root_like=is_root_like),
        nproc_in_userns=_nproc(results, userns),
        tproxy=_feature(results, "tproxy", "nf_tables with tproxy", userns),
        cgroup_kind=layout.kind,
        cgroup_path=_own_path(layout),
        cgroups={name: _cgroup_control(layout, name) for name in cgroup.CONTROLS},
        cpu_accounting=layout.home is not None or _is_open(layout, "cpuacct"),
        swap_accounted=_swap_accounted(layout),
        systemd_user=systemd_user(layout),
        landlock_abi=probes.landlock_abi(),
        seccomp_actions=tuple(_read("/proc/sys/kernel/seccomp/actions_avail").split()),
        libseccomp=str(results.get("libseccomp", "")),
        system_calls=probes.system_calls(),
        block_devices=_block_devices(),
        kvm=os.access("/dev/kvm", os.R_OK | os.W_OK),
        gpu_devices=_gpu_devices(),
        gpu_library=results.get("nvml") is True,
        device_rule=_device_rule(layout),
        runtimes=programs.find_all(),
    )


def probe_apart() -> HostFacts:
    """What `probe` finds in a process of its own, started the way a supervisor is.

    Raises RuntimeError with its output when that process fails.
    """
    # Not above: a supervisor comes through here, and starts no program so.
    import subprocess

    package_root = str(Path(__file__).resolve().parents[2])
    plain = [sys.executable, "-I", "-c", _APART, package_root]
    prefix = delegation_prefix()
    # The scope may be refused (no D-Bus in a container that shares the socket): then as a supervisor without it.
    for argv in ([*prefix, *plain], plain) if prefix else (plain,):
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_APART_TIMEOUT_S, check=False
        )
        if done.returncode == 0:
            return HostFacts.from_json(json.loads(done.stdout))
    raise RuntimeError(f"the host could not be probed: {done.stderr.strip() or f'status {done.returncode}'}")


def _read(path: str) -> str:
    """A small kernel file; empty when it is missing or closed to us."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _status() -> dict[str, str]:
    pairs = (line.partition(":") for line in _read("/proc/self/status").splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _meminfo(key: str) -> int:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _container() -> str:
    """The kind of container around us, as far as it shows."""
    for path, kind in (("/.dockerenv", "docker"), ("/run/.containerenv", "podman")):
        if os.path.exists(path):
            return kind
    return _read("/run/systemd/container").strip() or os.environ.get("container", "")  # noqa: SIM112 - its real name


def _code(results: dict[str, object], key: str) -> int | None:
    value = results.get(key)
    return value if isinstance(value, int) else None


def _feature(results: dict[str, object], key: str, what: str, userns: Feature) -> Feature:
    code = _code(results, key)
    if code is None:
        return Feature(False, "needs user namespaces" if not userns.ok else "not reached", userns.fix)
    return Feature(True) if code == 0 else Feature(False, f"{what}: {os.strerror(code)}")


def _user_namespaces(results: dict[str, object], status: dict[str, str], *, is_root_like: bool) -> Feature:
    """Can we have a user namespace with mounts in it, and if not, which knob is it?"""
    tried = ("user", "uid_map", "mount", "tmpfs")
    failed = next(((key, _code(results, key)) for key in tried if _code(results, key) != 0), None)
    if failed is None:
        return Feature(True)
    step, code = failed
    answer = os.strerror(code) if code else "no answer"
    if not os.path.exists("/proc/self/ns/user"):
        return Feature(False, "this kernel is built without user namespaces", "use a kernel with CONFIG_USER_NS=y")
    if _read("/proc/sys/user/max_user_namespaces").strip() == "0":
        return Feature(False, "user.max_user_namespaces is 0", "sudo sysctl -w user.max_user_namespaces=15000")
    if not is_root_like and _read("/proc/sys/kernel/unprivileged_userns_clone").strip() == "0":
        knob = "kernel.unprivileged_userns_clone"
        return Feature(False, f"{knob} is 0", f"sudo sysctl -w {knob}=1")
    knob = "kernel.apparmor_restrict_unprivileged_userns"
    if not is_root_like and _read("/proc/sys/" + knob.replace(".", "/")).strip() == "1" and code in _REFUSALS:
        reason = f"AppArmor takes the capabilities away in new user namespaces ({step}: {answer}; {knob} is 1)"
        return Feature(False, reason, f"sudo sysctl -w {knob}=0, or an AppArmor profile with `userns,` for {_python()}")
    if status.get("Seccomp") == "2" and code in (*_REFUSALS, errno.ENOSYS):
        reason = f"a seccomp filter around us, as of a container, refuses it ({step}: {answer})"
        return Feature(False, reason, "start the container with --security-opt seccomp=unconfined")
    if code in (errno.ENOSPC, errno.EUSERS):
        reason = f"the limit of user namespaces, or of their nesting, is reached ({step}: {answer})"
        return Feature(False, reason, "sudo sysctl -w user.max_user_namespaces=15000")
    hint = ": a chroot or a security module stands in the way" if code in _REFUSALS else ""
    return Feature(False, f"refused at {step} ({answer}){hint}")


_REFUSALS = (errno.EPERM, errno.EACCES)


def _python() -> str:
    return os.path.realpath(sys.executable or "python3")


def _proc_mount(results: dict[str, object], userns: Feature) -> Feature:
    if _code(results, "proc") == errno.EPERM:
        reason = "parts of /proc are covered, as in a container, so the kernel refuses a fresh one in a user namespace"
        return Feature(False, reason, "start the container with --security-opt systempaths=unconfined")
    return _feature(results, "proc", "mount proc", userns)


def _idmap(results: dict[str, object], userns: Feature, *, is_root_like: bool) -> Feature:
    if not is_root_like:
        return Feature(False, "mapping the owners of a mount takes root; an ordinary user's files are its own inside")
    return _feature(results, "idmap", "mount_setattr of / with MOUNT_ATTR_IDMAP", userns)


def _nproc(results: dict[str, object], userns: Feature) -> Feature:
    code = _code(results, "nproc")
    if code == errno.EOPNOTSUPP:
        return Feature(False, "RLIMIT_NPROC holds nothing in a user namespace here", "use Linux 5.14 or newer")
    if code == errno.EAGAIN:
        return Feature(False, "RLIMIT_NPROC counts the uid's tasks everywhere", "use Linux 5.14 or newer")
    return _feature(results, "nproc", "setrlimit RLIMIT_NPROC", userns)


def _own_path(layout: cgroup.Layout) -> str:
    """The group below which ours go: the v2 one where there is one, else that of the v1 memory tree."""
    if layout.home:
        return layout.home.path
    tree = layout.v1.get("memory") or next(iter(layout.v1.values()), None)
    return tree.own if tree and tree.writable else ""


def _cgroup_control(layout: cgroup.Layout, name: str) -> CgroupControl:
    where = layout.where(name)
    return CgroupControl(where, "" if where else layout.reason(name))


def _is_open(layout: cgroup.Layout, controller: str) -> bool:
    tree = layout.v1.get(controller)
    return tree is not None and tree.writable


def _swap_accounted(layout: cgroup.Layout) -> bool:
    if layout.where("memory") == "v1":
        return os.path.exists(layout.v1["memory"].own + "/memory.memsw.limit_in_bytes")
    if layout.home and layout.where("memory") == "v2":
        # The file is in every group with the controller but the root: look where one is sure to be.
        groups = [layout.home.path, *cgroup.child_groups(layout.home.path)]
        with_memory = [group for group in groups if os.path.exists(group + "/memory.max")]
        return not with_memory or os.path.exists(with_memory[0] + "/memory.swap.max")
    return False


def _block_devices() -> dict[str, str]:
    """Name to "major:minor" of the disks, without memory and loop devices."""
    found = {}
    for entry in sorted(_listdir("/sys/block")):
        if not entry.startswith(("ram", "loop", "zram", "nbd")):
            found[entry] = _read(f"/sys/block/{entry}/dev").strip()
    return found


def _listdir(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _device_rule(layout: cgroup.Layout) -> str:
    """What kind of device rule a supervisor's groups could be put under here."""
    from sandbox._linux import bpf, devices

    if layout.home:
        try:
            os.close(bpf.load_device_program(bpf.device_program(devices.BASE)))
        except OSError:
            return ""
        return "bpf"
    return "v1" if _is_open(layout, "devices") else ""


def _gpu_devices() -> tuple[str, ...]:
    return tuple(f"/dev/{name}" for name in sorted(_listdir("/dev")) if name.startswith("nvidia"))
