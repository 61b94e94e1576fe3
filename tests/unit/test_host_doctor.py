"""`sandbox doctor` tells people and programs the same, and its exit status says whether calls run fully enforced."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import typer
from typer.testing import CliRunner

from sandbox import host
from sandbox.cli import doctor
from tests.unit.test_host_table import FULL, ORDINARY


def run(monkeypatch: pytest.MonkeyPatch, facts: host.HostFacts | Exception, *args: str):
    def probe_apart() -> host.HostFacts:
        if isinstance(facts, Exception):
            raise facts
        return facts

    monkeypatch.setattr(host, "probe_apart", probe_apart)
    app = typer.Typer()
    app.callback()(lambda: None)
    doctor.register(app)
    return CliRunner().invoke(app, ["doctor", *args])


def test_full_enforcement_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FULL)
    assert result.exit_code == 0, result.output
    assert "calls run fully enforced on this host" in result.output


def test_a_missing_control_exits_1_with_reason_and_command(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, replace(ORDINARY, systemd_user=host.Feature(True)))
    assert result.exit_code == 1
    assert "memory, cpu_time: not ours" in result.output
    assert "fix: systemd-run --user --scope -p Delegate=yes -- COMMAND" in result.output
    assert "not fully enforced here: memory, cpus, cpu_time" in result.output


def test_controls_that_few_calls_ask_for_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    less = {**FULL.cgroups, "io": host.CgroupControl("", "no io here")}
    result = run(monkeypatch, replace(FULL, cgroups=less, landlock_abi=0))
    assert result.exit_code == 0
    assert "no io here" in result.output


def test_json_carries_facts_and_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, ORDINARY, "--json")
    assert result.exit_code == 1
    data = json.loads(result.output)
    assert data["full"] is False
    assert data["missing"] == ["memory", "cpus", "cpu_time"]
    assert data["controls"]["pids"]["level"] == "full"
    assert set(data["controls"]) == set(host.CONTROL_NAMES)
    assert host.HostFacts.from_json(data["host"]) == ORDINARY


def test_a_failed_look_exits_125(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, RuntimeError("the host could not be probed: boom"))
    assert result.exit_code == 125
    assert "boom" in result.output


def test_the_summary_names_a_block_on_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = replace(FULL, user_namespaces=host.Feature(False, "user.max_user_namespaces is 0", "sudo sysctl"))
    result = run(monkeypatch, blocked)
    assert result.exit_code == 1
    assert "user.max_user_namespaces is 0" in result.output
    assert "fix: sudo sysctl" in result.output


def test_the_summary_says_what_an_allowlist_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = run(monkeypatch, replace(FULL, tproxy=host.Feature(True)))
    assert "egress gateway  sees every port" in with_it.output
    without = run(monkeypatch, replace(FULL, tproxy=host.Feature(False, "no nf_tables with tproxy")))
    assert "at most 12 ports" in without.output
    assert "no nf_tables with tproxy   fix: sudo modprobe nft_tproxy" in without.output
    assert without.exit_code == with_it.exit_code == 0, "calls are held on any kernel"


def test_a_kernel_as_of_wsl2_is_told_feature_by_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel is its own: version 1 trees beside an empty unified one, uncounted swap, no Landlock, no TPROXY."""
    no_tproxy = host.Feature(False, "nft_tproxy: Operation not supported", "sudo modprobe nft_tproxy")
    wsl = replace(
        FULL,
        kernel="5.15.153.1-microsoft-standard-WSL2",
        cgroup_kind="hybrid",
        cgroups={name: host.CgroupControl("v1") for name in FULL.cgroups},
        swap_bytes=4 << 30,
        swap_accounted=False,
        landlock_abi=0,
        tproxy=no_tproxy,
    )
    result = run(monkeypatch, wsl)
    assert result.exit_code == 1
    assert "not fully enforced here: memory\n" in result.output
    assert "fix: boot with swapaccount=1, or sudo swapoff -a" in result.output
    assert "fix: boot with systemd.unified_cgroup_hierarchy=1" in result.output
    # A second wall, and ports that can be named without the module: said, and no reason to refuse a call.
    assert "landlock" in result.output
    assert "sudo modprobe nft_tproxy" in result.output
    assert run(monkeypatch, replace(wsl, swap_bytes=0)).exit_code == 0
