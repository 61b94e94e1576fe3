"""A caller whose supervisor stops between handing a standby out and starting the call in it, until the caller is gone.

Run as `handover.py STATE MODE`. MODE "die": the caller is killed there. "leave": it gives the call up there, by a
signal, and goes on with others. What the supervisor hands out and starts is written to STATE/handed, a line each.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

CALLS_AFTER = 12


def install(state: str) -> None:
    """In the supervisor, before it serves: stop in that moment, once, when STATE/fault says how."""
    from sandbox.launchers.jail import Jail
    from sandbox.supervisor.server import Supervisor

    go, run_launched = Jail.go, Supervisor._run_launched
    place = Path(state)

    def note(line: str) -> None:
        with (place / "handed").open("a", encoding="ascii") as file:
            file.write(f"{line}\n")

    def noted_go(self: Jail, call: Any, fds: Any) -> None:
        note(f"start {self.name}")
        go(self, call, fds)

    async def stopped(self: Supervisor, call: Any, reply: Any, plan: Any) -> Any:
        note(f"handed {call.jail.name}")
        if (place / "fault").exists():
            mode = (place / "fault").read_text()
            (place / "fault").unlink()
            note(f"{'parked' if call.jail.steps_applied else 'unsealed'} {call.jail.name} {call.call_id}")
            os.kill(os.getppid(), signal.SIGKILL if mode == "die" else signal.SIGUSR1)
            # Its end of the channel closes in that moment; the loop hears of it only after we have gone on.
            poller = select.poll()
            poller.register(self._control if mode == "die" else reply, select.POLLIN)
            assert poller.poll(20_000)
        return await run_launched(self, call, reply, plan)

    Jail.go, Supervisor._run_launched = noted_go, stopped  # type: ignore[method-assign]


class Left(Exception):
    """The call is given up."""


def leave(_number: int, _frame: object) -> None:
    raise Left


def main(state: str, mode: str) -> None:
    from sandbox import Sandbox, link

    started = f"from tests.helpers.handover import install; install({state!r}); from sandbox.supervisor.main import"
    link._BOOT = link._BOOT.replace("from sandbox.supervisor.main import", started)
    signal.signal(signal.SIGUSR1, leave)

    def work(number: int) -> int:
        return number

    with Sandbox("python", state=state) as box:
        while "template" not in box.call(work, 0).record.isolation.applied:
            time.sleep(0.05)
        time.sleep(0.5)  # a standby is parked
        Path(state, "fault").write_text(mode)
        try:
            box.call(work, 1)
        except Left:
            done = [box.call(work, number).unwrap() for number in range(CALLS_AFTER)]
            print("went on", done == list(range(CALLS_AFTER)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
