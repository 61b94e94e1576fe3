"""HostFacts: frozen data about this host, as JSON or as objects. No judgement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class Feature:
    """Something that works here, or the reason why not and the command that would change it (either may be empty)."""

    ok: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True, slots=True)
class CgroupControl:
    """`where`: "v1" or "v2", the tree in which a call's group can limit this; empty with a reason when nowhere."""

    where: str
    reason: str = ""


_UNKNOWN = Feature(False, "not tried")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What the host of the supervisor has.

    `uid` is effective. `is_root_like`: CAP_SYS_ADMIN in the initial user namespace. `namespaces` and the features
    after it were tried inside a user namespace mapped as a jail's. `cgroups` maps memory, pids, cpu, io; `cgroup_kind`
    is v1, v2, hybrid or none; `cpu_accounting`: a call's group counts cpu time. `cpu_count`: cores we may run on.
    `system_calls`: newer ones, present and not filtered. `container`: what kind we run in, if any is seen.
    `systemd_user`: a supervisor can be started in a delegated scope of the user's systemd. `gpu`: what the supervisor
    found of GPUs (`sandbox.gpu.facts`), None without any. `device_rule`: what refuses device nodes to a call's group
    beside its /dev, "bpf", "v1" or nothing. `runtimes`: programs that build other walls (runsc, crun, ...), by name.
    """

    kernel: str = ""
    machine: str = ""
    python: str = ""
    uid: int = -1
    is_root_like: bool = False
    container: str = ""
    cpu_count: int = 1
    memory_bytes: int = 0
    swap_bytes: int = 0
    user_namespaces: Feature = _UNKNOWN
    namespaces: Mapping[str, Feature] = field(default_factory=dict)
    proc_mount: Feature = _UNKNOWN
    overlay_in_userns: Feature = _UNKNOWN
    tmpfs_attributes: Feature = _UNKNOWN
    idmapped_mounts: Feature = _UNKNOWN
    nproc_in_userns: Feature = _UNKNOWN
    tproxy: Feature = _UNKNOWN
    cgroup_kind: str = "none"
    cgroup_path: str = ""
    cgroups: Mapping[str, CgroupControl] = field(default_factory=dict)
    cpu_accounting: bool = False
    swap_accounted: bool = False
    systemd_user: Feature = _UNKNOWN
    landlock_abi: int = 0
    seccomp_actions: tuple[str, ...] = ()
    libseccomp: str = ""
    system_calls: Mapping[str, bool] = field(default_factory=dict)
    block_devices: Mapping[str, str] = field(default_factory=dict)
    kvm: bool = False
    gpu_devices: tuple[str, ...] = ()
    gpu_library: bool = False
    gpu: Mapping[str, Any] | None = None
    device_rule: str = ""
    runtimes: Mapping[str, str] = field(default_factory=dict)

    @property
    def seccomp_filter(self) -> bool:
        return "errno" in self.seccomp_actions

    @property
    def seccomp_user_notif(self) -> bool:
        return "user_notif" in self.seccomp_actions

    def with_cgroups(self, where: Mapping[str, str], reasons: Mapping[str, str]) -> HostFacts:
        """These facts, corrected by what the supervisor's own tree got when it was opened."""
        cgroups = {
            name: CgroupControl(where.get(name, ""), "" if where.get(name) else reasons.get(name, control.reason))
            for name, control in self.cgroups.items()
        }
        return replace(self, cgroups=cgroups)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HostFacts:
        """Rebuild facts from `to_json`. Raises KeyError or TypeError on anything else: the sender is ours."""
        fields = dict(data)
        for name in (
            "user_namespaces",
            "proc_mount",
            "overlay_in_userns",
            "tmpfs_attributes",
            "idmapped_mounts",
            "nproc_in_userns",
            "tproxy",
        ):
            fields[name] = Feature(**data[name])
        fields["systemd_user"] = Feature(**data["systemd_user"])
        fields["namespaces"] = {name: Feature(**feature) for name, feature in data["namespaces"].items()}
        fields["cgroups"] = {name: CgroupControl(**control) for name, control in data["cgroups"].items()}
        for name in ("seccomp_actions", "gpu_devices"):
            fields[name] = tuple(data[name])
        return cls(**fields)
