"""The return annotation is the contract: results are checked against it, and objects are built from it."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import enum
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, NewType, Optional, TypedDict, TypeVar, Union

import pydantic
import pytest

from sandbox import codec
from sandbox._jail import encode
from sandbox.errors import ToolFailed
from sandbox.rebuild import Unresolved, return_annotation

np = pytest.importorskip("numpy")
if TYPE_CHECKING:
    from nowhere import Missing


class Colour(enum.Enum):
    RED = 1
    ODD = object()


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Bits(enum.Flag):
    A = 1
    B = 2


@dataclasses.dataclass
class Issue:
    number: int
    title: str = ""
    labels: list[str] = dataclasses.field(default_factory=list)
    parent: Issue | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    at: datetime.date
    colour: Colour
    total: float = dataclasses.field(init=False)
    kinds: typing.ClassVar[int] = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", 1.5)


@dataclasses.dataclass
class Positive:
    n: int

    def __post_init__(self) -> None:
        if self.n <= 0:
            raise ValueError("not positive")


class Point(NamedTuple):
    x: int
    label: Mode = Mode.FAST


Pair = collections.namedtuple("Pair", "a b")


class Row(TypedDict):
    id: int
    issue: typing.NotRequired[Issue]


class Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    number: int = pydantic.Field(alias="Number", gt=0)
    when: datetime.datetime
    colour: Colour
    inner: list[Issue] = []
    link: pydantic.HttpUrl | None = None
    other: Model | None = None


class Numbers(pydantic.RootModel[list[int]]):
    pass


UserId = NewType("UserId", int)
T = TypeVar("T")
Bound = TypeVar("Bound", bound=Issue)
Json = Union[None, bool, int, float, str, list["Json"], dict[str, "Json"]]  # noqa: UP007


def through(value: Any, annotation: Any) -> Any:
    return codec.decode_reply(encode.encode_value(value), annotation)


MODEL = Model(
    Number=3,
    when=datetime.datetime(2024, 1, 1),
    colour=Colour.RED,
    inner=[Issue(1)],
    link="https://example.org/",
    other=Model(Number=4, when=datetime.datetime(2024, 1, 2), colour=Colour.RED),
    extra_key="kept",
)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (Issue(1, "t", ["a"], Issue(2)), Issue),
        ([Issue(1)], list[Issue]),
        ({"k": (Issue(1), 2)}, dict[str, tuple[Issue, int]]),
        (Issue(1), Issue | None),
        (None, Optional[Issue]),  # noqa: UP045
        (Frozen(datetime.date(2024, 1, 1), Colour.ODD), Frozen),
        (Colour.ODD, Colour),
        ({Colour.RED: {Colour.ODD}}, dict[Colour, set[Colour]]),
        (Level.LOW, Level),
        (Mode.FAST, Mode),
        (Bits.A | Bits.B, Bits),
        (Mode.FAST, Literal[Mode.FAST]),
        ("a", Literal["a", "b"]),
        (Point(1), Point),
        (Pair(1, [2]), Pair),
        ((Point(1), Point(2)), tuple[Point, ...]),
        ({"id": 1, "issue": Issue(2)}, Row),
        ([{"id": 1}], list[Row]),
        (MODEL, Model),
        ([MODEL, Issue(1)], list[Model | Issue]),
        (Numbers([1, 2]), Numbers),
        (UserId(5), UserId),
        (Issue(1), Annotated[Issue, "note"]),
        (Issue(1), Bound),
        ([1, "a", None], list[T]),
        ([Issue(1)], Sequence[Issue]),
        ([Issue(1)], Iterable[Issue]),
        ({"a": Issue(1)}, Mapping[str, Issue]),
        ({"a": [1, None, {"b": 1.5}]}, Json),
        (1, float),
        (True, int),
        (np.int64(3), int),
        (np.float32(3), float),
        (np.bool_(True), bool),
        (np.str_("x"), str),
        ([np.int64(3)], list[int]),
        ("x", typing.LiteralString),
        ("x", object),
        ([1, "x"], list),
        ([1, "x"], typing.List),  # noqa: UP006
        ([1], typing.List[int]),  # noqa: UP006
        ((), tuple[()]),
    ],
    ids=lambda x: str(x)[:40],
)
def test_the_value_comes_back_as_declared(value: Any, annotation: Any) -> None:
    back = through(value, annotation)
    assert back == value
    assert type(back) is type(value)


def test_arrays_and_tables_are_checked_by_their_class() -> None:
    pd = pytest.importorskip("pandas")
    import numpy.typing as npt

    for annotation in (np.ndarray, npt.NDArray[np.float64], Annotated[np.ndarray, "x"], np.ndarray | None):
        assert through(np.ones(2), annotation).tolist() == [1, 1]
    assert through(pd.DataFrame({"a": [1]}), pd.DataFrame).a.tolist() == [1]
    with pytest.raises(ToolFailed, match="list is not a ndarray"):
        through([1.0], np.ndarray)


def test_a_union_builds_the_class_that_was_returned() -> None:
    @dataclasses.dataclass
    class Cat:
        name: str

    @dataclasses.dataclass
    class Dog:
        name: str

    assert through(Dog("x"), Cat | Dog) == Dog("x")
    assert through([Dog("x"), Cat("y")], list[Cat | Dog]) == [Dog("x"), Cat("y")]


@pytest.mark.parametrize(
    ("value", "annotation", "words"),
    [
        ("x", int, "str 'x' is not a int (at result)"),
        (None, str, "None is not a str"),
        ([1, "x"], list[int], "(at result[1])"),
        ({"a": [Issue("x")]}, dict[str, list[Issue]], "(at result['a'][0].number)"),
        (Issue(1), dict, "Issue is not a dict"),
        (Issue(1), Point, "Issue is not a Point"),
        ({"number": 1}, Issue, "a dict is not a Issue"),
        (Issue(1), Any, "name its class in the return annotation"),
        ([{"a": Colour.RED}], list, "name its class in the return annotation"),
        (1.5, int, "float 1.5 is not a int"),
        (2**1000, str, "a int is not a str"),
        ("c", Literal["a", "b"], "is not one of 'a', 'b'"),
        (1, Literal[True], "is not one of True"),
        ([1], str | int, "is none of str, int"),
        ((1, 2), tuple[int], "a tuple of 2 where the annotation has 1"),
        ({}, Row, "missing keys ['id']"),
        ({"id": 1, "zz": 2}, Row, "unknown keys"),
        (np.float64(1.5), int, "is not a int"),
        ("abc", list[str], "is not a list"),
        ({1: 2}, dict[str, int], "(at result.keys())"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_a_result_that_does_not_fit_fails_and_says_where(value: Any, annotation: Any, words: str) -> None:
    with pytest.raises(ToolFailed) as failed:
        through(value, annotation)
    assert words in str(failed.value)
    assert failed.value.type_name == "ResultMismatch"


def forged(kind: str, label: str, **fields: Any) -> bytes:
    flat = [part for pair in fields.items() for part in pair]
    return encode.pack({"tree": ["object", kind, label, *flat]})


def test_forged_objects_meet_the_constructors_own_checks() -> None:
    assert codec.decode_reply(forged("dataclass", "x", n=1), Positive) == Positive(1)
    for data, annotation, words in [
        (forged("dataclass", "Positive", n=-1), Positive, "not positive"),
        (forged("dataclass", "Positive", n=1, evil=2), Positive, "evil"),
        (forged("dataclass", "Positive"), Positive, "missing"),
        (forged("dataclass", "Positive", n="1"), Positive, "is not a int"),
        (forged("model", "Model", number=-1, when="2024-01-01", colour=1), Model, "greater than 0"),
        (forged("model", "Numbers", x=1), Numbers, "root"),
        (forged("dataclass", "builtins.int", n=1), int, "is not a int"),
        (forged("namedtuple", "Point", y=1), Point, "y"),
    ]:
        with pytest.raises(ToolFailed) as failed:
            codec.decode_reply(data, annotation)
        assert words in str(failed.value)


def test_a_label_from_the_jail_selects_nothing_outside_the_annotation() -> None:
    with pytest.raises(ToolFailed, match="is not a Positive"):
        codec.decode_reply(forged("model", "tests.unit.test_codec_annotations.Model", number=1), Positive)


def test_an_enum_member_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ToolFailed, match="does not accept"):
        codec.decode_reply(encode.pack({"tree": ["enum", "Colour", "__class__", 99]}), Colour)
    assert codec.decode_reply(encode.pack({"tree": ["enum", "Colour", "NAME", 1]}), Colour) is Colour.RED


class Deep:
    """What `type Deep = list[Deep] | Sequence[Deep] | int` is in Python 3.12."""

    @property
    def __value__(self) -> Any:
        return Union[list[self], Sequence[self], int]  # type: ignore[valid-type]  # noqa: UP007


def test_overlapping_unions_cannot_be_tried_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.rebuild._STEPS_MAX", 50_000)
    fits: Any = 1
    breaks: Any = None
    for _ in range(40):
        fits, breaks = [fits], [breaks]
    assert through(fits, Deep()) == fits
    with pytest.raises(ToolFailed, match="too large to be checked"):
        through(breaks, Deep())


def hints_missing(x: Missing) -> Issue: ...
def returns_missing() -> Missing: ...
def no_annotation(): ...
def returns_none() -> None: ...


def test_only_the_return_annotation_has_to_be_resolvable() -> None:
    assert return_annotation(hints_missing) is Issue
    assert return_annotation(no_annotation) is Any
    assert return_annotation(returns_none) is type(None)
    unresolved = return_annotation(returns_missing)
    assert isinstance(unresolved, Unresolved)
    assert through({"plain": 1}, unresolved) == {"plain": 1}
    with pytest.raises(ToolFailed, match=r"'Missing' cannot be evaluated \(NameError"):
        through(Issue(1), unresolved)


def test_classes_of_an_enclosing_function_are_found_when_the_body_uses_them() -> None:
    @dataclasses.dataclass
    class Local:
        n: int

    def tool() -> Local:
        return Local(1)

    assert return_annotation(tool) is Local


def test_large_plain_lists_are_checked_fast() -> None:
    import time

    data = encode.encode_value(list(range(500_000)))
    start = time.process_time()
    codec.decode_reply(data, list[int])
    assert time.process_time() - start < 1.5
