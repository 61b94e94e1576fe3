"""A record as the caller reads it: frozen, with attributes, and able to show itself.

`record.ending.kind`, `record.enforcement["memory"].level`, `record.network[0].host`. A field whose name is also a
method of mappings (`items`, `get` ...) is reached with brackets.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping

from sandbox.audit.canonical import digest, encode, visible

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, NoReturn

    from rich.console import RenderableType


class View(Mapping["str", "Any"]):
    """A read-only object of JSON data. Objects inside come out as views, lists as tuples."""

    __slots__ = ("_data",)
    _data: Mapping[str, Any]

    def __init__(self, data: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_data", data)

    def __getitem__(self, key: str) -> Any:
        return _wrap(self._data[key])

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for special names before there is any data.
        if not name.startswith("_") and name in self._data:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a record cannot be changed ({name})")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a record cannot be changed ({name})")

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, View):
            return self._data == other._data
        return self._data == other if isinstance(other, Mapping) else NotImplemented

    def __hash__(self) -> int:
        return hash(encode(self._data))

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *(key for key in self._data if key.isidentifier())]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self._data),)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({visible(repr(dict(self._data)), 400)})"

    def to_json(self) -> dict[str, Any]:
        """The plain data, as a copy of your own."""
        return copy.deepcopy(dict(self._data))


def _wrap(value: Any) -> Any:
    if isinstance(value, Mapping):
        return View(value)
    return tuple(map(_wrap, value)) if isinstance(value, (list, tuple)) else value


class Record(View):
    """What is on record about one call: the groups that `docs/record.md` describes."""

    __slots__ = ("_line",)
    _line: bytes

    @classmethod
    def of_line(cls, line: bytes) -> Record:
        """The record that stands in one line of a chain, read when it is looked at: most callers want the value."""
        record = cls.__new__(cls)
        object.__setattr__(record, "_line", line)
        return record

    def __getattr__(self, name: str) -> Any:
        if name == "_data":
            # Two threads may both do this, and find the same.
            object.__setattr__(self, "_data", json.loads(self._line))
            return self._data
        return super().__getattr__(name)

    @property
    def record_id(self) -> str:
        return str(self._data.get("record_id", ""))

    @property
    def digest(self) -> str:
        """`sha256:<hex>`: the entry's hash in its chain, or of the bytes of a record that is in none."""
        integrity = self._data.get("integrity")
        if isinstance(integrity, Mapping) and integrity.get("hash"):
            return f"sha256:{integrity['hash']}"
        return digest(encode(self._data))

    def __repr__(self) -> str:
        from sandbox.audit.render import status

        return f"<Record {self.record_id} {status(self._data)}>"

    def __rich__(self) -> RenderableType:
        from sandbox.audit.render import as_rich

        return as_rich(self._data)

    def _repr_html_(self) -> str:
        from sandbox.audit.render import as_html

        return as_html(self._data)
