"""Shared libraries by name or path, for bindings that look one up by its name later."""

from __future__ import annotations

import ctypes
import os


def load(library: str) -> bool:
    """Load it, so that whoever asks for the same name finds it loaded. False when it is not there or will not load."""
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def loaded_path(name: str) -> str:
    """The file that a loaded library was mapped from, its name being `name` or beginning with it; empty: none."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            path = line.rstrip("\n").partition("/")[2]
            if path and os.path.basename(path).startswith(name):
                return f"/{path}"
    return ""
