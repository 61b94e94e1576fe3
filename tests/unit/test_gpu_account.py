"""A call's account from reading to reading, and the findings: pure."""

from __future__ import annotations

from typing import Any

import pytest

from sandbox.audit.attestation import attestation
from sandbox.gpu.account import Account
from sandbox.gpu.facts import GpuUnit
from sandbox.gpu.limits import Asked
from sandbox.gpu.sampling import Detail, Reading
from sandbox.monitor.gpu import DutyPoint, gpu_steady_duty, gpu_used_without_grant, miner_argv

GPU = GpuUnit("GPU-0", "0", "H", energy=True)
SLICE = GpuUnit("MIG-0", "0:0", "H", parent="GPU-0", energy=True)
MIB = 1 << 20
ALL = ("gpu_memory", "gpu_seconds", "gpu_energy", "gpu_processes")


def detail(**values: Any) -> Detail:
    known: dict[str, Any] = {"sm_percent": 0, "memory_percent": 0, "power_mw": 0, "energy_mj": 0, "process_sm": {}}
    return Detail(**{**known, **values})


def reading(at_s: float, processes: dict[int, int | None] | None = None, **values: Any) -> Reading:
    return Reading("GPU-0", at_s, memory_used_bytes=values.pop("used", 500 * MIB), processes=processes, **values)


def account(*, unit: GpuUnit = GPU, enforced: tuple[str, ...] = ALL, **asked: Any) -> Account:
    before = Reading(unit.uuid, 0.0, 500 * MIB, {}, detail(energy_mj=1000))
    return Account(Asked(count=1, **asked), [unit], {unit.uuid: before}, enforced)


def only(found: Account) -> dict[str, Any]:
    return found.to_json()[0]


def test_nothing_seen_is_unknown_and_not_zero() -> None:
    row = only(account())
    assert row["samples"] == 0
    for name in ("memory_peak_bytes", "seconds", "energy_j", "sm_percent_avg", "power_watts_avg", "pcie_bytes"):
        assert row[name] is None, name


def test_memory_is_the_sum_over_the_calls_processes() -> None:
    found = account(memory_bytes=800 * MIB)
    found.add(reading(0.1, {7: 300 * MIB, 8: 400 * MIB, 99: 9000 * MIB}), {7, 8})
    assert found.breaches() == []
    found.add(reading(0.2, {7: 300 * MIB, 8: 600 * MIB}), {7, 8})
    breach = found.breaches()[0]
    assert (breach.limit, breach.seen, breach.allowed) == ("gpu_memory", 900 * MIB, 800 * MIB)
    assert breach.gap_s == pytest.approx(0.1)
    found.add(reading(0.3, {}), set())
    assert found.breaches() == []
    assert only(found)["memory_peak_bytes"] == 900 * MIB
    assert only(found)["memory_by"] == "processes"


def test_memory_that_is_not_said_per_process_is_what_the_device_has_more() -> None:
    found = account(memory_bytes=800 * MIB)
    found.add(reading(0.1, {7: None}, used=1500 * MIB), {7})
    assert found.breaches()[0].seen == 1000 * MIB
    assert only(found)["memory_by"] == "device"


def test_memory_that_nobody_says_cannot_be_watched() -> None:
    found = account(memory_bytes=800 * MIB)
    assert found.unwatchable() == ""
    found.add(reading(0.1, {7: None}, used=None), {7})
    assert found.unwatchable() == "gpu_memory"
    unasked = account(enforced=())
    unasked.add(reading(0.1, {7: None}, used=None), {7})
    assert unasked.unwatchable() == ""
    assert only(unasked)["memory_peak_bytes"] is None


@pytest.mark.parametrize(
    ("values", "others", "seconds", "basis"),
    [
        ({"process_sm": {7: 50.0, 99: 50.0}}, True, 1.0, "processes"),
        ({"process_sm": {}}, False, 0.0, "processes"),
        ({"process_sm": {7: 80.0, 8: 80.0}}, False, 2.0, "processes"),
        ({"process_sm": None, "sm_percent": 25}, False, 0.5, "device"),
        ({"process_sm": None, "sm_percent": 25}, True, 2.0, "residence"),
        ({"process_sm": None, "sm_percent": None}, False, 2.0, "residence"),
    ],
)
def test_gpu_seconds_by_the_best_that_is_known(
    values: dict[str, Any], others: bool, seconds: float, basis: str
) -> None:
    found = account(seconds=100.0)
    processes: dict[int, int | None] = {7: MIB, 8: MIB} | ({99: MIB} if others else {})
    found.add(reading(1.0, processes), {7, 8})
    found.add(reading(2.0, processes, detail=detail(**values)), {7, 8})
    assert only(found)["seconds"] == pytest.approx(seconds)
    assert only(found)["seconds_by"] == basis


def test_time_without_a_process_on_the_device_does_not_count() -> None:
    found = account(seconds=1.0)
    for second in (1, 2, 3):
        found.add(reading(second, {99: MIB}, detail=detail(process_sm=None, sm_percent=100)), set())
    assert only(found)["seconds"] == 0
    assert found.breaches() == []


def test_a_process_that_has_ended_meanwhile_still_counts() -> None:
    found = account(seconds=100.0)
    found.add(reading(0.5, {7: MIB}), {7})
    found.add(reading(1.0, {}, detail=detail(process_sm={7: 60.0})), set())
    assert only(found)["seconds"] == pytest.approx(0.6)
    found.add(reading(2.0, {}, detail=detail(process_sm={7: 60.0})), set())
    assert only(found)["seconds"] == pytest.approx(0.6), "and not for ever"


def test_gpu_seconds_cross_their_limit() -> None:
    found = account(seconds=1.5)
    for second in (1, 2):
        found.add(reading(second, {7: MIB}, detail=detail(process_sm={7: 100.0})), {7})
    assert [breach.limit for breach in found.breaches()] == ["gpu_seconds"]


def test_energy_alone_is_the_counters_difference() -> None:
    found = account(energy_j=50.0)
    found.add(reading(1.0, {7: MIB}, detail=detail(energy_mj=41_000)), {7})
    assert (only(found)["energy_j"], only(found)["energy_shared"]) == (40.0, False)
    assert found.breaches() == []
    found.add(reading(2.0, {7: MIB}, detail=detail(energy_mj=61_000)), {7})
    assert found.breaches()[0].limit == "gpu_energy"


def test_energy_beside_others_is_a_part_and_labelled() -> None:
    found = account()
    sm = {7: 30.0, 99: 10.0}
    found.add(reading(1.0, {7: MIB, 99: MIB}, detail=detail(energy_mj=41_000, process_sm=sm)), {7})
    assert (only(found)["energy_j"], only(found)["energy_shared"]) == (30.0, True)
    unknown = account()
    unknown.add(reading(1.0, {7: MIB, 99: MIB}, detail=detail(energy_mj=41_000, process_sm=None)), {7})
    assert only(unknown)["energy_j"] == 40.0, "all of it where nobody can say"
    part = account(unit=SLICE)
    part.add(Reading("MIG-0", 1.0, MIB, {7: MIB}, detail(energy_mj=41_000)), {7})
    assert only(part)["energy_shared"] is True


def test_a_process_that_was_just_killed_is_nobody_else() -> None:
    found = account()
    found.add(reading(0.5, {7: MIB}), {7})
    found.add(reading(1.0, {7: MIB}, detail=detail(energy_mj=2000)), set())
    assert only(found)["energy_shared"] is False


def test_a_counter_that_is_gone_makes_energy_unknown() -> None:
    found = account(energy_j=50.0)
    found.add(reading(1.0, {7: MIB}, detail=detail(energy_mj=41_000)), {7})
    found.add(reading(2.0, {7: MIB}, detail=detail(energy_mj=None)), {7})
    found.add(reading(3.0, {7: MIB}, detail=detail(energy_mj=99_000)), {7})
    assert only(found)["energy_j"] is None
    assert found.unwatchable() == "gpu_energy"


def test_processes_are_counted_over_all_units() -> None:
    other = GpuUnit("GPU-1", "1", "H")
    before = {unit.uuid: Reading(unit.uuid, 0.0, 0, {}, detail()) for unit in (GPU, other)}
    found = Account(Asked(count=2, processes_max=2), [GPU, other], before, ALL)
    found.add(reading(0.1, {7: 1, 8: 1}), {7, 8})
    found.add(Reading("GPU-1", 0.1, 0, {8: 1}), {8})
    assert found.breaches() == [], "one process on two devices is one"
    found.add(Reading("GPU-1", 0.2, 0, {9: 1}), {9})
    assert [(breach.limit, breach.seen) for breach in found.breaches()] == [("gpu_processes", 3)]


def test_what_is_not_enforced_is_counted_and_ends_nothing() -> None:
    found = account(memory_bytes=MIB, enforced=())
    found.add(reading(0.1, {7: 900 * MIB}), {7})
    assert found.breaches() == []
    assert only(found)["memory_peak_bytes"] == 900 * MIB


def test_averages_are_weighted_by_time_and_the_series_has_a_digest() -> None:
    found = account()
    found.add(reading(1.0, {7: 1}, detail=detail(sm_percent=10, power_mw=100_000, pcie_bytes_per_s=5)), {7})
    found.add(reading(4.0, {7: 1}, detail=detail(sm_percent=90, power_mw=300_000, pcie_bytes_per_s=10)), {7})
    row = only(found)
    assert (row["sm_percent_avg"], row["power_watts_avg"], row["pcie_bytes"]) == (70.0, 250.0, 35)
    assert (row["samples"], row["gap_max_s"], row["processes_peak"]) == (2, 3.0, 1)
    assert row["series_sha256"] != only(account())["series_sha256"]


# -- findings ----------------------------------------------------------------------------------------------------


def duty(values: list[float], pcie: int | None = 200) -> list[DutyPoint]:
    return [DutyPoint(float(second), value, pcie) for second, value in enumerate(values)]


@pytest.mark.parametrize(
    ("points", "found"),
    [
        (duty([99.0] * 61), True),
        (duty([98.0, 100.0] * 31), True),
        (duty([99.0] * 61, pcie=None), True),
        (duty([99.0] * 59), False),
        (duty([94.0] * 61), False),
        (duty([99.0] * 30 + [60.0] + [99.0] * 30), False),
        (duty([99.0] * 61, pcie=5 << 20), False),
        (duty([0.0] * 61 + [99.0] * 61), True),
        ([], False),
    ],
)
def test_steady_duty_is_flat_high_long_and_quiet_on_the_bus(points: list[DutyPoint], found: bool) -> None:
    finding = gpu_steady_duty(points, "GPU-0", percent=95, time_s=60.0)
    assert (finding is not None) == found
    if finding is not None:
        assert (finding.severity, finding.response) == ("suspicious", "note"), "suspicion alone ends nothing"
        assert finding.evidence["sm_mean"] >= 95


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["/opt/xmrig", "-o", "x"], True),
        (["./T-Rex"], True),
        (["python3", "x.py", "--algo", "kawpow"], True),
        (["tool", "--algo=ethash"], True),
        (["tool", "-o", "stratum+ssl://pool.example:443"], True),
        (["tool", "--url=stratum+tcp://pool.example:443"], True),
        (["python3", "train.py", "--algo", "ppo"], False),
        (["grep", "xmrig", "log.txt"], False),
        (["cat", "/home/user/trex.txt"], False),
        (["git", "clone", "https://example.org/stratum"], False),
        ([], False),
    ],
)
def test_a_miners_command_line(argv: list[str], found: bool) -> None:
    finding = miner_argv(argv, pid=7)
    assert (finding is not None) == found
    assert finding is None or finding.severity == "suspicious"


def test_use_without_a_grant_is_a_breach() -> None:
    row = gpu_used_without_grant(7, "GPU-1", []).to_json()
    assert (row["id"], row["severity"], row["response"], row["fault"]) == (
        "gpu_used_without_grant",
        "breach",
        "kill",
        "tool",
    )
    assert "no GPU" in row["title"]
    assert row["evidence"] == [{"pid": 7, "uuid": "GPU-1", "granted": []}]
    assert row["attack"] == ["T1496.001"]


# -- the record's verdict ------------------------------------------------------------------------------------------

STRAY = {"id": "gpu_used_without_grant"}


@pytest.mark.parametrize(
    ("count", "used", "kind", "findings", "verdict"),
    [
        (0, None, "ok", [], None),
        (0, None, "denied", [STRAY], "exceeded"),
        (1, [{"processes_peak": 1}], "ok", [], "within"),
        (1, [{"processes_peak": 0}], "ok", [], "unused"),
        (1, [{"processes_peak": 1}], "limit:gpu_memory", [], "exceeded"),
        (1, [{"processes_peak": 1}], "denied", [STRAY], "exceeded"),
        (1, None, "launch_error", [], "not_observable"),
    ],
)
def test_the_verdict_on_a_gpu_grant(
    count: int, used: list[dict[str, Any]] | None, kind: str, findings: list[dict[str, Any]], verdict: str | None
) -> None:
    record = {"usage": {"gpu": used}, "findings": findings, "ending": {"kind": kind}}
    found = attestation({"gpu": {"count": count}}, record).get("gpu")
    assert (found and found["verdict"]) == verdict
