"""What the bench says about its measurements, and that everybody gets the same turns."""

from __future__ import annotations

import statistics
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.bench import latency, plot
from sandbox.bench.contenders import Contender
from sandbox.bench.jobs import Job, jobs
from sandbox.bench.stats import quantile, ratios, summarise

measurements = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=60)


@given(measurements)
def test_a_summary_is_in_order_and_agrees_with_the_standard_library(values: list[float]) -> None:
    found = summarise(values)
    ordered = [found.least, found.p10, found.median, found.p95, found.p99, found.most]
    assert ordered == sorted(ordered)
    assert found.median == pytest.approx(statistics.median(values))
    assert (found.count, found.least, found.most) == (len(values), min(values), max(values))


@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=60))
def test_quantiles_are_those_of_the_standard_library(values: list[float]) -> None:
    percents = statistics.quantiles(values, n=100, method="inclusive")
    ordered = sorted(values)
    for percent in (10, 50, 95, 99):
        assert quantile(ordered, percent / 100) == pytest.approx(percents[percent - 1], abs=1e-6)


def test_nothing_measured_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(ValueError, match="0 measurements"):
        summarise([])
    with pytest.raises(ValueError, match="no quantile"):
        quantile([1.0], 1.5)


def test_ratios_are_to_one_of_them() -> None:
    assert ratios({"ours": 2.0, "theirs": 5.0}, "ours") == {"ours": 1.0, "theirs": 2.5}
    assert ratios({"theirs": 5.0}, "ours") == {}


def contender(name: str, done: list[str], *, fails: bool = False) -> Contender:
    def do(job: Job) -> None:
        done.append(name)
        if fails:
            raise RuntimeError("cannot")

    return Contender(name, "", do, jobs=("true",))


def test_everybody_gets_the_same_number_of_turns_in_changing_order() -> None:
    done: list[str] = []
    todo = latency.turns([contender(name, done) for name in "abcd"], [Job("true", ())])
    found = latency.measure(todo, 12, lambda _: None, pause_s=0)
    assert {len(times) for times in found.times.values()} == {12}
    order = ["".join(done[start : start + 4]) for start in range(4, len(done), 4)]
    assert all(sorted(turn) == list("abcd") for turn in order)
    assert len(set(order)) > 3


def test_who_cannot_do_a_job_is_told_once_and_left_out() -> None:
    done: list[str] = []
    todo = latency.turns([contender("good", done), contender("bad", done, fails=True)], [Job("true", ())])
    found = latency.measure(todo, 5, lambda _: None, pause_s=0)
    assert Counter(done) == {"good": 6, "bad": 1}
    assert found.failures["bad, true"] == ["RuntimeError: cannot"]
    assert list(found.summaries()) == [("good", "true")]


def test_a_chart_is_svg_with_a_bar_for_each_row_and_escapes_names() -> None:
    rows = [plot.Bar("a <b> & c", 0.5, 0.4, 0.9, ours=True), plot.Bar("slow", 900.0, 800.0, 1500.0, ours=False)]
    root = ET.fromstring(plot.bars("title", "ms", rows))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <b> & c" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + len(rows)
    with pytest.raises(ValueError, match="nothing"):
        plot.bars("title", "ms", [])


def test_jobs_say_the_same_as_programs_and_as_functions() -> None:
    for job in jobs():
        if job.function is not None:
            assert str(job.function()) == job.expected
