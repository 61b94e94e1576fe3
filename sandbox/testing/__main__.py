"""`python -m sandbox.testing jail oci:crun docker --image python:3.11-slim`: try every promise, print what was found.

Exit status: 0 when nothing is broken, 1 otherwise. With `--write` the table goes into a page of the documentation.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sandbox.testing import page
from sandbox.testing.stage import Finding, Report
from sandbox.testing.suite import check_launcher

_VERSION_TIMEOUT_S = 10


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sandbox.testing", description=__doc__)
    parser.add_argument(
        "launchers", nargs="*", default=["jail"], help="jail, nsjail, docker, oci:crun, docker:runsc ..."
    )
    parser.add_argument("--image", default="", help="for launchers whose root is an image's")
    parser.add_argument("--best-effort", action="append", default=[], help="a control that may be less than full")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    args = parser.parse_args()
    reports = [_report(name, args.image, args.best_effort) for name in args.launchers]
    if args.write is not None:
        page.write(args.write, f"{page.table(reports)}\n\n{page.caption(_versions(args.launchers))}")
    return 0 if all(report.ok for report in reports) else 1


def _report(name: str, image: str, best_effort: list[str]) -> Report:
    launcher, _, runtime = name.partition(":")
    isolation: dict[str, Any] = {"best_effort": best_effort, **({"runtime": runtime} if runtime else {})}
    if launcher == "docker":
        isolation["image"] = image
    print(f"{name}:")
    report = check_launcher(launcher, on_finding=_tell, **isolation)
    if report.short:
        print(f"  this host cannot hold {', '.join(report.short)}: tried without")
    print(report)
    return report


def _tell(finding: Finding) -> None:
    print(f"  {finding.verdict:9} {finding.check.title}{': ' + finding.reason if finding.reason else ''}", flush=True)


def _versions(launchers: list[str]) -> list[str]:
    """What the programs behind these launchers say of themselves."""
    programs = {"oci:crun": "crun", "oci:runc": "runc", "oci:runsc": "runsc", "docker": "dockerd"}
    found = []
    for launcher in launchers:
        program = shutil.which(programs.get(launcher, ""), path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")
        if program:
            done = subprocess.run(
                [program, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
            )
            found.append(done.stdout.splitlines()[0].split(", build")[0] if done.stdout else program)
    return found


if __name__ == "__main__":
    sys.exit(main())
