"""Turns a tool's return value, or its exception, into the bounded container that leaves the jail.

Runs inside, beside the tool, so nothing outside may trust what it writes: `sandbox.reply` reads these bytes as
hostile. Standard library only; numpy and pandas are handled when the tool itself has imported them.
One file, though a long one, because it is handed into the jail as one.

Container: magic, header length (uint32, little endian), header (UTF-8 JSON), buffers one after the other in the
order in which the header mentions them. The header holds one of
  {"json": V}    a value of JSON types alone, as it is
  {"tree": T}    JSON scalars stand for themselves; everything else is [tag, ...] (the tags are below)
  {"error": E}   type_name, message, traceback, phase ("load", "call", "encode"), exit_code for SystemExit
"""

from __future__ import annotations

import json
import struct
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

MAGIC = b"TCR1"
OWN_DIRECTORY = __file__.rpartition("/")[0] + "/"
# The caller sends its own numbers with every request; these serve a request without any.
DEFAULT_LIMITS = {"reply_bytes": 64 << 20, "header_bytes": 32 << 20, "parts": 2_000_000, "depth": 64, "keys": 100_000}
INLINE_STRING = 4096
INLINE_INT = 1 << 63
ITEM_BYTES = 1 << 20
MESSAGE_CHARS = 8192
TRACEBACK_CHARS = 32768
ARRAY_KINDS = "biufcSUmM"
TOO_MANY = "the result has too many parts: return large data as a numpy array, as bytes or in a file"
ADVICE = (
    "results may be None, bool, int, float, complex, str, bytes, list, tuple, set, dict, datetime, Decimal, UUID, "
    "Path, Enum, dataclass, NamedTuple, pydantic model, numpy array, pandas DataFrame or Series"
)


class Refused(Exception):
    """This value cannot leave: `reason` says why; `path` grows from the inside out while the walk unwinds."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = ""

    def __str__(self) -> str:
        return f"{self.reason} (at result{self.path})"


def pack(header: dict[str, Any], buffers: Iterable[Any] = ()) -> bytes:
    """Return the container's bytes."""
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((MAGIC, struct.pack("<I", len(head)), head, *buffers))


def encode_value(value: Any, limits: Mapping[str, int] = DEFAULT_LIMITS) -> bytes:
    """Return the container for `value`. Raises Refused."""
    if _is_json(value, limits):
        data = pack({"json": value})
    else:
        tree = _Tree(limits)
        data = pack({"tree": tree.node(value)}, tree.buffers)
    head_bytes = int.from_bytes(data[4:8], "little")
    if len(data) > limits["reply_bytes"]:
        raise Refused(f"the result takes {len(data)} bytes, the limit is {limits['reply_bytes']}")
    if head_bytes > limits["header_bytes"] or _count_parts(data[8 : 8 + head_bytes], limits) > limits["parts"]:
        raise Refused(TOO_MANY)
    return data


def _count_parts(head: bytes, limits: Mapping[str, int]) -> int:
    """How many brackets and commas stand outside strings: the caller bounds by it what parsing may cost."""
    if len(head) <= limits["parts"]:
        return 0
    import re

    structure = re.sub(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', b"", head, flags=re.DOTALL)
    return structure.count(b"[") + structure.count(b"{") + structure.count(b",")


def encode_error(error: BaseException, phase: str) -> bytes:
    """Return the container for an exception, cut to a bounded size."""
    report: dict[str, Any] = {
        "type_name": _clean(type_name(type(error)), 256),
        "message": _clean(_message(error), MESSAGE_CHARS),
        "traceback": _clean(_traceback_text(error), TRACEBACK_CHARS),
        "phase": phase,
    }
    if isinstance(error, SystemExit):
        code = error.code
        report["exit_code"] = code if type(code) is int and 0 <= code <= 255 else 0 if code is None else 1
        report["message"] = f"the tool called sys.exit({'' if code is None else _clean(_message(error), 200)})"
    if isinstance(error, ImportError):
        report["missing"] = _clean(str(error.name or ""), 256)
    return pack({"error": report})


def type_name(cls: type) -> str:
    """`module.qualname`, without the module for builtins."""
    module = getattr(cls, "__module__", "")
    name = getattr(cls, "__qualname__", "?")
    return name if module in ("builtins", "") else f"{module}.{name}"


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as inner:  # noqa: BLE001 - a tool's __str__ may raise anything, and the report must go out
        return f"<no message: its __str__ raised {type_name(type(inner))}>"


def _traceback_text(error: BaseException) -> str:
    import traceback

    # The first frames are the runner's own; a reader cares for the tool's.
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith(OWN_DIRECTORY):
        frames = frames.tb_next
    try:
        return "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
    except BaseException as inner:  # noqa: BLE001 - formatting runs the tool's code too (__str__, __cause__)
        return f"<no traceback: formatting it raised {type_name(type(inner))}>"


def _clean(text: str, limit: int) -> str:
    """`text` without lone surrogates; a long one loses its middle, since both ends of a traceback matter."""
    text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= limit:
        return text
    half = limit // 2 - 20
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _is_text(text: str) -> bool:
    """Whether the string may stand in the header: short, and free of surrogates, which UTF-8 does not carry."""
    if len(text) > INLINE_STRING:
        return False
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_json(value: Any, limits: Mapping[str, int]) -> bool:
    """Whether `value` consists of JSON types alone, of exactly these classes, within the limits.

    Walks level by level, so that neither depth nor a cycle can exhaust the stack.
    """
    level = [value]
    nodes = 0
    for _ in range(limits["depth"]):
        below: list[Any] = []
        nodes += len(level)
        if nodes > limits["parts"]:
            return False
        for item in level:
            kind = type(item)
            if kind is str:
                if not _is_text(item):
                    return False
            elif kind is int:
                if not -INLINE_INT < item < INLINE_INT:
                    return False
            elif kind is list:
                below.extend(item)
            elif kind is dict:
                if not all(type(key) is str and _is_text(key) for key in item):
                    return False
                below.extend(item.values())
            elif item is not None and kind is not bool and kind is not float:
                return False
        if not below:
            return True
        level = below
    return False


class _Tree:
    """Walks one value; `buffers` collects the raw parts in the order of their mention."""

    def __init__(self, limits: Mapping[str, int]) -> None:
        self.buffers: list[Any] = []
        self._depth = 0
        self._max_depth = limits["depth"]
        self._nodes_left = limits["parts"]
        self._keys_left = limits["keys"]
        self._bytes_left = limits["reply_bytes"]

    def node(self, value: Any) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise Refused(TOO_MANY)
        kind = type(value)
        if value is None or kind is bool or kind is float:
            return value
        writer = _WRITERS.get(kind) or _find_writer(value)
        if writer is None:
            raise Refused(_why_not(value))
        return writer(self, value)

    def child(self, value: Any, step: str) -> Any:
        """`node` one level down; `step` is that child's part of the path in an error."""
        self._depth += 1
        try:
            if self._depth > self._max_depth:
                raise Refused(f"the result is nested more than {self._max_depth} deep, or contains itself")
            return self.node(value)
        except Refused as refused:
            refused.path = step + refused.path
            raise
        finally:
            self._depth -= 1

    def buffer(self, data: bytes) -> int:
        """Take `data` as the next buffer and return its length."""
        self._bytes_left -= len(data)
        if self._bytes_left < 0:
            raise Refused("the result is larger than the limit for results")
        self.buffers.append(data)
        return len(data)

    def keyed(self, count: int) -> None:
        """Account for entries that the caller has to hash: their number is what bounds its work."""
        self._keys_left -= count
        if self._keys_left < 0:
            raise Refused("the result has too many set members and keys that are not strings: return a list")


def _write_str(tree: _Tree, value: Any) -> Any:
    value = str.__str__(value)
    if _is_text(value):
        return value
    return ["str", tree.buffer(value.encode("utf-8", "surrogatepass"))]


def _write_int(tree: _Tree, value: Any) -> Any:
    value = int(value)
    if -INLINE_INT < value < INLINE_INT:
        return value
    return ["int", tree.buffer(value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))]


def _write_float(_: _Tree, value: Any) -> Any:
    return float(value)


def _write_complex(_: _Tree, value: Any) -> Any:
    return ["complex", value.real, value.imag]


def _write_bytes(tree: _Tree, value: Any) -> Any:
    return ["bytes", tree.buffer(bytes(value))]


def _write_bytearray(tree: _Tree, value: Any) -> Any:
    return ["bytearray", tree.buffer(bytes(value))]


def _items(tree: _Tree, values: Iterable[Any]) -> list[Any]:
    return [tree.child(item, f"[{index}]") for index, item in enumerate(values)]


def _write_list(tree: _Tree, value: Any) -> Any:
    return ["list", *_items(tree, value)]


def _write_tuple(tree: _Tree, value: Any) -> Any:
    return ["tuple", *_items(tree, value)]


def _members(tree: _Tree, values: Any) -> list[Any]:
    tree.keyed(len(values))
    return [tree.child(item, "{...}") for item in values]


def _write_set(tree: _Tree, value: Any) -> Any:
    return ["set", *_members(tree, value)]


def _write_frozenset(tree: _Tree, value: Any) -> Any:
    return ["frozenset", *_members(tree, value)]


def _write_dict(tree: _Tree, value: Any) -> Any:
    node = ["dict"]
    for key, item in value.items():
        if type(key) is not str:
            tree.keyed(1)
        node.append(tree.child(key, ".keys()"))
        node.append(tree.child(item, f"[{_short(key)}]"))
    return node


def _short(key: Any) -> str:
    # repr of an int of over 4300 digits raises; of a long text it is only long.
    large = type(key) is int and not -INLINE_INT < key < INLINE_INT
    text = repr(key) if type(key) in (str, int, float, bool, bytes) and not large else type_name(type(key))
    return text if len(text) <= 60 else text[:57] + "..."


def _write_datetime(_: _Tree, value: Any) -> Any:
    if getattr(value, "nanosecond", 0):
        raise Refused("a pandas Timestamp with nanoseconds is finer than a datetime: return it as text or in an array")
    zone = getattr(value.tzinfo, "key", None)
    if type(value.tzinfo).__module__ == "zoneinfo" and isinstance(zone, str):
        return ["datetime", value.replace(tzinfo=None).isoformat(), value.fold, zone]
    if value.tzinfo is not None and value.utcoffset() is None:
        raise Refused("a datetime whose time zone gives no offset cannot leave the jail")
    return ["datetime", value.isoformat(), value.fold]


def _write_time(_: _Tree, value: Any) -> Any:
    if value.tzinfo is not None and value.utcoffset() is None:
        raise Refused("a time with a time zone has no offset of its own: return a datetime")
    return ["time", value.isoformat(), value.fold]


def _write_date(_: _Tree, value: Any) -> Any:
    return ["date", value.isoformat()]


def _write_timedelta(_: _Tree, value: Any) -> Any:
    if getattr(value, "nanoseconds", 0):
        raise Refused("a pandas Timedelta with nanoseconds is finer than a timedelta: return it in an array")
    return ["timedelta", value.days, value.seconds, value.microseconds]


def _write_decimal(_: _Tree, value: Any) -> Any:
    return ["decimal", str(value)]


def _write_uuid(_: _Tree, value: Any) -> Any:
    return ["uuid", value.hex]


def _write_path(tree: _Tree, value: Any) -> Any:
    import pathlib

    tag = "path" if isinstance(value, pathlib.Path) else "purepath"
    return [tag, tree.child(str(value), "")]


def _write_enum(tree: _Tree, value: Any) -> Any:
    mark = len(tree.buffers)
    try:
        return ["enum", _label(value), value.name, tree.child(value.value, ".value")]
    except Refused:
        # The name alone finds a member again, whatever its value is; a combined flag has no name that would do.
        if value.name not in type(value).__members__:
            raise
        del tree.buffers[mark:]
        return ["enum", _label(value), value.name]


def _label(value: Any) -> str:
    return _clean(type_name(type(value)), 256)


def _write_fields(tree: _Tree, kind: str, value: Any, pairs: Iterable[tuple[Any, Any]]) -> list[Any]:
    node = ["object", kind, _label(value)]
    for name, item in pairs:
        node.append(tree.child(str(name), ".__dict__"))
        node.append(tree.child(item, f".{name}"))
    return node


def _write_dataclass(tree: _Tree, value: Any) -> Any:
    pairs = [(name, getattr(value, name)) for name, field in _dataclass_fields(value) if field.init]
    return _write_fields(tree, "dataclass", value, pairs)


def _dataclass_fields(value: Any) -> list[tuple[str, Any]]:
    # ClassVar and InitVar pseudo-fields are in the same table; only real fields have this kind.
    return [(n, f) for n, f in type(value).__dataclass_fields__.items() if f._field_type.name == "_FIELD"]


def _write_namedtuple(tree: _Tree, value: Any) -> Any:
    return _write_fields(tree, "namedtuple", value, zip(type(value)._fields, tuple(value), strict=True))


def _write_model(tree: _Tree, value: Any) -> Any:
    extra = getattr(value, "__pydantic_extra__", None) or {}
    pairs = [(name, value.__dict__[name]) for name in type(value).model_fields if name in value.__dict__]
    return _write_fields(tree, "model", value, [*pairs, *extra.items()])


def _write_url(tree: _Tree, value: Any) -> Any:
    return ["object", "url", _label(value), "url", tree.child(str(value), "")]


def _write_array(tree: _Tree, value: Any) -> Any:
    if value.dtype.kind not in ARRAY_KINDS or value.dtype.itemsize > ITEM_BYTES:
        raise Refused(f"a numpy array of dtype {value.dtype} cannot leave the jail: use numbers, text or dates")
    return ["array", value.dtype.str, [int(n) for n in value.shape], tree.buffer(value.tobytes())]


def _write_scalar(tree: _Tree, value: Any) -> Any:
    if value.dtype.kind not in ARRAY_KINDS or value.dtype.itemsize > ITEM_BYTES:
        raise Refused(f"a numpy scalar of dtype {value.dtype} cannot leave the jail")
    return ["scalar", value.dtype.str, tree.buffer(value.tobytes())]


def _write_frame(tree: _Tree, value: Any) -> Any:
    columns = [_column(tree, value.iloc[:, i], f"[{name!r}]") for i, name in enumerate(value.columns)]
    return ["frame", _index(tree, value.columns), _index(tree, value.index), len(value), *columns]


def _write_series(tree: _Tree, value: Any) -> Any:
    column = _column(tree, value, "")
    return ["series", tree.child(value.name, ".name"), _index(tree, value.index), len(value), column]


def _column(tree: _Tree, series: Any, step: str) -> list[Any]:
    """[pandas dtype name or "", values]: numbers and dates as one array, text and objects value by value."""
    dtype = series.dtype
    if getattr(dtype, "kind", "") in "biufcmM" and type(dtype).__module__.startswith("numpy"):
        return ["", tree.child(series.to_numpy(), step)]
    if str(dtype) in ("object", "str", "string"):
        values = [None if item is sys.modules["pandas"].NA else item for item in series.tolist()]
        return [str(dtype), tree.child(values, step)]
    raise Refused(
        f"a pandas column of dtype {dtype} cannot leave the jail: convert it with .astype() (at result{step})"
    )


def _index(tree: _Tree, index: Any) -> list[Any]:
    kind = type(index).__name__
    if kind == "RangeIndex":
        return ["range", index.start, index.stop, index.step, tree.child(index.name, ".index.name")]
    if kind == "MultiIndex":
        raise Refused("a pandas MultiIndex cannot leave the jail: flatten it, for instance with .reset_index()")
    column = _column(tree, index.to_series(), ".index")
    return ["values", *column, tree.child(index.name, ".index.name")]


# By exact class: the common cases, without a search.
_WRITERS: dict[type, Callable[[_Tree, Any], Any]] = {
    str: _write_str,
    int: _write_int,
    list: _write_list,
    tuple: _write_tuple,
    dict: _write_dict,
    set: _write_set,
    frozenset: _write_frozenset,
    bytes: _write_bytes,
    bytearray: _write_bytearray,
    memoryview: _write_bytes,
    complex: _write_complex,
}

# (module, class, writer): looked up in sys.modules, because a value of that class cannot exist unless its module
# is loaded, and importing it here would cost every call. Order matters: datetime is a date, Enum may be an int.
_BY_MODULE: tuple[tuple[str, str, Callable[[_Tree, Any], Any]], ...] = (
    ("enum", "Enum", _write_enum),
    ("pydantic", "BaseModel", _write_model),
    ("datetime", "datetime", _write_datetime),
    ("datetime", "date", _write_date),
    ("datetime", "time", _write_time),
    ("datetime", "timedelta", _write_timedelta),
    ("decimal", "Decimal", _write_decimal),
    ("uuid", "UUID", _write_uuid),
    ("pathlib", "PurePath", _write_path),
    ("numpy", "generic", _write_scalar),
    ("pandas", "DataFrame", _write_frame),
    ("pandas", "Series", _write_series),
    ("pydantic", "AnyUrl", _write_url),
    ("pydantic_core", "Url", _write_url),
)

# A subclass of a builtin goes out as that builtin: bs4's strings, defaultdict, OrderedDict, os.stat_result.
_BASES: tuple[tuple[type, Callable[[_Tree, Any], Any]], ...] = (
    (str, _write_str),
    (int, _write_int),
    (float, _write_float),
    (bytes, _write_bytes),
    (bytearray, _write_bytearray),
    (list, _write_list),
    (tuple, _write_tuple),
    (dict, _write_dict),
    (set, _write_set),
    (frozenset, _write_frozenset),
)


def _find_writer(value: Any) -> Callable[[_Tree, Any], Any] | None:
    kind = type(value)
    for module, name, writer in _BY_MODULE:
        cls = getattr(sys.modules.get(module), name, None) if module in sys.modules else None
        if isinstance(cls, type) and issubclass(kind, cls):
            return writer
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is getattr(numpy, "ndarray", None):
        return _write_array
    if hasattr(kind, "__dataclass_fields__"):
        return _write_dataclass
    if issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple):
        return _write_namedtuple
    return next((writer for base, writer in _BASES if issubclass(kind, base)), None)


def _why_not(value: Any) -> str:
    name = type_name(type(value))
    if isinstance(value, types.GeneratorType | types.AsyncGeneratorType | types.CoroutineType):
        return f"a {name} cannot leave the jail, its frame lives there: return a list"
    if hasattr(type(value), "fileno"):
        return f"an open file ({name}) cannot leave the jail: return its content or its path"
    if hasattr(type(value), "__next__"):
        return f"an iterator ({name}) cannot leave the jail: return a list"
    if isinstance(value, types.FunctionType | types.ModuleType | type):
        return f"a {name} cannot leave the jail: results are data"
    return f"a {name} cannot leave the jail: {ADVICE}"
