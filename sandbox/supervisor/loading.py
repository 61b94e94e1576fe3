"""asyncio, dataclasses and pathlib without what they name and a supervisor does not use, which takes longer to load."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

TYPE_CHECKING = False

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any


class _Logger:
    """A logger that is made when somebody has something to say, but for what nobody hears as long as there is none."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module("logging").getLogger(self._name), name)

    def debug(self, *args: Any, **given: Any) -> None:
        if "logging" in sys.modules:
            import_module("logging").getLogger(self._name).debug(*args, **given)


class _Hint:
    """An annotation that nobody reads."""

    def __class_getitem__(cls, _of: object) -> type[_Hint]:
        return cls


# Used when something has gone wrong, to start programs, for TLS in asyncio's own streams, or to make an URI of a path.
# By module: what is looked up in it when they are loaded, functions by name and values.
_LATER: dict[str, tuple[tuple[str, ...], Mapping[str, object]]] = {
    "inspect": ((), {}),
    "linecache": ((), {}),
    "logging": ((), {"getLogger": _Logger, "DEBUG": 10}),
    "ntpath": ((), {}),
    "subprocess": ((), {"PIPE": -1, "STDOUT": -2, "DEVNULL": -3}),
    "traceback": (("extract_stack",), {}),
    "typing": ((), {"final": lambda what: what, "Optional": _Hint, "Type": _Hint}),
    "asyncio.sslproto": ((), {}),
    "asyncio.staggered": ((), {}),
    "urllib.parse": (("quote_from_bytes",), {}),
}


class _Later(ModuleType):
    """Stands for a module until somebody asks for anything in it, and passes on what is asked."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        # Asked for while it is being stood for: then it is loaded now.
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return import_module(self.__name__)

    def stand_in(self, function: str) -> None:
        """Have this function without loading the module that it comes from."""
        setattr(self, function, lambda *args, **given: getattr(self._real(), function)(*args, **given))


@contextmanager
def _stood_for(modules: Mapping[str, tuple[tuple[str, ...], Mapping[str, object]]]) -> Iterator[None]:
    stands = {name: _Later(name) for name in modules if name not in sys.modules}
    for name, stand in stands.items():
        functions, values = modules[name]
        for function in functions:
            stand.stand_in(function)
        vars(stand).update(values)
    sys.modules.update(stands)
    try:
        yield
    finally:
        for name, stand in stands.items():
            if sys.modules.get(name) is stand:
                del sys.modules[name]


def load() -> None:
    """Load asyncio, dataclasses and pathlib. Precondition: one thread.

    ssl it does without where Python has none, and here it may: TLS is the egress gateway's, a process of its own. All
    the others are loaded when somebody looks into them. Whoever else imports any of them in this process, as docker's
    SDK does, gets it.
    """
    if "asyncio" in sys.modules:
        return
    without_ssl = "ssl" not in sys.modules
    if without_ssl:
        sys.modules["ssl"] = None  # type: ignore[assignment]  # what makes an import say that there is none
    try:
        with _stood_for(_LATER):
            import asyncio  # noqa: F401
            import dataclasses  # noqa: F401
            import pathlib  # noqa: F401
    finally:
        if without_ssl:
            del sys.modules["ssl"]
