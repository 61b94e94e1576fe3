"""What a record says: builds the opened and the closed entry of a call from plain data. Pure: no clock, no files.

A closed entry repeats what its opened one said and adds what was seen, so that it is the whole record by itself.
Every field of a group is there in every record; `null` means that nobody knows. Content that the tool chose
is bounded here (`truncated` counts what was left out); appending makes it storable (see `canonical.clean`). Values of
environment variables are left out everywhere; arguments, output and results are digests unless the manifest
captures them.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sandbox.audit.attestation import attestation, whole
from sandbox.audit.canonical import Settled, bounded
from sandbox.audit.entry import SCHEMA
from sandbox.errors import AuditError

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

ITEMS_MAX = 500
NAME_MAX_BYTES = 1024
MESSAGE_MAX_BYTES = 4096
CAPTURE_MAX_BYTES = 64 * 1024

FAULTS = ("tool", "caller", "host", "us")
ENDINGS = ("ok", "tool_error", "denied", "revoked", "killed", "lost", "launch_error", "refused")  # and limit:NAME

# What every record has; a supervisor adds what else its host counts.
_USAGE: Mapping[str, Any] = dict.fromkeys(
    (
        "cpu_user_s",
        "cpu_system_s",
        "memory_peak_bytes",
        "oom_kills",
        "pids_peak",
        "pids_refused",
        "throttled_s",
        "io_read_bytes",
        "io_write_bytes",
        "disk_used_bytes",
        "inodes_used",
        "gpu",
        "sources",
    )
)
_CONTEXT = ("why", "session", "trace_id", "span_id", "parent_record_id")
_OUTPUT: Mapping[str, Any] = dict.fromkeys(
    ("stdout_sha256", "stderr_sha256", "result_sha256", "stdout_bytes", "stderr_bytes", "truncated")
)


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known before launch. `call` is a CallSpec's data, `plan` a LaunchPlan's, None when none was made.

    `policy`: profile, sources (file, digest), manifest_sha256, manifest (resolved), notes. `host`: id, kernel, boot_id,
    node.
    `agent`: name, id, instance_id, framework, framework_version, model. `time_start` is RFC 3339.
    """

    record_id: str
    call_id: str
    time_start: str
    call: Mapping[str, Any]
    policy: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    host: Mapping[str, Any] = field(default_factory=dict)
    principal: Mapping[str, Any] = field(default_factory=dict)
    agent: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    producer_version: str = ""
    common: Common | None = None


@dataclass(frozen=True, slots=True)
class Common:
    """The groups that are the same in every record of calls of one kind, from one caller. Made once by `common`."""

    principal: Settled
    host: Settled
    policy: Settled
    isolation: Settled
    enforcement: Settled
    producer: Settled


@dataclass(frozen=True, slots=True)
class Closing:
    """What was seen. None for a list means that nothing outside the jail could see it; empty means none happened.

    `captured` may hold stdout, stderr and result; what the manifest does not capture of it is dropped here.
    `isolation` overrides fields of that group (applied, missing, cgroup, container_id ...).
    """

    time_end: str
    duration_s: float | None
    ending: Mapping[str, Any]
    usage: Mapping[str, Any] = field(default_factory=dict)
    output: Mapping[str, Any] = field(default_factory=dict)
    captured: Mapping[str, Any] = field(default_factory=dict)
    isolation: Mapping[str, Any] = field(default_factory=dict)
    enforcement: Mapping[str, Any] = field(default_factory=dict)
    network: Sequence[Mapping[str, Any]] | None = None
    files: Mapping[str, Any] | None = None
    processes: Sequence[Mapping[str, Any]] | None = None
    decisions: Sequence[Mapping[str, Any]] = ()
    findings: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, slots=True)
class RecoveryFacts:
    """When a lost record is being closed, and in which boot of the host."""

    now: str
    boot_id: str = ""


def new_record_id() -> str:
    """A UUID of version 7: sorts by the millisecond it was made in."""
    return uuid7(time.time_ns(), os.urandom(10))


def uuid7(time_ns: int, entropy: bytes) -> str:
    """RFC 9562, 5.7: 48 bits of milliseconds, version, 12 random bits, variant, 62 random bits."""
    high, low = int.from_bytes(entropy[:2], "big"), int.from_bytes(entropy[2:10], "big")
    value = (time_ns // 1_000_000 & (1 << 48) - 1) << 80
    value |= 7 << 76 | (high & 0xFFF) << 64 | 2 << 62 | low & (1 << 62) - 1
    text = f"{value:032x}"
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def rfc3339(time_ns: int) -> str:
    """UTC with microseconds and a Z: as text it sorts like the time."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time_ns // 1_000_000_000))
    return f"{seconds}.{time_ns // 1000 % 1_000_000:06d}Z"


def common(opening: Opening) -> Common:
    """What `opening` has in common with others of the same policy, plan, host and principal."""
    plan = opening.plan or {}
    return Common(
        principal=Settled(_names(opening.principal)),
        host=Settled(_names(opening.host)),
        policy=Settled(_policy(opening.policy, opening.policy.get("manifest") or {})),
        isolation=Settled(_isolation(plan)),
        enforcement=Settled({str(limit["control"]): _limit(limit) for limit in plan.get("limits", ())}),
        producer=Settled({"name": "toolcall-sandbox", "version": opening.producer_version}),
    )


def opened_record(opening: Opening) -> dict[str, Any]:
    """The record as it stands before launch."""
    call, plan, manifest = opening.call, opening.plan or {}, opening.policy.get("manifest") or {}
    shared = opening.common or common(opening)
    captures = _captures(manifest)
    left_out: dict[str, int] = {}
    return {
        "schema": SCHEMA,
        "record_id": opening.record_id,
        "call_id": opening.call_id,
        "attempt": opening.attempt,
        "context": _context(*(_as_text(call.get(name)) for name in _CONTEXT)),
        "time": {"time_start": opening.time_start, "time_end": None, "duration_s": None},
        "agent": Settled({"name": _name(call.get("agent")), **_names(opening.agent)}),
        "principal": shared.principal,
        "host": shared.host,
        "tool": Settled(_tool(call, captures)),
        "command": Settled(_command(call, plan, left_out)),
        "policy": shared.policy,
        "isolation": shared.isolation,
        "enforcement": shared.enforcement,
        "truncated": left_out,
        "producer": shared.producer,
    }


def closed_record(opened: Mapping[str, Any], closing: Closing) -> dict[str, Any]:
    """The whole record: what `opened_record` (or an opened entry) said, and what was seen since."""
    manifest = opened["policy"].get("resolved_manifest") or {}
    left_out = dict(opened.get("truncated") or {})
    record = {key: value for key, value in opened.items() if key not in ("integrity", "entry")}
    record["time"] = {**opened["time"], "time_end": closing.time_end, "duration_s": closing.duration_s}
    record["isolation"] = _closed_isolation(opened["isolation"], closing)
    if closing.enforcement:
        record["enforcement"] = {**opened["enforcement"], **closing.enforcement}
    record["usage"] = {**_USAGE, **{name: whole(value) for name, value in closing.usage.items()}}
    record["network"] = _items("network", closing.network, left_out)
    record["files"] = _files(closing.files, left_out)
    record["processes"] = _items("processes", closing.processes, left_out)
    record["decisions"] = _items("decisions", closing.decisions, left_out)
    record["findings"] = _items("findings", closing.findings, left_out)
    record["ending"] = _ending(closing.ending)
    record["output"] = _output(closing, _captures(manifest))
    record["truncated"] = left_out
    record["attestation"] = attestation(manifest, record)
    return record


def lost_record(opened: Mapping[str, Any], facts: RecoveryFacts) -> dict[str, Any]:
    """The closed record of a call whose supervisor died. Says nothing about what the tool did: nobody saw it."""
    boot_id = str((opened.get("host") or {}).get("boot_id") or "")
    restarted = bool(boot_id and facts.boot_id and boot_id != facts.boot_id)
    why = "the host was restarted" if restarted else "the supervisor died"
    ending = {
        "kind": "lost",
        "fault": "host" if restarted else "us",
        "message": f"{why} before the call's end was on record; nothing is known about what the tool did",
    }
    return closed_record(opened, Closing(time_end=facts.now, duration_s=None, ending=ending))


def torn_notice(kept_as: str, size_bytes: int, sha256: str, facts: RecoveryFacts) -> dict[str, Any]:
    """The notice that an interrupted write left half an entry, which was kept aside."""
    notice = {"kind": "torn_tail", "kept_as": kept_as, "bytes": size_bytes, "sha256": f"sha256:{sha256}"}
    return {"schema": SCHEMA, "time": {"time_start": facts.now}, "notice": notice}


def _text(value: Any, max_bytes: int = MESSAGE_MAX_BYTES) -> str | None:
    return None if value is None or value == "" else bounded(str(value), max_bytes)


def _name(value: Any) -> str | None:
    return _text(value, NAME_MAX_BYTES)


def _names(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _name(value) if isinstance(value, str) else value for key, value in group.items()}


def _captures(manifest: Mapping[str, Any]) -> frozenset[str]:
    return frozenset((manifest.get("audit") or {}).get("capture") or ())


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


# Of texts alone: True and 1 would be one key.
@functools.lru_cache(maxsize=256)
def _context(*values: str | None) -> Settled:
    """Most calls of a caller have the same, mostly an empty one."""
    texts = zip(_CONTEXT, values, strict=True)
    return Settled({name: _text(value) if name == "why" else _name(value) for name, value in texts})


def _tool(call: Mapping[str, Any], captures: frozenset[str]) -> dict[str, Any]:
    tool = {
        "name": _name(call.get("tool")),
        "type": call.get("kind"),
        "call_id": _name(call.get("tool_call_id")),
        "module": _name(call.get("module")),
        "source_sha256": call.get("source_sha256") or None,
        "arguments_sha256": call.get("arguments_sha256") or None,
    }
    if "args" in captures:
        tool["arguments"] = call.get("arguments")
    return tool


def _command(call: Mapping[str, Any], plan: Mapping[str, Any], left_out: dict[str, int]) -> dict[str, Any]:
    return {
        "argv": _bounded_list("command.argv", plan.get("argv") or call.get("argv") or (), left_out),
        "cwd": _name(plan.get("cwd") or call.get("cwd")),
        "env_names": _bounded_list("command.env_names", sorted(plan.get("env") or ()), left_out),
        "tty": bool(call.get("tty")),
    }


def _bounded_list(path: str, values: Sequence[Any], left_out: dict[str, int]) -> list[str]:
    if len(values) > ITEMS_MAX:
        left_out[path] = len(values) - ITEMS_MAX
    return [bounded(str(value), MESSAGE_MAX_BYTES) for value in values[:ITEMS_MAX]]


def _policy(policy: Mapping[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "profile": _name(policy.get("profile")),
        "sources": [{"file": file, "sha256": digest} for file, digest in policy.get("sources", ())],
        "notes": list(policy.get("notes", ())),
        "manifest_sha256": policy.get("manifest_sha256"),
        "resolved_manifest": without_env_values(manifest),
        "mode": policy.get("mode", "enforce"),
    }


def without_env_values(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with the names, but not the values, of the variables that it sets."""
    environment = manifest.get("environment")
    if not isinstance(environment, Mapping) or not environment.get("set"):
        return dict(manifest)
    hidden = dict.fromkeys(environment["set"], "[not recorded]")
    return {**manifest, "environment": {**environment, "set": hidden}}


def _isolation(plan: Mapping[str, Any]) -> dict[str, Any]:
    steps = [str(step["name"]) for step in plan.get("steps", ())]
    degraded = sorted(str(limit["control"]) for limit in plan.get("limits", ()) if limit["level"] != "full")
    extra = dict(plan.get("isolation") or {})
    return {**extra, "launcher": plan.get("launcher"), "requested": steps, "applied": [], "degraded": degraded}


def _closed_isolation(opened: Mapping[str, Any], closing: Closing) -> dict[str, Any]:
    isolation = {**opened, **closing.isolation}
    # A step may stand in the plan several times (one per mount), so the missing ones are counted, not looked up.
    applied = list(isolation["applied"])
    missing = list(opened.get("missing") or ())
    for step in isolation["requested"]:
        if step in applied:
            applied.remove(step)
        else:
            missing.append(step)
    return {**isolation, "missing": closing.isolation.get("missing", missing)}


def _limit(limit: Mapping[str, Any]) -> dict[str, Any]:
    return {key: limit.get(key) for key in ("requested", "applied", "level", "mechanism", "strength", "reason")}


def _items(
    path: str, values: Sequence[Mapping[str, Any]] | None, left_out: dict[str, int]
) -> list[dict[str, Any]] | None:
    if values is None:
        return None
    if len(values) > ITEMS_MAX:
        left_out[path] = len(values) - ITEMS_MAX
    return [_names(item) for item in values[:ITEMS_MAX]]


def _files(files: Mapping[str, Any] | None, left_out: dict[str, int]) -> dict[str, Any] | None:
    if files is None:
        return None
    group: dict[str, Any] = {"written": [], "denied": []}
    for name, value in files.items():
        if isinstance(value, (list, tuple)):
            plain = [item if isinstance(item, Mapping) else {"path": item} for item in value]
            group[name] = _items(f"files.{name}", plain, left_out)
        else:
            group[name] = value
    return group


def _ending(ending: Mapping[str, Any]) -> dict[str, Any]:
    kind, fault = str(ending.get("kind")), ending.get("fault")
    if (kind not in ENDINGS and not kind.startswith("limit:")) or fault not in FAULTS:
        raise AuditError(f"no such ending: kind {kind!r}, fault {fault!r}")
    return {
        "kind": kind,
        "fault": fault,
        "exit_code": ending.get("exit_code"),
        "signal": ending.get("signal"),
        "error_type": _name(ending.get("error_type")),
        "message": _text(ending.get("message")),
        **{key: value for key, value in ending.items() if key in ("step", "errno", "detail")},
    }


def _output(closing: Closing, captures: frozenset[str]) -> dict[str, Any]:
    output = {**_OUTPUT, **closing.output}
    for name, permission in (("stdout", "output"), ("stderr", "output"), ("result", "result")):
        output.pop(name, None)
        if permission in captures and name in closing.captured:
            output[name] = _captured(closing.captured[name])
    return output


def _captured(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return bounded(bytes(value[: CAPTURE_MAX_BYTES + 1]).decode("utf-8", "surrogateescape"), CAPTURE_MAX_BYTES)
    return value
