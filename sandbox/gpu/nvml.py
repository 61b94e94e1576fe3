"""NVML through `nvidia-ml-py`: every failure by its name, and what is not answered as None.

Calls may block for as long as the driver does, so whoever must not wait asks in a thread of its own.
Source: the NVML API reference; the binding's own names (module `pynvml`, distribution `nvidia-ml-py`).
"""

from __future__ import annotations

import os
from typing import Any, Final

from sandbox._linux import libraries
from sandbox.errors import SandboxError

# Where drivers are put outside the loader's search path: the NVIDIA container runtime's volume, NixOS, WSL.
EXTRA_DIRECTORIES: Final = (
    "/usr/local/nvidia/lib64",
    "/usr/local/nvidia/lib",
    "/run/opengl-driver/lib",
    "/usr/lib/wsl/lib",
)
LIBRARY: Final = "libnvidia-ml.so.1"

# Answers that say "this value is not to be had", not "something is wrong".
UNKNOWN: Final = frozenset(
    ("NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_DATA", "NO_PERMISSION", "DEPRECATED", "ARGUMENT_VERSION_MISMATCH")
)
# The device is gone, or useless until it is reset.
LOST: Final = frozenset(("GPU_IS_LOST", "RESET_REQUIRED", "GPU_NOT_FOUND"))
FIXES: Final = {
    "BINDING_NOT_FOUND": "pip install 'toolcall-sandbox[gpu]'   (nvidia-ml-py)",
    "LIBRARY_NOT_FOUND": f"install the NVIDIA driver's user-space part: {LIBRARY} is not there",
    "DRIVER_NOT_LOADED": "sudo modprobe nvidia",
    "LIB_RM_VERSION_MISMATCH": "the driver was upgraded while it was loaded: reload its modules, or restart the host",
    "NO_PERMISSION": "run as root, or as a user who may open the device nodes",
    "GPU_IS_LOST": "the GPU fell off the bus: restart the host; if it happens again, look at `dmesg | grep Xid`",
    "RESET_REQUIRED": "sudo nvidia-smi --gpu-reset",
}


class NvmlTrouble(SandboxError):
    """NVML did not do what was asked: `name` is its own word for it, `function` the call that failed."""

    def __init__(self, name: str, function: str = "") -> None:
        super().__init__(f"NVML: {name}{f' ({function})' if function else ''}", hint=FIXES.get(name, ""))
        self.name = name
        self.function = function

    @property
    def is_lost(self) -> bool:
        return self.name in LOST


class Nvml:
    """An initialised library. `unknown` collects what it did not answer: function -> NVML's reason."""

    def __init__(self, binding: Any, names: dict[int, str]) -> None:
        self._binding = binding
        self._names = names
        self.unknown: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Nvml {self._binding.__name__} unknown={len(self.unknown)}>"

    @classmethod
    def open(cls) -> Nvml:
        """Load and initialise. Raises NvmlTrouble (BINDING_NOT_FOUND, LIBRARY_NOT_FOUND, DRIVER_NOT_LOADED ...)."""
        try:
            import pynvml
        except ImportError:
            raise NvmlTrouble("BINDING_NOT_FOUND") from None
        _find_library()
        names = {
            value: name.removeprefix("NVML_ERROR_")
            for name, value in vars(pynvml).items()
            if name.startswith("NVML_ERROR_") and isinstance(value, int)
        }
        nvml = cls(pynvml, names)
        nvml.must("nvmlInit")
        return nvml

    def must(self, function: str, *args: Any) -> Any:
        """Call it. Raises NvmlTrouble."""
        # The binding's exceptions define equality without a hash, so they are taken apart here and never passed on.
        name = ""
        try:
            return getattr(self._binding, function)(*args)
        except AttributeError:
            name = "FUNCTION_NOT_FOUND"  # the installed binding is older than this function
        except self._binding.NVMLError as error:
            name = self._names.get(error.value, f"ERROR_{error.value}")
        raise NvmlTrouble(name, function)

    def maybe(self, function: str, *args: Any) -> Any:
        """Call it; None where it has no answer. Raises NvmlTrouble for anything that is wrong."""
        try:
            return self.must(function, *args)
        except NvmlTrouble as trouble:
            if trouble.name not in UNKNOWN:
                raise
            self.unknown[function] = trouble.name
            return None

    def utilisation_of_processes(self, handle: Any, since_us: int) -> list[tuple[int, int, int, int]] | None:
        """(pid, time in us, SM percent, memory percent) of every sample newer than `since_us`; None where unknown."""
        function = "nvmlDeviceGetProcessUtilization"
        try:
            samples = self.maybe(function, handle, since_us)
        except NvmlTrouble as trouble:
            # NOT_FOUND: no process used the device since. ERROR_0: the binding takes success without samples for an
            # error. INSUFFICIENT_SIZE: processes appeared between its two calls; the next sample has them.
            if trouble.name in ("NOT_FOUND", "ERROR_0", "INSUFFICIENT_SIZE"):
                return []
            raise
        if samples is None:
            return None
        return [(int(s.pid), int(s.timeStamp), int(s.smUtil), int(s.memUtil)) for s in samples]

    def processes(self, handle: Any) -> dict[int, int | None] | None:
        """pid -> bytes of device memory (None: not known), of compute, graphics and MPS clients; None where unknown."""
        found: dict[int, int | None] = {}
        answered = False
        for kind in ("Compute", "Graphics", "MPSCompute"):
            listed = self._listed(f"nvmlDeviceGet{kind}RunningProcesses", handle)
            answered = answered or listed is not None
            for process in listed or ():
                used = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
                # The same process may be listed as a user of compute and of graphics, with all of its memory in each.
                before = found.get(process.pid)
                found[int(process.pid)] = used if before is None else max(before, used or 0)
        return found if answered else None

    def _listed(self, function: str, handle: Any) -> Any:
        """The binding asks for the number and then for the list: more than twice as many may have come in between."""
        for attempt in (1, 2, 3):
            try:
                return self.maybe(function, handle)
            except NvmlTrouble as trouble:
                if trouble.name != "INSUFFICIENT_SIZE" or attempt == 3:
                    raise
        return None

    def set_memory_limit(self, handle: Any, cgroup_path: str, limit_bytes: int) -> None:
        """Have the driver (r615 and newer) refuse this cgroup allocations beyond the limit. Raises NvmlTrouble."""
        structure = getattr(self._binding, "c_nvmlSetMemoryLimits_v1_t", None)
        if structure is None:
            raise NvmlTrouble("FUNCTION_NOT_FOUND", "nvmlDeviceSetMemoryLimits_v1")
        limits = structure(nameSpace=os.fsencode(cgroup_path), softLimit=limit_bytes, hardLimit=limit_bytes)
        self.must("nvmlDeviceSetMemoryLimits_v1", handle, limits)

    def has_memory_limits(self, handle: Any) -> str:
        """Why the driver cannot limit a cgroup's memory, by NVML's name; empty where the getter answers."""
        structure = getattr(self._binding, "c_nvmlGetMemoryLimits_v1_t", None)
        if structure is None:
            return "FUNCTION_NOT_FOUND"
        try:
            self.must("nvmlDeviceGetMemoryLimits_v1", handle, structure(nameSpace=b"/"))
        except NvmlTrouble as trouble:
            return trouble.name
        return ""

    def close(self) -> None:
        """Let go of the driver. A library that is lost already has nothing to be told."""
        try:
            self.must("nvmlShutdown")
        except NvmlTrouble as trouble:
            self.unknown["nvmlShutdown"] = trouble.name


def _find_library() -> None:
    """Load the library from a directory that the loader does not search; the binding then gets that one by its name."""
    if libraries.load(LIBRARY):
        return
    for directory in EXTRA_DIRECTORIES:
        path = f"{directory}/{LIBRARY}"
        if os.path.exists(path) and os.stat(path).st_uid == 0 and libraries.load(path):
            return
