"""A caller for the fault tests: keeps eight calls running and says who its processes are, until it is killed.

Run as: python fault_caller.py STATE MARK. Prints one JSON line with the pids, then one line per ended call.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from sandbox import Sandbox, SandboxError

THREADS = 8


def keep_calling(box: Sandbox, mark: str, serial: int) -> None:
    # The mark is an argument of every process inside, so that the test can find what outlives its call.
    script = f": {mark}; (setsid sleep 0.0{serial + 1}; :) & sleep 0.0{serial + 2}; wait"
    while True:
        try:
            outcome = box.run(["sh", "-c", script, mark])
            line = outcome.ending.kind
        except SandboxError as error:
            line = type(error).__name__
        print(line, flush=True)


def main() -> None:
    state, mark = sys.argv[1:]
    with Sandbox("shell", state=state) as box:
        box.run(["true"])
        link = box._link
        assert link is not None
        pids = {"caller": os.getpid(), "supervisor": link.supervisor_pid, "zygote": link.zygote_pid}
        print(json.dumps(pids), flush=True)
        threads = [threading.Thread(target=keep_calling, args=(box, mark, n), daemon=True) for n in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
