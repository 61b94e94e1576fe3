"""What a launch consists of: frozen data, no decisions.

`planner.decide` makes a `LaunchPlan` from a manifest, a call and the host's facts; a launcher walks its steps in
order; an error names a step; the record lists the steps applied. Everything here is plain JSON data, because
the plan travels to the zygote as bytes on an inherited descriptor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, Literal

    Level = Literal["full", "partial", "none"]
    Strength = Literal["hardware", "kernel", "driver", "polled", "advisory", "none"]


@dataclass(frozen=True, slots=True)
class Step:
    """One named thing a launcher does. `where` says which process does it.

    `view`: the builder of the root view, outside the jail's user namespace when the supervisor is root.
    `call`: the jail's pid 1. `tool`: the process that becomes the tool, right before exec.
    """

    name: str
    where: Literal["view", "call", "tool"]
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Limit:
    """One control: what was asked, what is applied, how much of it holds (`level`) and by what (`mechanism`).

    `strength` is how hard the mechanism is, a separate axis from how much of the request it covers.
    """

    control: str
    requested: int | float | str | None
    applied: int | float | str | None
    level: Level
    mechanism: str
    strength: Strength = "kernel"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """Everything a launcher needs, in order. `seccomp` names the policy; its bytes are compiled from it.

    `template`: what a process needs from which jails for this plan may be forked; None when each is built anew.
    `egress`: what the gateway permits and how much; None when there is no network.
    `gpu`: which GPUs are wished for, with their limits; None without any.
    """

    launcher: str
    steps: tuple[Step, ...]
    limits: tuple[Limit, ...]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    cwd: str
    tty: bool
    seccomp: Mapping[str, Any]
    isolation: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    template: Mapping[str, Any] | None = None
    egress: Mapping[str, Any] | None = None
    gpu: Mapping[str, Any] | None = None

    def limit(self, control: str) -> Limit | None:
        """The limit of that name, or None when the manifest does not ask for it."""
        return next((limit for limit in self.limits if limit.control == control), None)

    def with_step_args(self, name: str, **args: Any) -> LaunchPlan:
        """This plan with more arguments for one of its steps."""
        steps = (replace(step, args={**step.args, **args}) if step.name == name else step for step in self.steps)
        return replace(self, steps=tuple(steps))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LaunchPlan:
        """Rebuild a plan from `to_json`. Raises KeyError or TypeError on anything else: the sender is ours."""
        fields = dict(data)
        fields["steps"] = tuple(Step(s["name"], s["where"], s["args"]) for s in data["steps"])
        fields["limits"] = tuple(Limit(**limit) for limit in data["limits"])
        for name in ("argv", "notes"):
            fields[name] = tuple(data[name])
        return cls(**fields)

    def dumps(self) -> bytes:
        return json.dumps(self.to_json(), separators=(",", ":"), sort_keys=True).encode()
