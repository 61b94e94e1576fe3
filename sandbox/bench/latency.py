"""How long one job takes, from asking to having the answer: everybody in turn, round after round."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sandbox.bench.contenders import Contender
from sandbox.bench.jobs import Job
from sandbox.bench.stats import Summary, summarise

FAILURES_MAX = 3
# Who takes longer than this gets fewer turns, so that a slow peer does not make the run long.
SLOW_S = 0.2


@dataclass
class Measured:
    """Milliseconds by (contender, job), and what went wrong."""

    times: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def summaries(self) -> dict[tuple[str, str], Summary]:
        return {key: summarise(values) for key, values in self.times.items() if values}


def turns(contenders: Sequence[Contender], jobs: Sequence[Job]) -> list[tuple[Contender, Job]]:
    return [(contender, job) for contender in contenders for job in jobs if job.name in contender.jobs]


def rounds(todo: list[tuple[Contender, Job]], count: int, seed: int) -> Iterator[tuple[int, Contender, Job]]:
    """All turns, `count` times, each time in another order."""
    shuffle = random.Random(seed)  # noqa: S311 - an order, not a secret
    for number in range(count):
        order = list(todo)
        shuffle.shuffle(order)
        for contender, job in order:
            yield number, contender, job


def measure(
    todo: list[tuple[Contender, Job]], count: int, tell: Callable[[str], None], *, pause_s: float = 0.01
) -> Measured:
    """`count` rounds. A contender that fails FAILURES_MAX times with a job is left out of the rest."""
    found = Measured()
    for contender, job in todo:
        _once(contender, job, found)  # caches, and whether it works at all
    found.times.clear()
    # Who cannot do a job at all is told once, and not asked again.
    todo = [(contender, job) for contender, job in todo if not found.failures[f"{contender.name}, {job.name}"]]
    last = -1
    for number, contender, job in rounds(todo, count, seed=count):
        if number != last:
            tell(f"round {number + 1} of {count}")
            last = number
        name = f"{contender.name}, {job.name}"
        if len(found.failures[name]) >= FAILURES_MAX:
            continue
        times = found.times[contender.name, job.name]
        if times and times[-1] > SLOW_S * 1000 and number % 4:
            continue
        time.sleep(pause_s)
        _once(contender, job, found)
    return found


def _once(contender: Contender, job: Job, found: Measured) -> None:
    started = time.perf_counter()
    try:
        contender.do(job)
    except Exception as error:  # noqa: BLE001 - whatever a peer does wrong, the others are measured, and it is told
        found.failures[f"{contender.name}, {job.name}"].append(f"{type(error).__name__}: {error}"[:500])
        return
    found.times[contender.name, job.name].append((time.perf_counter() - started) * 1000)


def paced(call: Callable[[], object], count: int, pause_s: float) -> Summary:
    """One caller that pauses between its calls, as an agent does: what it waits for each, in milliseconds."""
    times = []
    for _ in range(count):
        time.sleep(pause_s)
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1000)
    return summarise(times)
