"""The command line: parses and prints only. Facts go to standard output, our own words to standard error."""

from __future__ import annotations

FAILED = 125


class Ended(SystemExit):
    """The exit status of a tool, or of the signal that ended us in its place."""
