"""The power limit of a whole GPU, set while one call holds it and put back afterwards, also when its holder died.

It belongs to the GPU and not to the call, and needs root. What has to be put back is noted in the lease's file
before anything is changed. Source: nvmlDeviceSetPowerManagementLimit.
"""

from __future__ import annotations

from typing import Any

from sandbox.gpu.leases import Lease
from sandbox.gpu.nvml import Nvml

_NOTE = "power_before_mw"


def put_back_left(nvml: Nvml, handle: Any, lease: Lease) -> None:
    """Undo what a holder that died had set. Raises NvmlTrouble."""
    before = lease.left.get(_NOTE)
    if isinstance(before, int):
        nvml.must("nvmlDeviceSetPowerManagementLimit", handle, before)


def cap(nvml: Nvml, handle: Any, lease: Lease, watts: int) -> int:
    """Set the limit; the one before, in milliwatts, for `put_back`. Raises NvmlTrouble (NO_PERMISSION)."""
    before = int(nvml.must("nvmlDeviceGetPowerManagementLimit", handle))
    lease.note(**{_NOTE: before})
    nvml.must("nvmlDeviceSetPowerManagementLimit", handle, watts * 1000)
    return before


def put_back(nvml: Nvml, handle: Any, before_mw: int) -> None:
    """Set what was set before. Raises NvmlTrouble."""
    nvml.must("nvmlDeviceSetPowerManagementLimit", handle, before_mw)
