"""How a call ended, and whose fault that was.

`classify` decides it once, from what the kernel and the supervisor saw, never from what the tool says about itself.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any


@dataclass(frozen=True, slots=True)
class Ending:
    """How the call ended. `kind`: ok, tool_error, limit:NAME, denied, revoked, killed, lost, launch_error, refused.

    `fault`: tool, caller, host or us. `signal` is set when the tool was ended by one.
    """

    kind: str
    fault: str
    exit_code: int | None = None
    signal: int | None = None
    error_type: str = ""
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fault": self.fault,
            "exit_code": self.exit_code,
            "signal": self.signal,
            "error_type": self.error_type,
            "message": self.message,
        }


@dataclass(frozen=True, slots=True)
class Seen:
    """What was observed of one call's end.

    `exit_status`: the tool's wait status, None when pid 1 never reported one. `stopped`: why the supervisor ended
    the call (`wall_time`, `output`, `memory`, `cpu_time`, `network`, `gateway`, `gpu` without a grant, `gpu_lost:NAME`,
    a limit of its GPU, `caller`, `killed`, `revoked`), if it did. `step_failed`: the launch step that failed with its
    errno. `exec_errno`: the program could not be executed, or `exec_directory`, where it starts, not be entered.
    """

    exit_status: int | None = None
    stopped: str = ""
    step_failed: str = ""
    step_errno: int = 0
    step_message: str = ""
    is_bug: bool = False
    exec_errno: int = 0
    exec_directory: str = ""
    oom_kills: int = 0


_LIMIT_TEXT = {
    "wall_time": "the wall time ran out",
    "output": "more output than the limit allows",
    "memory": "more memory than the limit allows",
    "cpu_time": "the CPU time ran out",
    "network": "more network traffic than the budgets allow",
    "gpu_memory": "more GPU memory than the limit allows",
    "gpu_seconds": "the GPU time ran out",
    "gpu_energy": "more energy on the GPU than the limit allows",
    "gpu_processes": "more processes on the GPU than the limit allows",
}


def classify(seen: Seen) -> Ending:
    """Decide the ending. Order matters: ours before the tool's, the limit before the signal that carried it out."""
    if seen.step_failed:
        message = f"step {seen.step_failed}: {seen.step_message}"
        kind = "InternalError" if seen.is_bug else "LaunchError"
        return Ending("launch_error", "us" if seen.is_bug else "host", error_type=kind, message=message)
    code, number = _split(seen.exit_status)
    if seen.stopped in _LIMIT_TEXT:
        return Ending(f"limit:{seen.stopped}", "tool", code, number, message=_LIMIT_TEXT[seen.stopped])
    if seen.stopped == "caller":
        return Ending("killed", "caller", code, number, message="the caller went away or cancelled the call")
    if seen.stopped == "gateway":
        message = "the egress gateway was lost, and the call with it: nothing passes without it"
        return Ending("lost", "us", code, number, message=message)
    if seen.stopped == "gpu":
        return Ending("denied", "tool", code, number, message="used a GPU that it was not granted")
    if seen.stopped.startswith("gpu_lost:"):
        name = seen.stopped.partition(":")[2]
        return Ending("lost", "host", code, number, message=f"the GPU was lost under the call: NVML: {name}")
    if seen.stopped == "revoked":
        return Ending("revoked", "caller", code, number, message="revoked while it ran")
    if seen.stopped:
        return Ending("killed", "caller", code, number, message=seen.stopped)
    # The kernel's own count says whether memory ended it: an exit by SIGKILL alone proves nothing (cgroups(7)).
    if seen.oom_kills and (number == signal.SIGKILL or seen.exit_status is None or code == 137):
        return Ending("limit:memory", "tool", code, number, message=_LIMIT_TEXT["memory"])
    if seen.exit_status is None:
        return Ending("lost", "host", message="the jail was ended from outside")
    if number == signal.SIGXCPU:
        return Ending("limit:cpu_time", "tool", code, number, message=_LIMIT_TEXT["cpu_time"])
    if seen.exec_errno:
        code = 126 if seen.exec_errno in (13, 8, 20, 21, 40) else 127
        if seen.exec_directory:
            message = f"it cannot start in {seen.exec_directory!r}: {os.strerror(seen.exec_errno)}"
        else:
            message = "the program cannot be executed" if code == 126 else "there is no such program inside"
        return Ending("tool_error", "tool", code, error_type="OSError", message=message)
    if code == 0:
        return Ending("ok", "tool", code)
    return Ending("tool_error", "tool", code, number)


def _split(status: int | None) -> tuple[int | None, int | None]:
    """(exit code, signal) of a wait status."""
    if status is None:
        return None, None
    number = status & 0x7F
    return (None, number) if number else (status >> 8, None)
