"""Values that leave the jail come out equal, and of the same class."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import math
import os
import pathlib
import struct
import uuid
import zoneinfo
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import codec
from sandbox._jail import encode
from sandbox.errors import ToolFailed
from tests.helpers.calls import call

np = pytest.importorskip("numpy")


def through(value: Any, annotation: Any = Any) -> Any:
    return codec.decode_reply(encode.encode_value(value), annotation)


def same(left: Any, right: Any) -> bool:
    """Equal, of one class throughout, and bit for bit where equality is not enough (nan, -0.0)."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack("d", left) == struct.pack("d", right) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    return bool(left == right)


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(ANY_TEXT, inner, max_size=6),
    max_leaves=30,
)
HASHABLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | ANY_TEXT
    | st.binary(max_size=20)
    | st.dates()
    | st.times()
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
    | st.decimals(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=10,
)
ANYTHING = st.recursive(
    HASHABLE | st.binary(max_size=50).map(bytearray) | st.complex_numbers(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.sets(HASHABLE, max_size=5)
        | st.dictionaries(HASHABLE, inner, max_size=5)
    ),
    max_leaves=20,
)


@given(JSON)
def test_every_json_value_comes_back(value: Any) -> None:
    assert same(through(value), value)


@given(ANYTHING)
@settings(max_examples=200)
def test_every_builtin_value_comes_back(value: Any) -> None:
    assert same(through(value), value)


@pytest.mark.parametrize(
    "value",
    [
        10**5000,
        -(10**5000),
        2**63,
        -(2**63),
        2**63 - 1,
        float("nan"),
        float("-inf"),
        -0.0,
        "\ud800",
        "\ud83d\ude00",  # two lone surrogates that JSON would join into one character
        "\U0001f600",
        "x" * 100_000,
        "é" * 100_000,
        {"\udcff": 1},
        {1: "a", "1": "b", None: "c", (1, 2): "d", b"x": "e", False: "f"},
        [[], {}, (), set(), frozenset(), b"", ""],
        decimal.Decimal("-1.50"),
        decimal.Decimal("sNaN123"),
        decimal.Decimal("1E+999999"),
        uuid.UUID(int=7),
        pathlib.Path("/tmp/\udcffx"),
        pathlib.PurePosixPath("a/b"),
        datetime.datetime(2024, 2, 29, 1, 2, 3, 4, tzinfo=datetime.UTC),
        datetime.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        datetime.time(1, 2, 3, tzinfo=datetime.timezone(datetime.timedelta(hours=-3, minutes=-30))),
        datetime.timedelta(days=-1, microseconds=1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_come_back(value: Any) -> None:
    back = through(value)
    if isinstance(value, decimal.Decimal):
        assert str(back) == str(value)
    else:
        assert same(back, value)
    if isinstance(value, datetime.datetime):
        assert (back.fold, str(back.tzinfo)) == (value.fold, str(value.tzinfo))


def test_a_round_trip_through_a_process_of_its_own() -> None:
    def tool(value: Any) -> Any:
        return [value, (1, {2}), b"\0"]

    assert call(tool, {"k": 2**70}) == [{"k": 2**70}, (1, {2}), b"\0"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(
    "dtype", ["?", "i1", "<i8", ">u2", "f2", "<f8", "c16", "S3", "<U4", "M8[ns]", "m8[us]", "M8[D]", "g"]
)
def test_arrays_come_back_as_writable_arrays_of_their_own(dtype: str, order: Any) -> None:
    array = np.arange(6).reshape(2, 3).astype("i8").astype(dtype, order=order)
    back = through(array)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert np.array_equal(back, array)
    back[:] = array
    assert back.flags.owndata or back.base.flags.owndata


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1, 1, 1, 1)])
def test_arrays_of_any_shape_come_back(shape: tuple[int, ...]) -> None:
    array = np.ones(shape)
    back = through(array)
    assert isinstance(back, np.ndarray)
    assert back.shape == shape
    assert np.array_equal(back, array)


def test_numpy_scalars_keep_their_class() -> None:
    values = [np.int64(3), np.float32(1.5), np.bool_(True), np.datetime64("2020-01-01"), np.str_("x")]
    back = through(values)
    assert [type(b) for b in back] == [type(v) for v in values]
    assert back == values


def test_arrays_inside_structures_come_back_in_their_places() -> None:
    back = through({"a": np.arange(3), "b": [np.zeros(2), b"between", np.ones(1)]})
    assert back["a"].tolist() == [0, 1, 2]
    assert [np.asarray(x).tolist() if not isinstance(x, bytes) else x for x in back["b"]] == [
        [0, 0],
        b"between",
        [1],
    ]


def test_a_pandas_table_comes_back() -> None:
    pd = pytest.importorskip("pandas")
    table = pd.DataFrame(
        {
            "n": [1, 2, 3],
            "x": [0.5, float("nan"), 2.0],
            "text": ["a", None, "é"],
            "when": pd.to_datetime(["2020-01-01", "2021-01-01", None]),
            "mixed": [1, "two", (3,)],
        },
        index=pd.Index(["r1", "r2", "r3"], name="row"),
    )
    back = through(table)
    pd.testing.assert_frame_equal(back, table)
    pd.testing.assert_series_equal(through(table["n"]), table["n"])
    pd.testing.assert_frame_equal(through(table.reset_index()[[]]), table.reset_index()[[]])
    pd.testing.assert_frame_equal(through(pd.DataFrame([[1, 2.5]])), pd.DataFrame([[1, 2.5]]))
    twice = pd.DataFrame([[1, 2]], columns=["a", "a"])
    pd.testing.assert_frame_equal(through(twice), twice)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Text("x"), "x"),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, a=[1]), {"a": [1]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (os.stat_result(range(10)), tuple(range(10))),
    ],
)
def test_a_subclass_of_a_builtin_comes_out_as_the_builtin(value: Any, plain: Any) -> None:
    assert same(through([value]), [plain])


class Thing:
    pass


class Point(NamedTuple):
    x: int


class Colour(enum.Enum):
    RED = 1


def a_cycle() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "where", "words"),
    [
        ({"a": [1, Thing()]}, "result['a'][1]", "Thing cannot leave"),
        ((n for n in [1]), "result", "return a list"),
        (iter([1]), "result", "return a list"),
        (map(str, []), "result", "return a list"),
        (lambda: 1, "result", "results are data"),
        ({"f": Thing}, "result['f']", "results are data"),
        ({(1, 2): {3: object()}}, "result[tuple][3]", "object cannot leave"),
        (np.array([object()]), "result", "dtype object"),
        (np.zeros(2, [("a", "i4")]), "result", "dtype"),
        (np.ma.masked_array([1]), "result", "cannot leave"),
        (ValueError("x"), "result", "ValueError cannot leave"),
        (a_cycle(), "result[0][0]", "nested"),
        (nested(200), "result[0]", "nested"),
        ({"when": datetime.time(1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))}, "result['when']", "offset"),
    ],
    ids=lambda value: repr(value)[:25] if isinstance(value, str) else None,
)
def test_what_cannot_leave_is_refused_with_its_place(value: Any, where: str, words: str) -> None:
    with pytest.raises(encode.Refused) as refused:
        encode.encode_value(value)
    assert words in str(refused.value)
    assert f"at {where}" in str(refused.value)


def test_an_open_file_is_refused_as_one() -> None:
    def tool() -> Any:
        return open("/dev/null")

    with pytest.raises(ToolFailed, match="an open file") as failed:
        call(tool)
    assert failed.value.type_name == "UnsupportedResult"


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ({"reply_bytes": 1000}, b"x" * 1001),
        ({"reply_bytes": 1000}, "x" * 2000),
        ({"reply_bytes": 1000}, list(range(1000))),
        ({"header_bytes": 1000}, list(range(1000))),
        ({"parts": 100}, list(range(101))),
        ({"parts": 100}, [(n,) for n in range(60)]),
        ({"keys": 100}, set(range(101))),
        ({"keys": 100}, dict.fromkeys(range(101), 0)),
        ({"depth": 10}, nested(11)),
    ],
    ids=str,
)
def test_the_encoder_refuses_what_the_decoder_would(limit: dict[str, int], value: Any) -> None:
    with pytest.raises(encode.Refused):
        encode.encode_value(value, {**encode.DEFAULT_LIMITS, **limit})
    assert through(value if "depth" not in limit else nested(10)) is not None


@pytest.mark.parametrize("depth", range(60, 66))
@pytest.mark.parametrize("leaf", [1, b"x", np.zeros((1, 1))], ids=["json", "bytes", "array"])
def test_whatever_the_encoder_lets_pass_the_decoder_reads(depth: int, leaf: Any) -> None:
    value = leaf
    for _ in range(depth):
        value = [value]
    try:
        data = encode.encode_value(value)
    except encode.Refused:
        assert depth > 60
        return
    codec.decode_reply(data)


def test_limits_of_both_sides_are_the_same() -> None:
    from sandbox import reply

    assert dict(reply.LIMITS) == encode.DEFAULT_LIMITS
    assert reply.MAGIC == encode.MAGIC
