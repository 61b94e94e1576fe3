"""Compute `daylight.csv`: sunrise and sunset at five places through 2025, every fifth day.

The equations are the usual low-precision ones for the sun's declination and the equation of time (Fourier series in
the day of the year, good to a minute or two at these latitudes); sunrise is the upper limb at the horizon with
standard refraction, 90.833 degrees from the zenith. Computed, so nobody's data: run this file to make it again.
"""

from __future__ import annotations

import csv
import datetime
import math
import sys
from pathlib import Path

PLACES = (
    ("Quito", -0.18, -78.47),
    ("Nairobi", -1.29, 36.82),
    ("Sydney", -33.87, 151.21),
    ("Lisbon", 38.72, -9.14),
    ("Helsinki", 60.17, 24.94),
)
ZENITH = math.radians(90.833)
FIELDS = ("date", "place", "latitude", "longitude", "sunrise_utc", "sunset_utc", "day_length_min")


def sun(day_of_year: int) -> tuple[float, float]:
    """(declination in radians, equation of time in minutes) at noon UTC."""
    g = 2 * math.pi / 365 * (day_of_year - 1)
    equation = 229.18 * (
        0.000075
        + 0.001868 * math.cos(g)
        - 0.032077 * math.sin(g)
        - 0.014615 * math.cos(2 * g)
        - 0.040849 * math.sin(2 * g)
    )
    declination = (
        0.006918
        - 0.399912 * math.cos(g)
        + 0.070257 * math.sin(g)
        - 0.006758 * math.cos(2 * g)
        + 0.000907 * math.sin(2 * g)
        - 0.002697 * math.cos(3 * g)
        + 0.00148 * math.sin(3 * g)
    )
    return declination, equation


def clock(minutes: float) -> str:
    whole = round(minutes) % 1440
    return f"{whole // 60:02d}:{whole % 60:02d}"


def rows() -> list[tuple[str, str, float, float, str, str, float]]:
    made = []
    for number in range(1, 366, 5):
        date = datetime.date(2025, 1, 1) + datetime.timedelta(days=number - 1)
        declination, equation = sun(number)
        for place, latitude, longitude in PLACES:
            phi = math.radians(latitude)
            cosine = math.cos(ZENITH) / (math.cos(phi) * math.cos(declination)) - math.tan(phi) * math.tan(declination)
            half_day = 4 * math.degrees(math.acos(cosine))
            noon = 720 - 4 * longitude - equation
            times = clock(noon - half_day), clock(noon + half_day)
            made.append((date.isoformat(), place, latitude, longitude, *times, round(2 * half_day, 1)))
    return made


def main() -> None:
    with Path(__file__).with_name("daylight.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(FIELDS)
        writer.writerows(rows())


if __name__ == "__main__":
    sys.exit(main())
