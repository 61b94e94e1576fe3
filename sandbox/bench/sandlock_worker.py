"""Runs jobs under sandlock when told to: a process of its own, since sandlock forks the process that calls it.

A program with an interpreter that has `sandlock`; it imports nothing of ours. `argv`: directories to show.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    try:
        Sandbox: Any = importlib.import_module("sandlock").Sandbox  # noqa: N806 - a class
    except Exception as error:  # noqa: BLE001 - whatever it is, the bench says so and goes on without it
        print(f"cannot be imported: {error}\n{error}".replace("\n", " ") + "\n", flush=True)
        return
    shown = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/dev", sys.prefix, sys.base_prefix, *sys.argv[1:]]
    policy = {"fs_readable": shown, "fs_writable": ["/tmp"], "max_memory": "1G", "max_processes": 128}  # noqa: S108

    def numpy_sum(_clone: int) -> None:
        import numpy as np

        print(int(np.arange(1000).sum()))

    works = {"function": lambda _clone: print(1), "numpy": numpy_sum}

    def load_numpy() -> None:
        import numpy  # noqa: F401

    loads = {"function": lambda: None, "numpy": load_numpy}

    def clone(job: str) -> Any:
        return Sandbox(**policy, init_fn=loads[job], work_fn=works[job]).fork(1)

    verified: set[str] = set()
    print("ready", flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        try:
            if ask["way"] == "run":
                done = Sandbox(**policy).run(ask["argv"], timeout=60)
                right = done.success and done.stdout.decode().strip() == ask["expected"]
                answer = "done" if right else f"{done.exit_code} {done.stderr[-200:]!r}"
            else:
                answer = _forked(ask, clone, verified, Sandbox(**policy))
        except Exception as error:  # noqa: BLE001 - said to the bench
            answer = f"{type(error).__name__}: {error}".replace("\n", " ")
        print(answer, flush=True)


def _forked(ask: dict[str, Any], clone: Callable[[str], Any], verified: set[str], reducer: Any) -> str:
    """One clone. What it prints can only be read by a second sandbox, so that is looked at the first time alone."""
    clones = clone(ask["job"])
    if len(clones.pids) != 1:
        return "no clone"
    if ask["job"] not in verified:
        printed = reducer.reduce(["/bin/cat"], clones).stdout.decode().strip()
        if printed != ask["expected"]:
            return f"printed {printed!r}"
        verified.add(ask["job"])
    return "done"


if __name__ == "__main__":
    main()
