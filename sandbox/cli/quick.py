"""`run` with a plan that was kept: neither typer nor rich, pydantic nor the planner are loaded.

It serves plain command lines whose question has been answered before. All else, and all that has to be told about an
ending, is left to the usual way, which then reads or tells it as ever.
"""

from __future__ import annotations

import json
import os

from sandbox import link, prepare_places
from sandbox.cli import words
from sandbox.errors import ManifestError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from sandbox import kept
    from sandbox.link import Link, Pending

_ELSEWHERE = ("commit", "collect", "into", "record")
_PROFILE = "shell"


class Ready:
    """A call whose plan was found. `run` carries it out."""

    def __init__(self, supervisor: Link, plan: kept.Kept, command: list[str], **rest: Any) -> None:
        self._link = supervisor
        self._plan = plan
        self._command = command
        # Fields of the call for the record.
        self._context: dict[str, str] = rest["context"]
        self._tty: bool = rest["tty"]

    def run(self) -> int | None:
        """The exit status; None when nothing has run: this host's facts are others, or the supervisor has gone."""
        from sandbox.cli.progress import Progress
        from sandbox.cli.terminal import carried, interruptible

        with interruptible(), Progress("starting") as progress:
            if not self._plan.fits(self._link.facts_json()):
                return None
            try:
                message = carried(self._hand_over, progress, tty=self._tty)
            except link.NotHandedOver:
                return None
            link.release(self._link)
            return self._told(message)

    def _hand_over(self, fds: dict[str, int]) -> Pending:
        plan, argv = self._plan, self._command
        call = {**plan["call"], "argv": argv, "tool": os.path.basename(argv[0]), **self._context}
        ask: dict[str, Any] = {
            "call": call,
            "principal": prepare_places.principal(os.getpid()),
            "durability": plan["durability"],
            "argv": argv,
            "env": plan.environment(os.environ),
            "cwd": plan["cwd"],
        }
        self._link.include(ask, "policy", plan["policy_id"], lambda: plan["policy"])
        self._link.include(ask, "plan", plan["plan_id"], lambda: plan["plan"])
        return self._link.submit(ask, None, fds, self._link.slots.wait())

    def _told(self, message: dict[str, Any]) -> int:
        """The exit status, with a word to the user where there is something to say."""
        ending, state = message["ending"], self._link.state
        if ending["kind"] == "ok" and not message.get("denials") and not _is_news(message, state):
            return 0
        from pathlib import Path

        from sandbox.cli.tell import tell
        from sandbox.runtime_outcome import program_outcome

        outcome = program_outcome(message)
        tell(outcome, self._command, Path(state))
        return outcome.exit_code


def _is_news(message: dict[str, Any], state: str) -> bool:
    """Whether something held only in part, and nobody has been told of it with this state directory."""
    if os.path.exists(f"{state}/told-partial"):
        return False
    controls = json.loads(message["sections"]["record"])["enforcement"]
    return any(control["level"] != "full" for control in controls.values())


def prepare(argv: list[str]) -> Ready | None:
    """Get ready for `run` with these words; None when it is to be done the usual way.

    The supervisor is started in any case where the words are plain: it comes up while the rest is found, either way.
    """
    parsed = words.parse(argv)
    if parsed is None:
        return None
    options, command = parsed
    context = _context({option.name: options.pop(option.name, None) for option in words.CONTEXT})
    if context is None or not command[0] or any(name in options for name in _ELSEWHERE):
        return None
    own = {option.name: options.pop(option.name, None) for option in words.OWN}
    state = prepare_places.state_of(own["state"])
    try:
        settings = words.overrides(**options)
    except ManifestError:
        return None
    if not state:
        return None
    supervisor = link.shared(state)
    supervisor.start(forked=True)
    # What is loaded from here on is loaded beside the supervisor's start, and not by it.
    from sandbox import kept
    from sandbox.cli.terminal import is_interactive

    tty = is_interactive() if own["terminal"] is None else own["terminal"]
    question = kept.ask(_PROFILE if own["profile"] is None else own["profile"], settings, state, tty=tty)
    plan = kept.find(question) if question is not None else None
    if plan is None:
        return None
    return Ready(supervisor, plan, command, tty=tty, context={**context, "why": own["why"] or ""})


def _context(given: dict[str, str | None]) -> dict[str, str] | None:
    """The call's fields; None where a trace has to be read."""
    if given.pop("traceparent") is not None or os.environ.get("TRACEPARENT"):
        return None
    found = {}
    for name, value in given.items():
        variable = words.BY_NAME[name].environment
        text = os.environ.get(variable, "") if value is None and variable else value
        found["parent_record_id" if name == "parent" else name] = text or ""
    return found
