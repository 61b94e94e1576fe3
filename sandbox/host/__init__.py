"""What this host can enforce, and why not: `probe` finds out, `HostFacts` holds it, `controls` judges it.

Feature by feature it is tried, not looked up by kernel version. Nothing here changes the host, and nothing says what
a manifest may ask for: that is the planner's.
"""

from __future__ import annotations

from sandbox.host.delegation import delegation_prefix
from sandbox.host.facts import CgroupControl, Feature, HostFacts
from sandbox.host.probing import probe, probe_apart

TYPE_CHECKING = False

if TYPE_CHECKING:
    from sandbox.host.table import CONTROL_NAMES, EVERY_CALL, Control, controls

__all__ = [
    "CONTROL_NAMES",
    "EVERY_CALL",
    "CgroupControl",
    "Control",
    "Feature",
    "HostFacts",
    "controls",
    "delegation_prefix",
    "probe",
    "probe_apart",
]


def __getattr__(name: str) -> object:
    # Judging is the caller's: a supervisor does without.
    if name not in __all__:
        raise AttributeError(f"module 'sandbox.host' has no attribute {name!r}")
    from sandbox.host import table

    globals()[name] = value = getattr(table, name)
    return value
