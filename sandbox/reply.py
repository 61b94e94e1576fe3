"""Reads the container that a jail sends back, as hostile bytes.

The tool shares a process with the code that writes the container and may send anything. So every length, depth and
count is checked before memory follows from it, nothing is imported or looked up by a name from the jail (the
modules used are named here), nothing is unpickled, and whatever is wrong is a `CodecError`. The format stands in
`sandbox/_jail/encode.py`. Dataclasses, enums and models come out as `Encoded`; `rebuild` turns them into what the
function's return annotation names. One file of some length: each tag's reader stands beside the bounds it needs.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from sandbox.errors import ToolFailed

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"TCR1"
# Sent along with each request, so that the jail refuses with a reason what would be refused here without one.
LIMITS: Mapping[str, int] = {
    "reply_bytes": 64 << 20,
    "header_bytes": 32 << 20,
    "parts": 2_000_000,
    "depth": 64,
    "keys": 100_000,
}
# Everything in the header that is not inside a string; possessive, so that no input makes it backtrack.
_STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# json.loads turns digits into an int in quadratic time; ours never write so many.
_LONG_NUMBER = re.compile(rb"[0-9]{40}")
_DTYPE = re.compile(r"[<>|=]?[biufcSUmM][0-9]{1,7}(\[[0-9]{0,6}[a-zA-Z]{1,7}\])?")
_DECIMAL = re.compile(
    r"[+-]?([0-9]{1,20000}(\.[0-9]{0,20000})?|\.[0-9]{1,20000})(E[+-]?[0-9]{1,19})?|[+-]?(Infinity|s?NaN[0-9]{0,100})"
)
_ITEM_BYTES = 1 << 20
_SAME_HASH = 64
# Brackets that the container itself adds around the deepest value: the header, a table, its column, a shape.
_OWN_DEPTH = 8
_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {91: 1, 123: 1, 93: -1, 125: -1}
_BROKEN = (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError, MemoryError, AttributeError)


class CodecError(ToolFailed):
    """The tool's process sent bytes that are not a reply. Its fault: honest tools never touch that descriptor."""

    def __init__(self, message: str) -> None:
        super().__init__(f"the reply from the jail is not valid: {message}", type_name="CodecError")


@dataclass(frozen=True, slots=True)
class Encoded:
    """An object of a class of the tool's: data only. `label` is what the jail calls the class, for messages."""

    kind: str
    label: str
    fields: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class ToolError:
    """The exception that ended the function. `phase`: "load" (before the body), "call", "encode" (after it)."""

    type_name: str
    message: str
    traceback_text: str
    phase: str
    missing_module: str = ""
    exit_code: int | None = None


@dataclass(frozen=True, slots=True)
class Parsed:
    """A value; `has_objects`: some part of it is `Encoded`, so that it needs an annotation."""

    value: Any
    has_objects: bool


def parse(data: bytes, limits: Mapping[str, int] = LIMITS) -> Parsed | ToolError:
    """Return what the container holds. Raises CodecError."""
    header, buffers = _split(data, limits)
    if not isinstance(header, dict) or len(header) != 1:
        raise CodecError("the header is not an object with one key")
    ((key, content),) = header.items()
    if key == "json" and not buffers:
        return Parsed(content, has_objects=False)
    try:
        if key == "tree":
            reader = _Reader(buffers, limits)
            value = reader.node(content)
            reader.finish()
            return Parsed(value, reader.has_objects)
        if key == "error" and not buffers:
            return _tool_error(content)
    except _BROKEN as error:
        raise CodecError(f"{type(error).__name__}: {error}"[:300]) from error
    raise CodecError("the header holds neither a value nor an error")


def _split(data: bytes, limits: Mapping[str, int]) -> tuple[Any, memoryview]:
    """Return the parsed header and the buffers, after bounding what parsing can cost."""
    if not data:
        raise CodecError("it is empty: the process ended before it could answer")
    if len(data) > limits["reply_bytes"]:
        raise CodecError(f"it has {len(data)} bytes, the limit is {limits['reply_bytes']}")
    if len(data) < 8 or data[:4] != MAGIC:
        raise CodecError("it does not start like one")
    (size,) = struct.unpack_from("<I", data, 4)
    if size > limits["header_bytes"] or size > len(data) - 8:
        raise CodecError(f"its header claims {size} bytes")
    head = bytes(memoryview(data)[8 : 8 + size])
    _check_structure(head, limits)
    try:
        return json.loads(head.decode()), memoryview(data)[8 + size :]
    except (ValueError, RecursionError, MemoryError) as error:
        raise CodecError(f"its header is not JSON: {error}"[:300]) from error


def _check_structure(head: bytes, limits: Mapping[str, int]) -> None:
    structure = _STRINGS.sub(b"", head)
    if _LONG_NUMBER.search(structure):
        raise CodecError("its header has a number of more than 39 digits")
    opened = structure.count(b"[") + structure.count(b"{")
    if opened + structure.count(b",") > limits["parts"]:
        raise CodecError("its header has too many parts")
    if opened > limits["depth"]:
        steps = map(_STEPS.__getitem__, structure.translate(None, _BRACKETS))
        if max(accumulate(steps)) > limits["depth"] + _OWN_DEPTH:
            raise CodecError("its header is nested too deep")


def _tool_error(content: dict[str, Any]) -> ToolError:
    def text(key: str, limit: int) -> str:
        value = content.get(key, "")
        return _printable(value[:limit]) if isinstance(value, str) else ""

    code = content.get("exit_code")
    return ToolError(
        type_name=_line(content.get("type_name")) or "Exception",
        message=text("message", 10_000),
        traceback_text=text("traceback", 40_000),
        phase=text("phase", 10) if content.get("phase") in ("load", "call", "encode") else "call",
        missing_module=_line(content.get("missing")),
        exit_code=code if type(code) is int and 0 <= code <= 255 else None,
    )


def _printable(text: str) -> str:
    """`text` with everything escaped that a terminal would obey or hide: it ends up in tracebacks and logs."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _line(text: object) -> str:
    """A short piece of one line: a class's or module's name as the jail calls it."""
    return _printable(text[:300]).replace("\n", " ").replace("\t", " ") if isinstance(text, str) else ""


class _Reader:
    """Turns the tree into values. Buffers are consumed in order, so none can be counted twice."""

    def __init__(self, buffers: memoryview, limits: Mapping[str, int]) -> None:
        self._buffers = buffers
        self._at = 0
        self._keys_left = limits["keys"]
        self.has_objects = False

    def finish(self) -> None:
        if self._at != len(self._buffers):
            raise CodecError("bytes are left over behind the last buffer")

    def node(self, node: Any) -> Any:
        if not isinstance(node, list):
            if isinstance(node, dict):
                raise CodecError("an object stands where a node should")
            return node
        reader = _READERS.get(node[0])
        if reader is None:
            raise CodecError("unknown tag")
        return reader(self, *node[1:])

    def nodes(self, nodes: Iterable[Any]) -> list[Any]:
        return [self.node(node) for node in nodes]

    def buffer(self, size: int) -> memoryview:
        start = self._at
        if type(size) is not int or not 0 <= size <= len(self._buffers) - start:
            raise CodecError("a buffer lies outside the reply")
        self._at = start + size
        return self._buffers[start : self._at]

    def keyed(self, keys: list[Any]) -> list[Any]:
        """Check keys before they are hashed into a table: equal hashes make building one quadratic."""
        self._keys_left -= len(keys)
        if self._keys_left < 0:
            raise CodecError("too many set members and keys that are not strings")
        if len(keys) > _SAME_HASH and max(Counter(map(hash, keys)).values()) > _SAME_HASH:
            raise CodecError("too many keys share one hash")
        return keys

    def text(self, node: Any) -> str:
        value = self.node(node)
        if type(value) is not str:
            raise CodecError("text expected")
        return value


def _read_str(reader: _Reader, size: int) -> str:
    return str(reader.buffer(size), "utf-8", "surrogatepass")


def _read_int(reader: _Reader, size: int) -> int:
    return int.from_bytes(reader.buffer(size), "little", signed=True)


def _read_complex(_: _Reader, real: float, imag: float) -> complex:
    return complex(float(real), float(imag))


def _read_bytes(reader: _Reader, size: int) -> bytes:
    return bytes(reader.buffer(size))


def _read_bytearray(reader: _Reader, size: int) -> bytearray:
    return bytearray(reader.buffer(size))


def _read_list(reader: _Reader, *items: Any) -> list[Any]:
    return reader.nodes(items)


def _read_tuple(reader: _Reader, *items: Any) -> tuple[Any, ...]:
    return tuple(reader.nodes(items))


def _read_set(reader: _Reader, *items: Any) -> set[Any]:
    return set(reader.keyed(reader.nodes(items)))


def _read_frozenset(reader: _Reader, *items: Any) -> frozenset[Any]:
    return frozenset(reader.keyed(reader.nodes(items)))


def _read_dict(reader: _Reader, *items: Any) -> dict[Any, Any]:
    if len(items) % 2:
        raise CodecError("a dictionary with half an entry")
    # Keys and values alternate, because buffers come in the order of the walk.
    flat = reader.nodes(items)
    keys = flat[::2]
    reader.keyed([key for key in keys if type(key) is not str])
    return dict(zip(keys, flat[1::2], strict=True))


def _read_datetime(_: _Reader, text: str, fold: int, zone: str | None = None) -> Any:
    import datetime

    value = datetime.datetime.fromisoformat(text).replace(fold=fold)
    if zone is None:
        return value
    import zoneinfo

    # The name comes from the jail: only one that this host lists may become a file to open.
    if zone not in zoneinfo.available_timezones():
        raise CodecError("a time zone that is not known here")
    return value.replace(tzinfo=zoneinfo.ZoneInfo(zone))


def _read_time(_: _Reader, text: str, fold: int) -> Any:
    import datetime

    return datetime.time.fromisoformat(text).replace(fold=fold)


def _read_date(_: _Reader, text: str) -> Any:
    import datetime

    return datetime.date.fromisoformat(text)


def _read_timedelta(_: _Reader, days: int, seconds: int, microseconds: int) -> Any:
    import datetime

    return datetime.timedelta(int(days), int(seconds), int(microseconds))


def _read_decimal(_: _Reader, text: str) -> Any:
    import decimal

    if not _DECIMAL.fullmatch(text):
        raise CodecError("not a decimal number")
    return decimal.Decimal(text)


def _read_uuid(_: _Reader, text: str) -> Any:
    import uuid

    return uuid.UUID(hex=text)


def _read_path(reader: _Reader, node: Any) -> Any:
    import pathlib

    return pathlib.Path(reader.text(node))


def _read_purepath(reader: _Reader, node: Any) -> Any:
    import pathlib

    return pathlib.PurePath(reader.text(node))


def _read_enum(reader: _Reader, label: str, name: str | None, *value: Any) -> Encoded:
    reader.has_objects = True
    fields = [("name", name), *(("value", reader.node(node)) for node in value[:1])]
    return Encoded("enum", _line(label), tuple(fields))


def _read_object(reader: _Reader, kind: str, label: str, *items: Any) -> Encoded:
    if kind not in ("dataclass", "namedtuple", "model", "url") or len(items) % 2:
        raise CodecError("an object of an unknown kind")
    reader.has_objects = True
    flat = [reader.text(item) if at % 2 == 0 else reader.node(item) for at, item in enumerate(items)]
    return Encoded(kind, _line(label), tuple(zip(flat[::2], flat[1::2], strict=True)))


def _raw_array(dtype: str, shape: list[int], data: memoryview) -> NDArray[Any]:
    """Return an array of its own memory. Object and structured dtypes do not pass the pattern."""
    try:
        import numpy as np
    except ImportError:
        raise CodecError("it holds a numpy array, and numpy is not installed here") from None
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise CodecError("an array of a dtype that is not allowed")
    kind = np.dtype(dtype)
    count = 1
    for length in shape:
        if type(length) is not int or length < 0:
            raise CodecError("an array with an impossible shape")
        count *= length
    if not 0 <= kind.itemsize <= _ITEM_BYTES or count * kind.itemsize != len(data) or len(shape) > 32:
        raise CodecError("an array whose shape does not fit its bytes")
    if kind.itemsize == 0:
        return np.zeros(tuple(shape), kind) if count <= 1_000_000 else _too_many()
    flat = np.frombuffer(data, kind).copy() if data else np.empty(0, kind)
    if kind.kind == "U" and flat.size and flat.view(flat.dtype.byteorder + "u4").max() > 0x10FFFF:
        raise CodecError("an array of text with characters that do not exist")
    # A bool stored as another byte than 0 or 1 misbehaves in numpy.
    flat = flat.view("u1") != 0 if kind.kind == "b" else flat
    return flat.reshape(tuple(shape))


def _too_many() -> Any:
    raise CodecError("an array of very many empty items")


def _read_array(reader: _Reader, dtype: str, shape: list[int], size: int) -> Any:
    return _raw_array(dtype, shape, reader.buffer(size))


def _read_scalar(reader: _Reader, dtype: str, size: int) -> Any:
    return _raw_array(dtype, [], reader.buffer(size))[()]


def _column(reader: _Reader, dtype: str, node: Any, rows: int) -> Any:
    values = reader.node(node)
    if dtype not in ("", "object", "str", "string") or (dtype == "") != hasattr(values, "dtype"):
        raise CodecError("a column of a kind that is not allowed")
    if type(rows) is not int:
        raise CodecError("a table without a length")
    if len(values) != rows or (dtype and type(values) is not list):
        raise CodecError("a column of another length than its table")
    return _pandas().Series(values, dtype=dtype or None)


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError:
        raise CodecError("it holds a pandas object, and pandas is not installed here") from None


def _index(reader: _Reader, kind: str, *parts: Any) -> Any:
    if kind == "range":
        start, stop, step, name = parts
        return _pandas().RangeIndex(int(start), int(stop), int(step), name=reader.node(name))
    dtype, node, name = parts
    values = reader.node(node)
    if dtype not in ("", "object", "str", "string") or getattr(values, "ndim", 1) != 1:
        raise CodecError("an index of a kind that is not allowed")
    return _pandas().Index(values, dtype=dtype or None, name=reader.node(name))


def _read_frame(reader: _Reader, names: list[Any], index: list[Any], rows: int, *columns: Any) -> Any:
    # The order of reading is the order of writing: columns, then names, then index (see `encode._write_frame`).
    read = [_column(reader, dtype, node, rows) for dtype, node in columns]
    table = _pandas().DataFrame(dict(enumerate(read)), index=_pandas().RangeIndex(rows))
    table.columns = _index(reader, *names)
    table.index = _index(reader, *index)
    return table


def _read_series(reader: _Reader, name: Any, index: list[Any], rows: int, column: list[Any]) -> Any:
    series = _column(reader, column[0], column[1], rows)
    series.name = reader.node(name)
    series.index = _index(reader, *index)
    return series


_READERS: Mapping[Any, Callable[..., Any]] = {
    "str": _read_str,
    "int": _read_int,
    "complex": _read_complex,
    "bytes": _read_bytes,
    "bytearray": _read_bytearray,
    "list": _read_list,
    "tuple": _read_tuple,
    "set": _read_set,
    "frozenset": _read_frozenset,
    "dict": _read_dict,
    "datetime": _read_datetime,
    "time": _read_time,
    "date": _read_date,
    "timedelta": _read_timedelta,
    "decimal": _read_decimal,
    "uuid": _read_uuid,
    "path": _read_path,
    "purepath": _read_purepath,
    "enum": _read_enum,
    "object": _read_object,
    "array": _read_array,
    "scalar": _read_scalar,
    "frame": _read_frame,
    "series": _read_series,
}
