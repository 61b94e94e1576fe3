"""What a launcher promises, as checks that anybody can run: `check_launcher("docker", image="python:3.11-slim")`.

Each check tries something that must not work, from inside, and its twin: the same, permitted, which must work. A
launcher that declares that it cannot do something has to refuse it by name; then the row says `refused`, with its
words. Public: whoever writes a launcher of his own, or doubts one of ours on his machine, runs the same checks.
"""

from __future__ import annotations

from sandbox.testing.stage import Check, Finding, Report, Stage
from sandbox.testing.suite import CHECKS, check_launcher

__all__ = ["CHECKS", "Check", "Finding", "Report", "Stage", "check_launcher"]
