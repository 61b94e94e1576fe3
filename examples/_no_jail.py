"""Takes `sandbox run`'s place and isolates nothing: shows that the demonstration can fail.

`rome.py --no-jail` runs its second half with this. Every row must then come out as not contained, because the verdicts
rest on the canaries and not on what the command line or its record claim.
"""

from __future__ import annotations

import json
import subprocess
import sys


def main() -> int:
    if sys.argv[1] != "run":
        print("no jail, no chain")
        return 0
    border = sys.argv.index("--")
    record = sys.argv[sys.argv.index("--record", 0, border) + 1]
    claim = {"level": "full", "mechanism": "claimed", "applied": 64}
    controls = ("network", "filesystem", "processes", "pids", "disk", "gpu")
    with open(record, "w") as file:
        json.dump({"record_id": "none", "ending": {"kind": "ok"}, "enforcement": dict.fromkeys(controls, claim)}, file)
    return subprocess.run(sys.argv[border + 1 :], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
