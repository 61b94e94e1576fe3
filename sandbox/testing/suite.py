"""All checks in order, and `check_launcher`, which runs them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from sandbox.testing import inside, limits
from sandbox.testing.stage import Check, Finding, Report, Stage, judge


def _check(section: str, title: str, run: Callable[[Stage], None]) -> Check:
    return Check(run.__name__, section, title, run)


CHECKS: Final[tuple[Check, ...]] = (
    _check("promise", "no variable of the caller's, but those allowed", inside.no_environment),
    _check("promise", "no open descriptor", inside.no_descriptors),
    _check("promise", "no file of the host's, but those granted", inside.no_host_files),
    _check("promise", "what may be read cannot be written", inside.read_is_not_write),
    _check("promise", "what is written to a granted place is the caller's", inside.write_grant_belongs_to_the_caller),
    _check("promise", "deny wins over a grant", inside.deny_wins),
    _check("promise", "a function's value comes back typed, its error as its own", inside.functions),
    _check("promise", "one record for each call, with launcher, steps and counters", inside.recorded),
    _check("inside", "the root is read-only, private places are not", inside.read_only_root),
    _check("inside", "not root, no capability, no new privileges", inside.no_privileges),
    _check("inside", "the kernel knows the tool as an unprivileged uid", inside.never_host_root),
    _check("inside", "dangerous system calls are refused", inside.system_calls),
    _check("inside", "raw, packet, netlink and vsock sockets are refused", inside.sockets),
    _check("inside", "no process and no name of the host's", inside.no_neighbours),
    _check("inside", "risky entries of /proc are closed", inside.masked_proc),
    _check("inside", "nothing of an earlier call is there", inside.single_use),
    _check("inside", "no process outlives its call", inside.nothing_survives),
    _check("inside", "streams and exit status pass through", inside.streams),
    _check("inside", "files are collected without following links", inside.collected),
    _check("inside", "a writable workspace is the caller's, hooks are set aside", inside.workspace_is_the_callers),
    _check("inside", "changes in a layered workspace can be looked at first", inside.changes_can_be_discarded),
    _check("egress", "no network unless asked for", limits.no_network),
    _check("egress", "allowed hosts only, refused promptly, all on record", limits.allowlist),
    _check("egress", "no name but the allowed ones", limits.names),
    _check("egress", "no datagram leaves", limits.no_datagrams),
    _check("limits", "memory", limits.memory),
    _check("limits", "processes and threads", limits.pids),
    _check("limits", "CPU share", limits.cpus),
    _check("limits", "CPU time", limits.cpu_time),
    _check("limits", "wall time", limits.wall_time),
    _check("limits", "disk space, over all private places together", limits.disk),
    _check("limits", "inodes", limits.inodes),
    _check("limits", "open files", limits.open_files),
    _check("limits", "output", limits.output),
    _check("limits", "disk traffic", limits.io),
)


def check_launcher(
    launcher: str = "jail",
    *,
    state: str | Path | None = None,
    only: Iterable[str] = (),
    on_finding: Callable[[Finding], None] | None = None,
    **isolation: Any,
) -> Report:
    """Try every promise on one launcher, on this machine.

    Args:
        launcher: `jail`, `docker`, `oci`, `nsjail`, or `auto`.
        state: where records go; a throw-away directory by default.
        only: names of checks; all by default.
        on_finding: told of each finding as it comes.
        **isolation: more of the manifest's section: `image`, `runtime`, and `best_effort` for what may be less than
            full in every check but its own. What this host cannot hold is added by itself: see `Report.short`.

    Returns: the report; `.ok` when nothing is broken, `.require()` raises otherwise.
    Raises: ValueError for a name in `only` that no check has; RuntimeError under `python -O`.
    """
    if not __debug__:
        raise RuntimeError("checks are assertions, which python -O leaves out")
    wanted = set(only)
    if unknown := wanted - {check.name for check in CHECKS}:
        raise ValueError(f"no check is called {sorted(unknown)[0]!r}")
    report = Report(launcher, {"launcher": launcher, **isolation})
    with tempfile.TemporaryDirectory(prefix="sandbox-check-") as place:
        stage = Stage(report.isolation, Path(state or place))
        try:
            with stage.box():  # one supervisor for all checks
                stage.find_short()
                report.short = stage.short
                for check in CHECKS:
                    if not wanted or check.name in wanted:
                        report.findings.append(judge(check, stage))
                        if on_finding is not None:
                            on_finding(report.findings[-1])
        finally:
            stage.close()
    return report
