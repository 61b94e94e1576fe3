"""A CSV analysed in a jail: one decorated function, one granted file, a typed result and the record of it.

The data are day lengths at five places through 2025 (`data/daylight.csv`, computed by `data/make_daylight.py`).
The function uses pandas when it is installed, else numpy, else the standard library's sqlite3; each gives the same
numbers. It may read its one file, and nothing else of this machine: the second call asks for another one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from sandbox import SandboxError, ToolFailed, sandboxed

DATA = Path(__file__).resolve().parent / "data" / "daylight.csv"


@dataclass
class Place:
    """One place's year: day lengths in minutes, `swing` between the longest and the shortest day."""

    name: str
    latitude: float
    days: int
    mean: float
    shortest: float
    longest: float
    swing: float


@dataclass
class Analysis:
    """`slope`: minutes of swing for each degree of latitude away from the equator, through the origin."""

    library: str
    rows: int
    places: list[Place]
    slope: float


@sandboxed("data-science", read=[str(DATA)], memory="512MiB", wall_time="30s")
def analyse(file: str) -> Analysis:
    """Day lengths by place. Runs in the jail; everything it imports is imported there."""
    import csv

    with open(file, newline="") as lines:
        table = [(row["place"], float(row["latitude"]), float(row["day_length_min"])) for row in csv.DictReader(lines)]
    try:
        import pandas
    except ImportError:
        pandas = None
    try:
        import numpy
    except ImportError:
        numpy = None

    if pandas is not None:
        library = f"pandas {pandas.__version__}"
        frame = pandas.DataFrame(table, columns=["place", "latitude", "minutes"])
        grouped = frame.groupby(["place", "latitude"])["minutes"].agg(["size", "mean", "min", "max"])
        found = [(*key, *values) for key, values in zip(grouped.index, grouped.to_numpy().tolist(), strict=True)]
    elif numpy is not None:
        library = f"numpy {numpy.__version__}"
        found = []
        for name, latitude in sorted({row[:2] for row in table}):
            minutes = numpy.array([row[2] for row in table if row[0] == name])
            found.append((name, latitude, minutes.size, minutes.mean(), minutes.min(), minutes.max()))
    else:
        import sqlite3

        library = f"sqlite {sqlite3.sqlite_version}"
        with sqlite3.connect(":memory:") as base:
            base.execute("create table days (place text, latitude real, minutes real)")
            base.executemany("insert into days values (?, ?, ?)", table)
            found = base.execute(
                "select place, latitude, count(*), avg(minutes), min(minutes), max(minutes) from days "
                "group by place, latitude order by place"
            ).fetchall()

    places = [
        Place(name, float(latitude), int(days), float(mean), float(low), float(high), float(high) - float(low))
        for name, latitude, days, mean, low, high in found
    ]
    slope = sum(p.swing * abs(p.latitude) for p in places) / sum(p.latitude**2 for p in places)
    return Analysis(library, len(table), places, slope)


def show(analysis: Analysis) -> None:
    print(f"{analysis.rows} rows of {DATA.name}, read with {analysis.library}")
    print(f"{'place':10} {'latitude':>8} {'days':>5} {'mean':>7} {'shortest':>9} {'longest':>8}   minutes of daylight")
    for place in sorted(analysis.places, key=lambda place: place.swing):
        print(
            f"{place.name:10} {place.latitude:8.2f} {place.days:5} {place.mean:7.1f} {place.shortest:9.1f} "
            f"{place.longest:8.1f}   {'#' * round(place.swing / 20)}"
        )
    print(f"the year's swing grows by about {analysis.slope:.1f} minutes for each degree from the equator")


def main() -> int:
    try:
        outcome = analyse.call(str(DATA), why="how much does daylight vary over the year?")
        show(outcome.unwrap())
    except SandboxError as err:
        print(f"analyse_csv: {err}", file=sys.stderr)
        return 1
    record = outcome.record
    print(f"\nrecord {record.record_id}: {record.ending.kind} in {record.time.duration_s:.3f} s")
    for control, entry in record.enforcement.items():
        print(f"  {control:11} {entry.level:8} {entry.mechanism}")

    neighbour = DATA.with_name("make_daylight.py")
    neighbour.read_text()  # outside, whoever runs this can read it
    try:
        analyse(str(neighbour))
    except ToolFailed as err:
        print(f"\n{neighbour.name} beside it was asked for, and is not there inside: {err.type_name}")
        return 0
    print("a file that was not granted could be read", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
