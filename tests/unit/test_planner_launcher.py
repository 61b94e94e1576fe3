"""Which launcher a plan is for: the cheapest that is enough, the one that is named, or a refusal that says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandbox.errors import ManifestError, Unenforceable
from sandbox.host import CgroupControl, Feature, HostFacts
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan
from sandbox.planner import PathFact, Surroundings, decide
from sandbox.spec import CallSpec, Workspace

YES = Feature(True)
FULL = HostFacts(
    uid=0,
    is_root_like=True,
    user_namespaces=YES,
    namespaces=dict.fromkeys(("mount", "net", "pid", "ipc", "uts", "cgroup"), YES),
    proc_mount=YES,
    tproxy=YES,
    cgroup_kind="v2",
    cgroups={name: CgroupControl("v2") for name in ("memory", "pids", "cpu", "io")},
    cpu_accounting=True,
    swap_accounted=True,
    landlock_abi=3,
    seccomp_actions=("errno",),
    libseccomp="2.5",
)
CALL = CallSpec(kind="program", argv=("true",), tool="true")
IMAGE = {"launcher": "docker", "image": "debian:12"}


def planned(
    isolation: dict[str, Any], call: CallSpec = CALL, runtimes: tuple[str, ...] = (), **more: Any
) -> LaunchPlan:
    facts = replace(FULL, runtimes={name: f"/usr/bin/{name}" for name in runtimes})
    return decide(Manifest(isolation=isolation, **more), call, facts, Surroundings(paths={"/srv": PathFact(1, 2)}))


def refused(
    isolation: dict[str, Any], call: CallSpec = CALL, runtimes: tuple[str, ...] = (), **more: Any
) -> Unenforceable:
    with pytest.raises(Unenforceable) as caught:
        planned(isolation, call, runtimes, **more)
    return caught.value


def test_by_itself_a_plan_is_for_the_native_jail() -> None:
    assert planned({}).launcher == planned({"launcher": "jail"}).launcher == "jail"


def test_docker_that_is_named_is_taken_with_its_image_on_record() -> None:
    plan = planned(IMAGE)
    assert plan.launcher == "docker"
    assert plan.isolation["image"] == "debian:12"
    assert plan.isolation["grade"] == "namespaces"
    assert plan.steps[0].args == {"image": "debian:12", "runtime": "", "engine": "", "function": False}
    assert all(not limit.mechanism.startswith("cgroup v") for limit in plan.limits)


def test_a_stronger_wall_is_refused_naming_what_is_missing_and_taken_when_it_is_there() -> None:
    wanted = {"image": "debian:12", "minimum": "userspace-kernel"}
    error = refused(wanted)
    assert "runsc" in error.controls["isolation"]
    assert "not installed" in error.controls["isolation"]
    assert "gvisor.dev" in error.hint
    plan = planned({"minimum": "userspace-kernel", "best_effort": ["pids"]}, runtimes=("runsc",))
    assert (plan.launcher, plan.isolation["runtime"], plan.isolation["grade"]) == ("oci", "runsc", "userspace-kernel")


def test_docker_with_a_virtual_machine_inside_is_refused_naming_what_that_would_not_join() -> None:
    error = refused({**IMAGE, "runtime": "kata"}, runtimes=("runsc", "kata-runtime"))
    assert "joins no named pipe" in error.controls["launcher"]
    assert "isolation.runtime = 'runsc'" in error.hint
    assert "not installed" in refused({**IMAGE, "runtime": "kata"}).controls["launcher"]


def test_docker_takes_gvisor_as_a_stronger_wall_and_an_image_with_it() -> None:
    plan = planned({"image": "debian:12", "minimum": "userspace-kernel", "best_effort": ["pids"]}, runtimes=("runsc",))
    assert (plan.launcher, plan.isolation["runtime"]) == ("docker", "runsc")
    assert (plan.isolation["grade"], plan.isolation["landlock_abi"]) == ("userspace-kernel", 0)
    assert "not installed" in refused({**IMAGE, "runtime": "runsc"}).controls["launcher"]
    assert list(refused({**IMAGE, "runtime": "runsc"}, runtimes=("runsc",)).controls) == ["pids"]


def test_under_docker_and_gvisor_only_what_is_granted_can_be_denied() -> None:
    isolation = {**IMAGE, "runtime": "runsc", "best_effort": ["pids"]}
    denied = {"filesystem": {"read": ["/srv"], "deny": ["/srv/secret", "**/.env"]}}
    assert planned(isolation, runtimes=("runsc",), **denied).launcher == "docker"
    denied["filesystem"]["deny"].append("/etc/passwd")
    assert "below a granted path" in refused(isolation, runtimes=("runsc",), **denied).controls["deny"]
    assert planned(IMAGE, **denied).launcher == "docker"


def test_a_microvm_is_not_had_from_a_userspace_kernel() -> None:
    error = refused({"image": "debian:12", "minimum": "microvm"}, runtimes=("runsc", "runc"))
    assert "kata" in error.controls["isolation"]


def test_a_launcher_that_is_named_is_never_replaced_by_another() -> None:
    error = refused({**IMAGE, "runtime": "crun"})
    assert "crun" in error.controls["launcher"]
    assert planned({**IMAGE, "runtime": "crun"}, runtimes=("crun",)).isolation["runtime"] == "crun"
    error = refused({"launcher": "jail", "minimum": "microvm"})
    assert error.controls["isolation"] == "microvm needs another launcher than the native jail"


@pytest.mark.parametrize(("engine", "is_refused"), [("tcp://192.0.2.1:2375", True), ("unix:///run/docker.sock", False)])
def test_only_an_engine_on_this_host_will_do(engine: str, *, is_refused: bool) -> None:
    around = Surroundings(engine=engine)
    if is_refused:
        with pytest.raises(Unenforceable, match="only a daemon on this host"):
            decide(Manifest(isolation=IMAGE), CALL, FULL, around)
    else:
        assert decide(Manifest(isolation=IMAGE), CALL, FULL, around).steps[0].args["engine"] == engine


def test_docker_takes_root_and_says_what_to_use_without() -> None:
    with pytest.raises(Unenforceable) as caught:
        decide(Manifest(isolation=IMAGE), CALL, replace(FULL, uid=1000, is_root_like=False), Surroundings())
    assert "takes root" in caught.value.controls["launcher"]
    assert "use the launcher jail" in caught.value.hint


def test_an_unknown_launcher_is_refused_by_name() -> None:
    assert refused({"launcher": "firejail"}).controls["launcher"] == "no launcher is called 'firejail'"


def test_under_docker_the_call_is_told_of_the_gateways_authority_where_tls_is_looked_into() -> None:
    network = {"mode": "allowlist", "allow": ["a.org:443"]}
    inspected = planned(IMAGE, network={**network, "http": ["* a.org /** inspect"]})
    steps = [step.name for step in inspected.steps]
    assert steps.index("system_view") < steps.index("trust") < steps.index("deny")
    assert inspected.env["SSL_CERT_FILE"] == "/run/sandbox/tls/authorities.pem"
    plain = planned(IMAGE, network=network)
    assert "trust" not in [step.name for step in plain.steps]
    assert "SSL_CERT_FILE" not in plain.env


def test_what_docker_cannot_hold_may_be_let_go_and_is_then_on_record() -> None:
    cgroups = {**FULL.cgroups, "io": CgroupControl("v1")}
    asked = Manifest(isolation={**IMAGE, "best_effort": ["io"]}, resources={"io_bytes_per_s": 1 << 20})
    limit = decide(asked, CALL, replace(FULL, cgroup_kind="hybrid", cgroups=cgroups), Surroundings()).limit("io")
    assert limit is not None
    assert (limit.level, limit.applied) == ("partial", 1 << 20)
    held = planned(IMAGE, resources={"io_bytes_per_s": 1 << 20}).limit("io")
    assert held is not None
    assert (held.level, held.mechanism) == ("full", "container device limits, cgroup v2 io.max")


def test_landlock_that_is_required_is_refused_where_the_launcher_has_none() -> None:
    assert "landlock" in refused({**IMAGE, "required": ["landlock"]}).controls
    assert planned({"required": ["landlock"]}).launcher == "jail"


@pytest.mark.parametrize(
    ("isolation", "says"),
    [
        ({"launcher": "docker"}, "docker needs an image"),
        ({"launcher": "jail", "image": "debian:12"}, "takes no image"),
        ({"launcher": "nsjail", "runtime": "runsc"}, "drives no OCI runtime"),
        ({"launcher": "docker", "image": "--privileged"}, "is not an image"),
        ({"launcher": "docker", "image": "a b"}, "is not an image"),
        ({"runtime": "chroot"}, "runtime"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(isolation: dict[str, Any], says: str) -> None:
    with pytest.raises(ManifestError, match=says):
        Manifest(isolation=isolation)


def test_image_and_runtime_are_part_of_the_digest() -> None:
    digests = {
        Manifest(isolation=isolation).digest
        for isolation in (IMAGE, {**IMAGE, "image": "debian:11"}, {**IMAGE, "runtime": "runsc"}, {})
    }
    assert len(digests) == 4


def test_an_oci_runtime_is_the_first_that_is_here_and_is_named_on_record() -> None:
    plan = planned({"launcher": "oci"}, runtimes=("crun", "runc"))
    assert (plan.launcher, plan.isolation["runtime"], plan.isolation["grade"]) == ("oci", "crun", "namespaces")
    assert planned({"launcher": "oci"}, runtimes=("runc",)).isolation["runtime"] == "runc"
    assert planned({"launcher": "oci", "runtime": "runc"}, runtimes=("crun", "runc")).isolation["runtime"] == "runc"


def test_a_runtime_that_is_not_installed_is_refused_with_the_command_that_installs_it() -> None:
    error = refused({"launcher": "oci"})
    assert "crun" in error.controls["launcher"]
    assert "apt install crun" in error.hint
    assert "nsjail" in refused({"launcher": "nsjail"}).controls["launcher"]
    assert planned({"launcher": "nsjail"}, runtimes=("nsjail",)).launcher == "nsjail"


def test_runc_is_refused_to_an_ordinary_user_and_crun_is_not() -> None:
    facts = replace(FULL, uid=1000, is_root_like=False, runtimes={"runc": "/usr/sbin/runc", "crun": "/usr/bin/crun"})

    def runtime(wanted: str, facts: HostFacts = facts) -> Any:
        manifest = Manifest(isolation={"launcher": "oci", "runtime": wanted})
        return decide(manifest, CALL, facts, Surroundings()).isolation["runtime"]

    with pytest.raises(Unenforceable, match="only root can map two"):
        runtime("runc")
    assert runtime("crun") == runtime("") == "crun"
    assert runtime("runc", replace(facts, uid=0)) == "runc"


def test_runc_is_refused_where_there_is_no_unified_cgroup_tree() -> None:
    facts = replace(FULL, cgroup_kind="v1", runtimes={"runc": "/usr/sbin/runc"})
    manifest = Manifest(isolation={"launcher": "oci", "runtime": "runc"})
    with pytest.raises(Unenforceable, match="v1 trees"):
        decide(manifest, CALL, facts, Surroundings())
    assert decide(manifest, CALL, replace(facts, cgroup_kind="hybrid"), Surroundings()).launcher == "oci"


def test_landlock_stands_behind_an_oci_container_too() -> None:
    plan = planned({"launcher": "oci", "required": ["landlock"]}, runtimes=("crun",))
    assert plan.isolation["landlock_abi"] == FULL.landlock_abi
    assert any(step.name == "landlock" for step in plan.steps)


GVISOR = {"launcher": "oci", "runtime": "runsc"}
GVISOR_IN_DOCKER = {**IMAGE, "runtime": "runsc"}


@pytest.mark.parametrize(
    ("call", "more", "gap"),
    [
        (replace(CALL, tty=True), {}, "terminal"),
    ],
)
def test_what_gvisor_cannot_do_is_refused_and_only_with_gvisor(call: CallSpec, more: dict[str, Any], gap: str) -> None:
    for gvisor in (GVISOR, GVISOR_IN_DOCKER):
        isolation = {**gvisor, "best_effort": ["pids"]}
        assert list(refused(isolation, call, ("runsc",), **more).controls) == [gap]
    assert planned({"launcher": "oci"}, call, ("crun",), **more).launcher == "oci"
    assert planned(IMAGE, call, **more).launcher == "docker"


@pytest.mark.parametrize(
    ("call", "more"),
    [
        (replace(CALL, workspace=Workspace("rw", "/srv", "/srv")), {}),
        (CALL, {"filesystem": {"write": ["/srv"]}}),
    ],
)
def test_gvisor_writes_to_the_hosts_directories_under_docker_only(call: CallSpec, more: dict[str, Any]) -> None:
    accepted = {"best_effort": ["pids"]}
    assert list(refused({**GVISOR, **accepted}, call, ("runsc",), **more).controls) == ["write"]
    assert planned({**GVISOR_IN_DOCKER, **accepted}, call, ("runsc",), **more).isolation["runtime"] == "runsc"


def test_gvisor_has_the_gateway_under_docker_only_and_nobody_looks_into_its_tls() -> None:
    more: dict[str, Any] = {"network": {"mode": "allowlist", "allow": ["a.org:443"]}}
    accepted = {"best_effort": ["pids"]}
    assert list(refused({**GVISOR, **accepted}, CALL, ("runsc",), **more).controls) == ["egress"]
    plan = planned({**GVISOR_IN_DOCKER, **accepted}, CALL, ("runsc",), **more)
    assert "egress" in [step.name for step in plan.steps]
    more["network"]["http"] = ["* a.org /** inspect"]
    assert list(refused({**GVISOR_IN_DOCKER, **accepted}, CALL, ("runsc",), **more).controls) == ["inspection"]


def test_tasks_in_gvisor_are_counted_in_part_and_landlock_is_not_there() -> None:
    error = refused(GVISOR, runtimes=("runsc",))
    assert list(error.controls) == ["pids"]
    plan = planned({**GVISOR, "best_effort": ["pids"]}, runtimes=("runsc",))
    assert (plan.isolation["grade"], plan.isolation["landlock_abi"]) == ("userspace-kernel", 0)
    assert all(step.name != "landlock" for step in plan.steps)
    assert (
        "landlock"
        in refused({**GVISOR, "best_effort": ["pids"], "required": ["landlock"]}, runtimes=("runsc",)).controls
    )


def test_a_userspace_kernel_is_found_without_an_image() -> None:
    plan = planned({"minimum": "userspace-kernel", "best_effort": ["pids"]}, runtimes=("runsc", "crun"))
    assert (plan.launcher, plan.isolation["runtime"]) == ("oci", "runsc")
