"""What of a decided call may be kept for the next one like it (`sandbox.kept`), and in what form."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sandbox import kept, prepare
from sandbox.errors import Unenforceable
from sandbox.planner import decide

if TYPE_CHECKING:
    from sandbox.manifest import Manifest
    from sandbox.plan import LaunchPlan
    from sandbox.profiles import Resolved
    from sandbox.runtime import Sandbox


def answer(box: Sandbox, *, tty: bool) -> dict[str, Any] | None:
    """The kept form of a program's plan; None for one that depends on more than `kept` checks, or is refused."""
    job = box._program(["true"], tty=tty, is_single=True, overrides={})
    resolved, link = job.resolved, box._live_link()
    facts = link.facts()
    if box._lookups or not _is_lasting(resolved):
        return None
    try:
        plan, (plan_id, common) = box._decide(job, facts)
    except Unenforceable:
        return None
    if plan.launcher != "jail" or plan.gpu is not None:
        return None
    around = prepare.surroundings(resolved, job.spec, box.state, {})
    bare: LaunchPlan = decide(resolved.manifest, job.spec, facts, replace(around, caller_env={}))
    return {
        "facts": kept.facts_digest(link.facts_json()),
        "sources": [[path, digest] for path, digest in resolved.sources],
        "policy_id": f"{resolved.profile} {resolved.digest}",
        "policy": prepare.policy(resolved),
        "plan_id": plan_id,
        "plan": common,
        "durability": resolved.manifest.audit.durability,
        "call": prepare.call_data(job.spec),
        "cwd": plan.cwd,
        "env": dict(bare.env),
        "allow": list(resolved.manifest.environment.allow),
        "set": dict(resolved.manifest.environment.set),
    }


def _is_lasting(resolved: Resolved) -> bool:
    """Whether nothing of the host's files but the profiles themselves decided it, and no secret is in it."""
    manifest = resolved.manifest
    if resolved.notes or resolved.links or manifest.secrets.entries or prepare.path_facts(manifest):
        return False
    if manifest.network.extra_roots or manifest.process.allow_exec is not None or manifest.isolation.image:
        return False
    # A pyproject.toml names its profiles relative to itself.
    return all(os.path.basename(path) != "pyproject.toml" for path, _ in resolved.sources) and not _paths(manifest)


def _paths(manifest: Manifest) -> list[str]:
    filesystem = manifest.filesystem
    granted = (*filesystem.read, *filesystem.write, *filesystem.deny, filesystem.workspace)
    return [path for path in granted if path.startswith("/")]
