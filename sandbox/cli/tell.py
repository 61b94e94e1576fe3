"""What a person should know about a call that has ended, in a line or two on standard error."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from sandbox.audit.canonical import visible
from sandbox.cli.words import option_of
from sandbox.grants import denied_by, path_within
from sandbox.units import format_size, format_time

if TYPE_CHECKING:
    from pathlib import Path

    from sandbox.outcome import Outcome

LINE_MAX_CHARS = 2000
_SIZES = ("memory", "output", "disk")
_TIMES = ("wall_time", "cpu_time")
# A file system that is full has some of its last blocks left over.
_NEARLY = 0.99
# What the system view shows at its own place, whatever is granted.
_ALWAYS_INSIDE = ("/usr/", "/bin/", "/sbin/", "/lib", "/etc/", "/dev/", "/proc/")


def say(text: str) -> None:
    """One line of ours. Names of files and messages may be a tool's making: nothing in it acts on a terminal."""
    print(f"sandbox: {visible(text, LINE_MAX_CHARS)}", file=sys.stderr)


def tell(outcome: Outcome, command: list[str], state: Path) -> None:
    """What was denied, how it ended if it was not by the tool's own doing, and what to change."""
    _partial_limits_once(outcome, state)
    for denial in outcome.denials:
        say(denial)
    ending = outcome.ending
    if ending.kind not in ("ok", "tool_error") or ending.error_type:
        say(f"{_reason(outcome, command)} [{ending.kind}, fault: {ending.fault}, record {outcome.record.record_id}]")
    if ending.kind == "tool_error":
        _point_at_full_limits(outcome)
        if not outcome.record.policy.resolved_manifest.filesystem.workspace:
            _point_at_outside_paths(outcome, command)


def _reason(outcome: Outcome, command: list[str]) -> str:
    ending = outcome.ending
    kind, _, limit = ending.kind.partition(":")
    if kind == "limit":
        option = option_of(f"resources.{limit}")
        more = f"; {option} allows more" if option else ""
        return f"{ending.message} ({_amount(outcome, limit)}{more})"
    if ending.kind == "tool_error" and ending.exit_code == 127:
        return f"{command[0]}: no such program inside"
    if ending.kind == "tool_error":
        return f"{command[0]}: cannot be executed"
    return ending.message or ending.kind


def _amount(outcome: Outcome, limit: str) -> str:
    asked: Any = outcome.record.enforcement[limit].requested
    if limit in _SIZES:
        return format_size(int(asked))
    return format_time(float(asked)) if limit in _TIMES else str(asked)


def _partial_limits_once(outcome: Outcome, state: Path) -> None:
    """Say it the first time on this state directory; the record says it every time."""
    partial = sorted(
        name for name, control in outcome.record.enforcement.items() if control.level != "full" and control.requested
    )
    marker = state / "told-partial"
    if not partial or marker.exists():
        return
    holds = "holds" if len(partial) == 1 else "hold"
    say(
        f"here {', '.join(partial)} {holds} only in part, which the profile accepts (best_effort); "
        "`sandbox doctor` says how to get the full thing. Said once."
    )
    marker.touch()


def _point_at_full_limits(outcome: Outcome) -> None:
    """Limits at which the tool was refused something, went on, and failed: its own message does not name them."""
    usage, enforcement = outcome.record.usage, outcome.record.enforcement
    refused = {"pids": usage.pids_refused or 0}
    for name, used in (("disk", usage.disk_used_bytes), ("inodes", usage.inodes_used)):
        limit = enforcement[name].applied
        refused[name] = isinstance(used, int) and isinstance(limit, int) and used >= limit * _NEARLY
    for name in (name for name, count in refused.items() if count):
        option = option_of(f"resources.{name}") or f"resources.{name}"
        say(f"hint: the limit {name} was reached ({_amount(outcome, name)}; {option} allows more)")


def _point_at_outside_paths(outcome: Outcome, command: list[str]) -> None:
    """Arguments that are files here and nothing inside: the likeliest reason for a first call to fail."""
    filesystem = outcome.record.policy.resolved_manifest.filesystem
    granted = (*filesystem.read, *filesystem.write)
    for word in command[1:]:
        if word.startswith(("-", *_ALWAYS_INSIDE)) or not os.path.lexists(word):
            continue
        path = os.path.realpath(word)
        if pattern := denied_by(path, filesystem.deny):
            say(f"hint: {word} is denied inside: {pattern}")
        elif any(path_within(path, tree) for tree in granted):
            continue
        elif os.path.isabs(word):
            say(f"hint: {word} is not inside unless it is granted: --read {word}")
        else:
            say(f"hint: {word} is in the current directory, which is not inside: -w . gives a copy-on-write view of it")
        return
