"""Builds the stand-in for libnvidia-ml.so.1 and writes its scenarios. Nothing here ever touches a GPU."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("nvml_standin.c")
LIBRARY = "libnvidia-ml.so.1"


def build(directory: Path, scenario: Path | None = None) -> Path:
    """Compile the stand-in into `directory`; with `scenario`, where it looks without an environment variable."""
    target = directory / LIBRARY
    define = [f'-DSCENARIO="{scenario}"'] if scenario is not None else []
    flags = [
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-missing-field-initializers",
        "-Werror",
        "-shared",
        "-fPIC",
        f"-Wl,-soname,{LIBRARY}",
    ]
    subprocess.run(["gcc", *flags, *define, "-o", str(target), str(SOURCE)], check=True, timeout=60)
    return target


@dataclass
class Scenario:
    """What the stand-in answers. Change the lines, then `write`; it reads them anew at each call."""

    path: Path
    driver: str = "575.57.08"
    devices: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def device(self, index: int, **values: object) -> Scenario:
        known: dict[str, object] = {
            "uuid": f"GPU-standin-{index}",
            "name": "Stand-in",
            "minor": index,
            "total": 81920,
            "used": 500,
            "sm": 0,
            "power": 60000,
            "limit": 300000,
            "min": 100000,
            "max": 400000,
            "energy": 1000000,
        }
        self.devices.append(_line(f"device {index}", {**known, **values}))
        return self

    def slice(self, device: int, number: int, **values: object) -> Scenario:
        known: dict[str, object] = {"uuid": f"MIG-standin-{device}-{number}", "slices": 1, "total": 9728, "used": 12}
        self.devices.append(_line(f"slice {device} {number}", {**known, **values}))
        return self

    def process(self, device: int, pid: int, mib: int, **values: object) -> Scenario:
        self.processes.append(_line(f"process {device} {pid}", {"mib": mib, **values}))
        return self

    def fail(self, function: str, code: int) -> Scenario:
        self.troubles.append(f"fail {function} {code}")
        return self

    def hang(self, function: str, milliseconds: int) -> Scenario:
        self.troubles.append(f"hang {function} {milliseconds}")
        return self

    def write(self) -> Scenario:
        """By rename: the stand-in never sees half of it."""
        lines = [f"driver {self.driver}", *self.devices, *self.processes, *self.troubles]
        new = self.path.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        os.replace(new, self.path)
        return self

    @property
    def log(self) -> list[str]:
        """What it was asked to change."""
        log = Path(f"{self.path}.log")
        return log.read_text().splitlines() if log.exists() else []


def _line(head: str, values: dict[str, object]) -> str:
    return " ".join([head, *(f"{key}={value}" for key, value in values.items())])
