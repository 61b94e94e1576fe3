"""The bundle that is written from a plan: what a runtime is asked for, and that nothing weaker can be asked."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.host import CgroupControl, Feature, HostFacts
from sandbox.launchers import attended, nsjail, nsjail_config, oci, oci_spec
from sandbox.manifest import Manifest
from sandbox.plan import LaunchPlan
from sandbox.planner import Surroundings, decide
from sandbox.spec import CallSpec

YES = Feature(True)
FACTS = HostFacts(
    uid=0,
    is_root_like=True,
    user_namespaces=YES,
    namespaces=dict.fromkeys(("mount", "net", "pid", "ipc", "uts", "cgroup"), YES),
    proc_mount=YES,
    tproxy=YES,
    cgroup_kind="hybrid",
    cgroups={name: CgroupControl("v1") for name in ("memory", "pids", "cpu", "io")},
    cpu_accounting=True,
    swap_accounted=True,
    landlock_abi=3,
    seccomp_actions=("errno",),
    libseccomp="2.5",
    runtimes={"crun": "/usr/bin/crun", "runc": "/usr/sbin/runc", "nsjail": "/usr/bin/nsjail"},
)
PLACE = oci_spec.Place("/sys/kernel/root", ["/usr/bin/python3", "-I"], [(1000, 0x70000040)], {"NOFILE": 100})
FLAVOURS = [oci.FLAVOURS["crun"], oci.FLAVOURS["runc"], nsjail.NSJAIL]


def plan_of(*, tty: bool = False, **sections: Any) -> LaunchPlan:
    call = CallSpec(kind="program", argv=("true",), tool="true", tty=tty)
    isolation = {"launcher": "oci"}
    return decide(Manifest(isolation=isolation, **sections), call, FACTS, Surroundings())


def spec_of(**sections: Any) -> dict[str, Any]:
    plan = plan_of(**sections)
    kind = attended.Kind(plan, FLAVOURS[0], b"")
    spec: dict[str, Any] = json.loads(json.dumps(oci_spec.runtime_spec(plan, PLACE, kind.seccomp)))
    return spec


def test_a_container_has_no_capability_in_any_set_and_gains_none() -> None:
    process = spec_of()["process"]
    assert sorted(process["capabilities"]) == ["ambient", "bounding", "effective", "inheritable", "permitted"]
    assert not any(process["capabilities"].values())
    assert process["noNewPrivileges"] is True
    assert process["terminal"] is False


def test_every_namespace_but_the_cgroup_one_is_the_runtimes_to_make_and_none_is_joined() -> None:
    namespaces = spec_of()["linux"]["namespaces"]
    assert {item["type"] for item in namespaces} == {"user", "pid", "mount", "network", "ipc", "uts"}
    assert all(list(item) == ["type"] for item in namespaces)


def test_the_tools_uid_is_an_unprivileged_one_of_the_host_and_hosts_root_is_nobody_inside() -> None:
    linux = spec_of()["linux"]
    assert linux["uidMappings"] == linux["gidMappings"] == [{"containerID": 1000, "hostID": 0x70000040, "size": 1}]
    for flavour in FLAVOURS:
        mapped = attended.place(0x70000040, flavour, "/mnt").ids
        assert all(outside != 0 for _, outside in mapped)
        assert dict(mapped)[1000] == 0x70000040
        # A root that a runtime wants for itself is another uid than the tool's.
        assert dict(mapped).get(0) in (None, 0x70000040 + attended.ROOT_ID_OFFSET)


def test_what_reaches_the_whole_machine_is_masked_or_read_only() -> None:
    linux = spec_of()["linux"]
    assert "/proc/kcore" in linux["maskedPaths"]
    assert "/proc/sys" in linux["readonlyPaths"]
    assert spec_of()["root"] == {"path": "/sys/kernel/root", "readonly": True}
    proc = next(mount for mount in spec_of()["mounts"] if mount["destination"] == "/proc")
    assert set(proc["options"]) == {"nosuid", "nodev", "noexec", "hidepid=2"}


def test_the_filter_is_the_jails_own_and_refuses_what_it_does_not_know() -> None:
    seccomp = spec_of()["linux"]["seccomp"]
    assert seccomp["defaultAction"] == "SCMP_ACT_ERRNO"
    assert len(seccomp["architectures"]) == 1
    allowed = {name for rule in seccomp["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    assert "openat" in allowed
    assert not allowed & {"bpf", "io_uring_setup", "keyctl", "mount", "ptrace", "userfaultfd"}


def test_limits_of_a_process_are_the_plans_and_never_above_the_makers_own() -> None:
    rlimits = {item["type"]: item for item in spec_of(resources={"open_files": 64})["process"]["rlimits"]}
    assert (rlimits["RLIMIT_NOFILE"]["soft"], rlimits["RLIMIT_NOFILE"]["hard"]) == (64, 64)
    assert rlimits["RLIMIT_CORE"]["hard"] == 1
    rlimits = {item["type"]: item for item in spec_of(resources={"open_files": 5000})["process"]["rlimits"]}
    assert rlimits["RLIMIT_NOFILE"]["hard"] == 100


def test_nothing_of_the_host_is_mounted_but_the_view() -> None:
    for mount in spec_of()["mounts"]:
        if mount["type"] == "bind":
            assert mount["source"] == f"{PLACE.root}{mount['destination']}"
        else:
            assert mount["type"] in ("proc", "devpts", "mqueue")


def test_neither_arguments_nor_environment_of_the_call_are_in_the_bundle() -> None:
    text = json.dumps(spec_of(environment={"set": {"TOKEN": "hunter2"}}))
    assert "hunter2" not in text
    assert "true" not in spec_of()["process"]["args"]


def test_gvisor_gets_every_writable_place_by_name_and_no_device_of_the_hosts() -> None:
    plan = plan_of(filesystem={"write": [":workspace"]})
    kind = attended.Kind(plan, oci.FLAVOURS["runsc"], b"")
    spec = json.loads(oci.FLAVOURS["runsc"].config(kind, PLACE))
    places = {mount["destination"]: mount["source"] for mount in spec["mounts"] if mount["type"] == "bind"}
    assert {"/tmp", "/var/tmp", "/home/user", "/dev/shm", "/workspace", oci_spec.EXCHANGE} == set(places)
    assert places["/tmp"] == f"{PLACE.root}/tmp"
    assert "/dev" not in {mount["destination"] for mount in spec["mounts"]}
    assert "network" not in {item["type"] for item in spec["linux"]["namespaces"]}
    assert spec["process"]["capabilities"]["effective"] == []
    refused = spec["linux"]["seccomp"]["syscalls"][0]
    assert {"bpf", "keyctl", "ptrace"} <= set(refused["names"])
    assert refused["action"] == "SCMP_ACT_ERRNO"


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda flavour: flavour.name)
def test_every_step_of_the_plan_is_somebodys_and_the_walls_keep_their_order(flavour: attended.Flavour) -> None:
    plan = plan_of(network={"mode": "allowlist", "allow": ["example.org:443"]})
    placed = attended.arranged(plan, flavour)
    assert sorted(step["name"] for step in placed) == sorted(step.name for step in plan.steps)
    assert {step["where"] for step in placed} <= {"view", "enter", "runtime", "outside", "call", "tool"}
    where = {step["name"]: step["where"] for step in placed}
    assert where["egress"] == "outside"
    assert where["close_fds"] == "call"
    inside = [step["name"] for step in placed if step["where"] == "call"]
    assert inside.index("close_fds") < (inside.index("seccomp") if "seccomp" in inside else len(inside))


@pytest.mark.parametrize("flavour", FLAVOURS, ids=lambda flavour: flavour.name)
def test_a_small_limit_of_open_files_leaves_the_runtime_room_and_is_set_before_the_tool(
    flavour: attended.Flavour,
) -> None:
    plan = plan_of(resources={"open_files": 16})
    placed = attended.arranged(plan, flavour)
    first, last = (step for step in placed if step["name"] == "rlimits")
    assert (first["args"]["NOFILE"], last["where"], last["args"]) == (attended.ROOM_FILES, "call", {"NOFILE": 16})
    inside = [step["name"] for step in placed if step["where"] == "call"]
    assert inside.index("close_fds") < inside.index("rlimits")
    if flavour is not nsjail.NSJAIL:
        place = replace(PLACE, hard_limits={})
        spec = json.loads(flavour.config(attended.Kind(plan, flavour, b""), place))
        limits = {item["type"]: item["hard"] for item in spec["process"]["rlimits"]}
        assert limits["RLIMIT_NOFILE"] == attended.ROOM_FILES
    # A kernel of its own holds the tool to it and needs no room.
    assert [step["name"] for step in attended.arranged(plan, oci.FLAVOURS["runsc"])].count("rlimits") == 1


def test_a_terminal_is_mounted_by_one_and_opened_by_another() -> None:
    placed = attended.arranged(plan_of(tty=True), FLAVOURS[0])
    assert [step["where"] for step in placed if step["name"] == "terminals"] == ["runtime", "call"]


def test_nsjail_gets_its_own_limits_filters_and_networks_switched_off() -> None:
    text = nsjail_config.nsjail_config(plan_of(), PLACE, (3, 4))
    lines = [line.strip() for line in text.splitlines()]
    for line in ("keep_caps: false", "keep_env: false", "disable_no_new_privs: false", "disable_rl: true"):
        assert line in lines
    assert lines.count("pass_fd: 3") == lines.count("pass_fd: 4") == 1
    assert 'outside_id: "1879048256"' in lines
    assert 'src: "/sys/kernel/root"' in lines
    assert "rw: false" in lines
    # On by default in nsjail; none of them may be switched off.
    for name in ("user", "ns", "pid", "ipc", "uts", "net"):
        assert f"clone_new{name}: false" not in lines


@settings(max_examples=200)
@given(st.text(max_size=40))
def test_any_text_comes_through_the_text_form_as_itself(text: str) -> None:
    line = nsjail_config.dump([("arg", text)])
    assert line.startswith('arg: "')
    assert line.endswith('"\n')
    assert line.count("\n") == 1
    body = line[6:-2]
    assert '"' not in body
    assert body.encode("ascii").decode("unicode_escape").encode("latin-1").decode() == text
