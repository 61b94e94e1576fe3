"""Compare what a call was granted with what was seen of it: one verdict per capability. Pure.

    within          it used the capability and stayed inside its grant, or the kernel enforces the grant in full
    exceeded        it reached for more than its grant (and was held, or ended for it)
    unused          it was granted and nothing of it was used: a grant that could be narrower
    not_observable  nobody outside the jail could see it, and the control is not enforced in full

"Within" without a counter rests on enforcement, not on sight; `evidence` says which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

# control -> (the counter in `usage`, the counter of refusals in `usage`, where the grant stands in the manifest)
_COUNTED: dict[str, tuple[str, str, str]] = {
    "memory": ("memory_peak_bytes", "oom_kills", "memory_bytes"),
    "pids": ("pids_peak", "pids_refused", "pids"),
    "cpus": ("cpu_s", "", "cpus"),
    "cpu_time": ("cpu_s", "", "cpu_time_s"),
    "wall_time": ("wall_s", "", "wall_time_s"),
    "disk": ("disk_used_bytes", "", "disk_bytes"),
    "inodes": ("inodes_used", "", "inodes"),
    "output": ("output_bytes", "", "output_bytes"),
    "open_files": ("open_files_peak", "", "open_files"),
    "io": ("io_bytes", "", "io_bytes_per_s"),
}
_RATES = ("cpus", "io")
# The kernel refuses the first one too many and counts that. A peak above the grant is what is not the tool's: pid 1 of
# the jail, and the threads of a container runtime, which ran before the tool did.
_KERNEL_COUNTED = ("pids",)


def attestation(manifest: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Verdict, grant, observation and evidence per capability.

    `record` holds the groups enforcement, usage, network, files, processes, output, time and ending.
    """
    resources = _mapping(manifest.get("resources"))
    counters = _counters(record)
    kind = str(_mapping(record.get("ending")).get("kind", ""))
    enforcement = _mapping(record.get("enforcement"))
    verdicts = {
        control: _counted(control, granted, counters, kind, _mapping(enforcement.get(control)))
        for control, (_, _, grant) in _COUNTED.items()
        if (granted := resources.get(grant)) is not None
    }
    verdicts["network"] = _network(_mapping(manifest.get("network")), record, kind)
    verdicts["filesystem"] = _filesystem(_mapping(manifest.get("filesystem")), record)
    gpu = _gpu(_mapping(manifest.get("gpu")), record, kind)
    return verdicts | ({"gpu": gpu} if gpu is not None else {})


def _mapping(value: Any) -> Mapping[str, Any]:
    # A dict mostly, and asking about that is quicker.
    return value if isinstance(value, (dict, Mapping)) else {}


def _counters(record: Mapping[str, Any]) -> dict[str, Any]:
    """The usage group with the sums that several of its counters make."""
    counters = dict(_mapping(record.get("usage")))
    cpu_s = _total(counters.get("cpu_user_s"), counters.get("cpu_system_s"))
    counters["cpu_s"] = counters.get("cpu_usage_s") if cpu_s is None else cpu_s
    counters["wall_s"] = _mapping(record.get("time")).get("duration_s")
    output = _mapping(record.get("output"))
    counters["output_bytes"] = _total(output.get("stdout_bytes"), output.get("stderr_bytes"))
    counters["io_bytes"] = _total(counters.get("io_read_bytes"), counters.get("io_write_bytes"))
    return counters


def _total(*parts: Any) -> int | float | None:
    numbers = [part for part in parts if isinstance(part, (int, float))]
    return sum(numbers) if numbers else None


def _verdict(verdict: str, granted: Any, observed: Any, evidence: str) -> dict[str, Any]:
    return {"verdict": verdict, "granted": whole(granted), "observed": whole(observed), "evidence": evidence}


def whole(value: Any) -> Any:
    """A float without a fraction as the integer that it is written as: such data is encoded without a walk over it."""
    return int(value) if type(value) is float and value.is_integer() else value


def _enforced(record: Mapping[str, Any], control: str) -> Mapping[str, Any]:
    return _mapping(_mapping(record.get("enforcement")).get(control))


def _unseen(granted: Any, enforced: Mapping[str, Any]) -> dict[str, Any]:
    if enforced.get("level") == "full":
        evidence = f"not counted as such, but enforced in full by {enforced.get('mechanism')}"
        return _verdict("within", granted, None, evidence)
    return _verdict("not_observable", granted, None, "not counted as such, and not enforced in full")


def _counted(
    control: str, granted: Any, counters: Mapping[str, Any], kind: str, enforced: Mapping[str, Any]
) -> dict[str, Any]:
    counter, refusals, _ = _COUNTED[control]
    observed, refused = counters.get(counter), counters.get(refusals) or 0
    if kind == f"limit:{control}":
        return _verdict("exceeded", granted, observed, "the limit ended the call")
    if refused:
        return _verdict("exceeded", granted, observed, f"{refusals}={refused}")
    if observed is None:
        return _unseen(granted, enforced)
    if control in _RATES:
        # The counter is a total: only the enforcement says that the rate was never higher in between.
        return _unseen(granted, enforced) | {"observed": observed} if observed else _unused(granted, counter)
    if isinstance(granted, (int, float)) and observed > granted and control not in _KERNEL_COUNTED:
        return _verdict("exceeded", granted, observed, f"{counter} is over the grant")
    return _verdict("within", granted, observed, counter) if observed else _unused(granted, counter)


def _unused(granted: Any, counter: str) -> dict[str, Any]:
    return _verdict("unused", granted, 0, counter)


def _network(grant: Mapping[str, Any], record: Mapping[str, Any], kind: str) -> dict[str, Any]:
    attempts: Sequence[Any] = record.get("network") or []
    denied = [item for item in attempts if _mapping(item).get("decision") not in ("allow", "allowed", None)]
    granted = grant.get("mode", "none")
    if denied or kind == "limit:network":
        return _verdict("exceeded", granted, len(attempts), f"{len(denied)} of {len(attempts)} attempts denied")
    if attempts:
        return _verdict("within", granted, len(attempts), f"{len(attempts)} attempts, all by rule")
    if granted == "none" or record.get("network") is None:
        return _unseen(granted, _enforced(record, "network"))
    return _verdict("unused", granted, 0, "no attempt reached the gateway")


def _filesystem(grant: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    files = _mapping(record.get("files"))
    granted = {"read": len(grant.get("read") or ()), "write": len(grant.get("write") or ())}
    denied, written = files.get("denied") or (), files.get("written")
    if denied:
        return _verdict("exceeded", granted, len(denied), f"{len(denied)} accesses denied")
    if written:
        return _verdict("within", granted, len(written), f"{len(written)} files written in the workspace")
    return _unseen(granted, _enforced(record, "filesystem"))


def _gpu(grant: Mapping[str, Any], record: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """None where none was granted and none was reached for: then there is nothing to say."""
    granted = grant.get("count") or len(grant.get("devices") or ())
    stray = [item for item in record.get("findings") or () if item.get("id") == "gpu_used_without_grant"]
    units = _mapping(record.get("usage")).get("gpu")
    if stray:
        return _verdict("exceeded", granted, len(stray), "a process of the call was seen on a GPU that it did not hold")
    if not granted:
        return None
    if kind.startswith("limit:gpu_"):
        return _verdict("exceeded", granted, len(units or ()), f"{kind.removeprefix('limit:')} ended the call")
    if not units:
        return _unseen(granted, _enforced(record, "gpu"))
    used = [unit for unit in units if unit.get("processes_peak")]
    if not used:
        return _verdict("unused", granted, 0, "no process of the call was seen on a granted GPU")
    return _verdict("within", granted, len(used), f"processes of the call on {len(used)} of {len(units)} granted GPUs")
