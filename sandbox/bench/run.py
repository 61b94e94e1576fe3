"""One run of everything, as data: what `sandbox bench` writes down."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

from sandbox.bench import contenders, latency, load, machine, ours, plot, walls
from sandbox.bench.contenders import Contender
from sandbox.bench.jobs import Job, jobs
from sandbox.bench.stats import ratios

TITLES = {
    "true": "/bin/true",
    "python": "python3 -c pass",
    "function": "a Python function that returns 1",
    "numpy": "a function that uses numpy (others import it in each call)",
}


@dataclass(frozen=True)
class Options:
    """`rounds` of everybody's turns; `seconds` of each load; counts of what runs at once. 0 leaves a part out."""

    rounds: int = 40
    paced_calls: int = 300
    seconds: float = 5.0
    sustained_s: float = 10.0
    alive: int = 100
    submissions: int = 2000
    with_peers: bool = True
    image: str = ""
    sandlock_python: str = ".cache/peers/bin/python"


def run(options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    """Measure, saying on the way what is being done."""
    todo = jobs()
    result: dict[str, Any] = {"machine": machine.describe(), "options": asdict(options)}
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as place, contextlib.ExitStack() as stack:
        boxes = ours.Boxes(Path(place))
        stack.callback(boxes.close)
        tell("warming up")
        boxes.warm_up(todo)
        everybody = ours.contenders(boxes)
        result["missing"] = {}
        if options.with_peers:
            found, result["missing"] = contenders.peers(options.image, options.sandlock_python)
            behind, missing = walls.contenders(Path(place), options.image)
            found += behind
            result["missing"] |= missing
            everybody += found
            for contender in found:
                stack.callback(contender.close)
        measured = latency.measure(latency.turns(everybody, todo), options.rounds, tell)
        result["latency_ms"] = _latency(measured, everybody)
        result["failures"] = {name: texts for name, texts in measured.failures.items() if texts}
        result["ours"] = _ours(boxes, todo, options, tell)
        result["spawned_cpu_ms"] = _spawned(everybody, todo, result["failures"])
        if options.seconds:
            tell("many callers of others at once")
            result["throughput_of_others"] = _others(everybody, todo, options)
    result["load_after"] = machine.load()
    plain: dict[str, Any] = _plain(result)
    return plain


def _latency(measured: latency.Measured, everybody: list[Contender]) -> dict[str, Any]:
    """By job: each contender's summary, and how many times the time of our quickest way it takes."""
    found: dict[str, Any] = {}
    by_name = {contender.name: contender for contender in everybody}
    summaries = measured.summaries()
    for job in dict.fromkeys(job for _, job in summaries):
        rows = {name: summary for (name, its_job), summary in summaries.items() if its_job == job}
        mine = [name for name in rows if by_name[name].ours and name not in ("command line", "new runtime")]
        base = min(mine, key=lambda name: rows[name].median, default="")
        times = ratios({name: summary.median for name, summary in rows.items()}, base)
        found[job] = {
            name: {**asdict(rows[name]), "times_ours": times.get(name), "ours": by_name[name].ours}
            | {"differs": by_name[name].differs}
            for name in sorted(rows, key=lambda name: rows[name].median)
        }
    return found


# Whoever does all of its work in processes that it starts and waits for: what is used elsewhere would be missed.
_SPAWNED = ("bare subprocess", "crun", "runc", "nsjail", "command line")
_LOADED = ("bare subprocess", "bubblewrap", "docker run")


def _spawned(everybody: list[Contender], todo: tuple[Job, ...], failures: dict[str, Any]) -> dict[str, Any]:
    """By job and contender, the processor time of a whole run."""
    return {
        job.name: {
            contender.name: load.spawned_cpu_ms(functools.partial(contender.do, job), 10)
            for contender in everybody
            if contender.name in _SPAWNED
            and job.name in contender.jobs
            and f"{contender.name}, {job.name}" not in failures
        }
        for job in todo
    }


def _others(everybody: list[Contender], todo: tuple[Job, ...], options: Options) -> dict[str, Any]:
    """How often a second those of _LOADED start `python3 -c pass`, beside which our functions stand."""
    python = next(job for job in todo if job.name == "python")
    return {
        contender.name: [
            load.throughput(functools.partial(contender.do, python), callers, options.seconds) for callers in (1, 8, 32)
        ]
        for contender in everybody
        if contender.name in _LOADED
    }


def _ours(boxes: ours.Boxes, todo: tuple[Job, ...], options: Options, tell: Callable[[str], None]) -> dict[str, Any]:
    """What only concerns us: load, memory, start, record."""
    by_name = {job.name: job for job in todo}
    function, true = by_name["function"], by_name["true"]
    heaviest = by_name.get("numpy", function)

    def call() -> None:
        ours.function(boxes.warm, function)

    def program() -> None:
        ours.program(boxes.warm, true)

    found: dict[str, Any] = {}
    if options.paced_calls:
        tell("calls with pauses")
        found["paced_function_ms"] = latency.paced(call, options.paced_calls, 0.02)
        found["paced_program_ms"] = latency.paced(program, options.paced_calls, 0.02)
    tell("processor time of a call")
    found["cpu_ms"] = {"function": load.own_cpu_ms(boxes.warm, call, 100)}
    found["cpu_ms"]["program"] = load.own_cpu_ms(boxes.warm, program, 100)
    if options.seconds:
        tell("many callers at once")
        found["throughput"] = [load.throughput(call, callers, options.seconds) for callers in (1, 8, 32)]
        found["throughput_programs"] = [load.throughput(program, callers, options.seconds) for callers in (1, 8, 32)]
    if options.sustained_s:
        tell(f"sustained for {options.sustained_s:.0f} s")
        found["sustained"] = load.throughput(call, 4, options.sustained_s)
    tell("memory, start, record")
    with tempfile.TemporaryDirectory(prefix="sandbox-bench-") as place:
        found["memory"] = load.memory(Path(place), heaviest)
    found["start"] = load.first_call(5)
    found["record_ms"] = load.record_cost(boxes.state, 60)
    if options.alive:
        tell(f"{options.alive} jails at once")
        found["alive"] = load.alive_at_once(options.alive)
    if options.submissions:
        tell(f"{options.submissions} submissions at once")
        found["submissions"] = load.submissions(options.submissions)
    return found


def _plain(value: Any) -> Any:
    """As JSON data, rounded to what was really measured."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def write(result: dict[str, Any], directory: Path) -> list[Path]:
    """`TIME.json` and a chart per job; the paths."""
    directory.mkdir(parents=True, exist_ok=True)
    stem = result["machine"]["time"].replace(":", "").replace("-", "")
    paths = [directory / f"{stem}.json"]
    paths[0].write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for job, rows in result["latency_ms"].items():
        drawn = [plot.Bar(name, row["median"], row["p10"], row["p95"], ours=row["ours"]) for name, row in rows.items()]
        paths.append(directory / f"{stem}-{job}.svg")
        paths[-1].write_text(plot.bars(TITLES.get(job, job), "ms", drawn), encoding="utf-8")
    return paths
