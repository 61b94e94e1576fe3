"""Where Python looks for libseccomp, for whoever compiles a filter. No jail does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def by_name() -> Iterator[None]:
    """In here Python finds libseccomp by the name that the loader knows, where it finds none by itself.

    It asks `ldconfig` or a compiler for the names of libraries, and small containers have neither.
    """
    import ctypes.util

    ask = ctypes.util.find_library
    ctypes.util.find_library = lambda name: ask(name) or ("libseccomp.so.2" if name == "seccomp" else None)
    try:
        yield
    finally:
        ctypes.util.find_library = ask
