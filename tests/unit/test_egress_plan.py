"""What a manifest's network becomes in a plan, with and without nf_tables on the host. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandbox import planner_egress
from sandbox.host import Feature, HostFacts
from sandbox.manifest import Manifest
from sandbox.plan import Limit
from sandbox.profiles import resolve

WITH = HostFacts(tproxy=Feature(True))
WITHOUT = HostFacts(tproxy=Feature(False, "nf_tables with tproxy: Operation not supported"))
PLAIN = Limit("network", "allowlist", "allowlist", "full", "network namespace with loopback only")


def manifest(*allow: str, **more: Any) -> Manifest:
    return Manifest(network={"mode": "allowlist", "allow": allow, **more})


def test_without_a_network_there_is_no_step_no_policy_and_no_resolver() -> None:
    none = Manifest()
    assert planner_egress.steps(none, WITH) == ()
    assert planner_egress.policy(none) is None
    assert planner_egress.nameserver(none) == "127.0.0.1"
    assert planner_egress.refusal(none, WITHOUT) == ""
    assert planner_egress.limit(none, WITH, PLAIN) == PLAIN


def test_the_step_holds_nothing_of_the_rules_so_that_such_jails_serve_any_manifest() -> None:
    one, other = manifest("a.example:443"), manifest("b.example:22", "10.0.0.0/8:*")
    assert planner_egress.steps(one, WITH) == planner_egress.steps(other, WITH)
    assert planner_egress.policy(one) != planner_egress.policy(other)


def test_an_empty_allowlist_still_has_a_gateway_that_sees_what_is_tried() -> None:
    assert planner_egress.steps(manifest(), WITH)
    assert planner_egress.policy(manifest()) is not None


def test_without_nf_tables_the_named_ports_are_listened_on() -> None:
    (step,) = planner_egress.steps(manifest("a.example:443", "b.example:8000-8003", "10.0.0.0/8:80"), WITHOUT)
    assert step.args["ports"] == [53, 80, 443, 8000, 8001, 8002, 8003]
    limit = planner_egress.limit(manifest("a.example:443"), WITHOUT, PLAIN)
    assert (limit.level, "by port" in limit.mechanism) == ("full", True)
    assert "Operation not supported" in limit.reason


@pytest.mark.parametrize("rule", ["a.example:*", "a.example:8000-9000", "a.example:1-13"])
def test_without_nf_tables_wide_ranges_are_refused_and_with_it_they_are_not(rule: str) -> None:
    assert "no ranges" in planner_egress.refusal(manifest(rule), WITHOUT)
    assert planner_egress.refusal(manifest(rule), WITH) == ""


def test_a_network_that_is_not_held_stays_not_held() -> None:
    broken = replace(PLAIN, level="none", applied=None, mechanism="")
    assert planner_egress.limit(manifest("a.example:443"), WITH, broken) == broken


def test_budgets_travel_with_the_rules() -> None:
    overrides = {
        "allow_hosts": ["a.example"],
        "upload_max": "1MiB",
        "download_max": "unlimited",
        "network_rate": "2MiB/s",
        "connections_max": 7,
        "idle_time": "5s",
        "network.host_upload_max": "1kB",
        "network.host_rate": "3MiB/s",
        "network.host_connections_at_once": 4,
        "on_breach": "kill",
    }
    policy = planner_egress.policy(resolve("minimal", overrides=overrides).manifest)
    assert policy is not None
    assert (policy["allow"], policy["on_breach"]) == (["a.example:443"], "kill")
    call, host = policy["call"], policy["host"]
    assert (call["upload_max_bytes"], call["download_max_bytes"], call["rate_bytes_per_s"]) == (1 << 20, None, 2 << 20)
    assert (call["connections_max"], call["idle_time_s"]) == (7, 5.0)
    assert host == {
        "upload_max_bytes": 1000,
        "download_max_bytes": None,
        "rate_bytes_per_s": 3 << 20,
        "connections_max": None,
        "connections_at_once": 4,
    }
