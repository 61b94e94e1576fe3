"""The first process of a container that a runtime made: seals itself, parks, starts the tool, reaps, reports.

The runtime has done what takes privileges: namespaces, mounts, limits, capabilities, `no_new_privs`, the filter. What
is left takes none. From there on it is the native jail's pid 1, speaking to the supervisor by the same channel.
"""

from __future__ import annotations

import json
import os
import signal

from sandbox._jail import pid1, steps
from sandbox._jail.launch import Launch, report_failure
from sandbox._linux import process

STEPS = {
    "terminals": steps.at_once(steps.open_terminal),
    "keyring": steps.at_once(steps.keyring),
    "landlock": steps.at_once(steps.landlock_rules),
    "close_fds": steps.at_once(steps.close_fds),
    "rlimits": steps.at_once(steps.rlimits),
    "seccomp": steps.at_once(steps.seccomp_filter),
}


def main(text: str) -> None:
    """Entry of the container's interpreter; `text` names the descriptors that it was given. Does not return."""
    names = json.loads(text)
    fds = list(range(3, 3 + len(names)))
    for fd in fds:
        os.set_inheritable(fd, False)
    launch = Launch({"fds": names, "host_uid": None, "mnt": ""}, fds)
    try:
        launch.step = "init"
        # Python's handler would make of it a signal that the tool can send us: pid 1 gets those with a handler only.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        process.set_not_dumpable()
        process.die_with_parent()
        if "ready" in launch.fds:
            os.write(launch.fds["ready"], b"+")
        state = _wait_for_release(launch.fds["release"])
        launch.applied, launch.notes = state["applied"], state["notes"]
        launch.run_steps("call", STEPS)
        pid1.park(launch)
        pid1.run_program(launch)
    except Exception as error:  # noqa: BLE001 - it is reported, and ends the call
        report_failure(launch, error)
    os._exit(1)


def _wait_for_release(fd: int) -> dict[str, list[str]]:
    """Block until the attendant has put us under our limits and made what the plan wants in our namespaces."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = os.read(fd, 65536)
        if not chunk:
            os._exit(1)
        data += chunk
    state: dict[str, list[str]] = json.loads(data)
    return state
