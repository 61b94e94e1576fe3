"""Calls with the records on a tiny file system of their own. Run in a mount namespace: python full_disk.py MOUNTPOINT.

Prints one JSON line: how the calls ended before, on and after the full disk, and what verification says.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sandbox import AuditError, Sandbox
from sandbox.audit.store import iter_entries, list_chains
from sandbox.audit.verify import verify_state

CALLS_MAX = 200


def main() -> None:
    state = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=768k", "tmpfs", str(state)], check=True)
    filler = state / "filler"
    found: dict[str, object] = {}
    with Sandbox("shell", state=state) as box:
        first = box.run(["true"])
        assert first.ok, first.ending
        filler.write_bytes(bytes(300_000))
        before = 0
        try:
            while before < CALLS_MAX:
                assert box.run(["true"]).ok
                before += 1
        except AuditError as error:
            found["error"] = error.message
        found["before"] = before
        filler.unlink()
        found["after"] = [box.run(["true"]).ok for _ in range(3)]
    found["broken"] = [str(report.broken) for report in verify_state(state) if report.broken]
    counts: dict[str, list[str]] = {}
    for chain in list_chains(state):
        for entry in iter_entries(chain):
            if "record_id" in entry:
                counts.setdefault(entry["record_id"], []).append(entry["entry"])
    found["unpaired"] = [kinds for kinds in counts.values() if kinds != ["opened", "closed"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
