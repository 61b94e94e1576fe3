"""Our dataclasses are to everyone what those of the standard library are."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest

from sandbox import values

OURS = SimpleNamespace(dataclass=values.dataclass, field=values.field, replace=values.replace, asdict=values.asdict)
BOTH = pytest.mark.parametrize("of", [dataclasses, OURS], ids=["theirs", "ours"])


@values.dataclass(frozen=True, slots=True)
class Leg:
    length: float
    name: str = "leg"


@values.dataclass(frozen=True, slots=True)
class Table:
    legs: tuple[Leg, ...]
    price: int = 3
    notes: dict[str, Any] = values.field(default_factory=dict)


def classes(of: Any) -> tuple[Any, Any]:
    @of.dataclass(frozen=True)
    class Point:
        x: int
        y: int = 2
        tags: list[str] = of.field(default_factory=list)
        secret: str = of.field(default="", repr=False, compare=False)

        @cached_property
        def sum(self) -> int:
            return self.x + self.y

    @of.dataclass
    class Box:
        corner: Any
        open: bool = False

    return Point, Box


@BOTH
def test_what_is_given_and_what_is_not(of: Any) -> None:
    point, _ = classes(of)
    one = point(1, tags=["a"])
    assert (one.x, one.y, one.tags, one.secret) == (1, 2, ["a"], "")
    assert point(1).tags == []
    assert point(1).tags is not point(1).tags
    assert (point.y, point.secret) == (2, "")
    assert not hasattr(point, "tags")
    assert point.__match_args__ == ("x", "y", "tags", "secret")


@BOTH
@pytest.mark.parametrize(
    ("args", "given"),
    [((), {}), ((1, 2, [], "", 5), {}), ((1,), {"x": 1}), ((1,), {"z": 1}), ((), {"y": 1}), ((), {"y": 1, "z": 2})],
)
def test_what_does_not_fit_is_refused(of: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    point, _ = classes(of)
    with pytest.raises(TypeError):
        point(*args, **given)


@pytest.mark.parametrize(
    ("args", "given", "told"),
    [
        ((), {"z": 1}, "unknown: z; missing: x"),
        ((1,), {"x": 1}, "given twice: x"),
        ((1, 2, [], "", 5), {}, "5 values for 4 fields"),
    ],
)
def test_what_does_not_fit_is_named(args: tuple[Any, ...], given: dict[str, Any], told: str) -> None:
    point, _ = classes(OURS)
    with pytest.raises(TypeError, match=rf"Point\(\): {told}$"):
        point(*args, **given)


@BOTH
def test_equal_are_those_of_one_class_with_equal_fields(of: Any) -> None:
    point, box = classes(of)
    other, _ = classes(of)
    assert point(1, secret="a") == point(1, secret="b")
    assert point(1) != point(2)
    assert point(1) != other(1)
    assert point(1) != 1
    assert box(1) == box(1)


@BOTH
def test_only_what_cannot_change_can_be_a_key(of: Any) -> None:
    point, box = classes(of)
    assert hash(point(1, tags=())) == hash(point(1, tags=(), secret="other"))
    with pytest.raises(TypeError):
        hash(box(1))


@BOTH
def test_the_frozen_do_not_change(of: Any) -> None:
    point, box = classes(of)
    one, other = point(1), box(1)
    with pytest.raises(AttributeError):
        one.x = 2
    with pytest.raises(AttributeError):
        del one.x
    other.open = True
    assert (one.x, other.open) == (1, True)


@BOTH
def test_a_line_of_text(of: Any) -> None:
    point, box = classes(of)
    assert repr(box(point(1))).replace(f"{point.__qualname__.rpartition('.')[0]}.", "") == (
        "Box(corner=Point(x=1, y=2, tags=[]), open=False)"
    )


@BOTH
def test_a_changed_copy_forgets_what_was_worked_out(of: Any) -> None:
    point, _ = classes(of)
    one = point(1)
    assert one.sum == 3
    assert of.replace(one, x=5).sum == 7
    with pytest.raises(TypeError):
        of.replace(one, z=5)


@BOTH
def test_as_dictionaries_nothing_is_shared(of: Any) -> None:
    point, box = classes(of)
    one = box([point(1), {"a": (point(2),)}, {3}])
    data = of.asdict(one)
    first = {"x": 1, "y": 2, "tags": [], "secret": ""}
    assert data == {"corner": [first, {"a": ({**first, "x": 2},)}, {3}], "open": False}
    data["corner"][0]["tags"].append("x")
    data["corner"][2].add(4)
    assert one == box([point(1), {"a": (point(2),)}, {3}])


def test_the_standard_library_takes_ours() -> None:
    table = Table((Leg(1.0), Leg(2.0, "second")))
    assert dataclasses.is_dataclass(Table)
    assert dataclasses.is_dataclass(table)
    assert [entry.name for entry in dataclasses.fields(Table)] == ["legs", "price", "notes"]
    assert dataclasses.fields(table)[2].default_factory is dict
    assert dataclasses.asdict(table) == values.asdict(table)
    assert dataclasses.replace(table, price=4) == Table(table.legs, 4) == values.replace(table, price=4)


def test_copies_and_pickles_are_equal() -> None:
    table = Table((Leg(1.0),), notes={"a": [1]})
    assert pickle.loads(pickle.dumps(table)) == copy.deepcopy(table) == copy.copy(table) == table
