"""Record bytes are RFC 8785 bytes of what was given, whatever the tool put into it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from sandbox.audit.canonical import DEPTH_MAX, ITEMS_MAX, Settled, bounded, clean, encode, visible
from sandbox.errors import AuditError

any_text = st.text(st.characters(codec=None), max_size=40)  # with surrogates
any_number = st.integers() | st.floats() | st.floats(-1e-4, 1e-4) | st.floats(1e15, 1e25)
any_data = st.recursive(
    st.none() | st.booleans() | any_number | any_text | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(any_text, inner, max_size=5),
    max_leaves=25,
)


@given(any_data)
def test_bytes_are_what_the_rfc8785_library_writes(data: Any) -> None:
    assert encode(data) == rfc8785.dumps(clean(data))


ascii_text = st.text(st.characters(max_codepoint=127), max_size=8)
# Mostly what the C encoder alone can write canonically, with some of what it cannot.
plain_data = st.dictionaries(
    ascii_text,
    st.recursive(
        st.none() | st.booleans() | any_number | st.floats(-1e-3, 1e3) | ascii_text,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ascii_text, inner, max_size=4),
        max_leaves=12,
    ),
    max_size=5,
)


@given(plain_data)
def test_plain_data_takes_a_shorter_way_to_the_same_bytes(data: Any) -> None:
    assert encode(data) == rfc8785.dumps(clean(data))


@pytest.mark.parametrize("value", [1.0, -0.0, 1e16, 1e-5, 2**53, -(2**60), math.nan, -math.inf, 123456789012345.0, 0.1])
def test_numbers_are_written_as_ecmascript_does_wherever_they_stand(value: float) -> None:
    for data in ({"a": value}, {"a": [value]}, {"a": [0, value, 1], "b": f"x{value},{value}"}):
        assert encode(data) == rfc8785.dumps(clean(data))


groups = st.dictionaries(any_text, any_data, max_size=4)


@given(st.dictionaries(any_text, any_data, max_size=3), st.dictionaries(any_text, groups, max_size=4))
def test_groups_that_are_settled_have_the_bytes_of_plain_ones(plain: Any, settled: Any) -> None:
    entry = {**plain, **{name: Settled(group) for name, group in settled.items()}}
    expected = encode({**plain, **settled})
    assert encode(entry) == expected
    assert encode(entry) == expected, "the second time its text is there already"
    assert clean(entry) == clean({**plain, **settled})


def test_nesting_is_counted_alike_in_settled_groups() -> None:
    deep: Any = "end"
    for _ in range(DEPTH_MAX + 5):
        deep = {"in": deep}
    assert encode({"a": Settled(deep), "b": [Settled(deep)]}) == encode({"a": deep, "b": [deep]})


@given(any_data)
def test_bytes_survive_reading_and_writing_again(data: Any) -> None:
    once = encode(data)
    assert encode(json.loads(once)) == once


@given(any_data)
def test_stored_bytes_hold_nothing_that_a_terminal_obeys(data: Any) -> None:
    text = encode(data).decode()
    assert not [c for c in text if ord(c) < 0x20 or 0x7F <= ord(c) <= 0x9F]


@given(any_text)
def test_shown_text_is_one_printable_line(text: str) -> None:
    shown = visible(text)
    assert all(ord(c) >= 0x20 and not 0x7F <= ord(c) <= 0x9F for c in shown)
    assert not set(shown) & set("\u2028\u2029\u202e\u2066\u200b\ufeff")
    shown.encode()


def test_ordinary_text_is_shown_as_it_is() -> None:
    assert visible("héllo wörld – 日本 🙂") == "héllo wörld – 日本 🙂"


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (2**53 - 1, 2**53 - 1),
        (2**53, str(2**53)),
        (-(2**80), str(-(2**80))),
        (1e16, "1e+16"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (1.0, 1),
        (b"\xff\x00ok", "\\udcff\x00ok"),
        ("\udc80", "\\udc80"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("\x1b[31m", "\x1b[31m"),
        (Path("/a"), "/a"),
        ({"b", "a"}, ["a", "b"]),
        ((1, 2), [1, 2]),
    ],
)
def test_what_json_cannot_carry_is_stored_as_text(value: Any, stored: Any) -> None:
    assert clean(value) == stored


def test_control_characters_stay_data_in_json() -> None:
    assert json.loads(encode({"out": "\x1b[2J\r\n\x00"})) == {"out": "\x1b[2J\r\n\x00"}


@pytest.mark.parametrize(
    ("number", "text"), [(1e-5, b"0.00001"), (1e-7, b"1e-7"), (1.5e-300, b"1.5e-300"), (-0.0, b"0")]
)
def test_floats_are_written_as_ecmascript_writes_them(number: float, text: bytes) -> None:
    assert encode([number, "x"]) == b"[" + text + b',"x"]'


def test_keys_sort_by_utf16_units() -> None:
    assert encode({"\U0001f600": 1, "\ufb33": 2}) == '{"\U0001f600":1,"\ufb33":2}'.encode()


@given(st.text(max_size=200), st.integers(1, 100))
def test_bounded_text_keeps_whole_characters_and_says_what_went(text: str, limit: int) -> None:
    short = bounded(text, limit)
    if len(text.encode()) <= limit:
        assert short == text
    else:
        kept, _, note = short.rpartition(" [+")
        assert text.startswith(kept)
        assert len(kept.encode()) <= limit
        assert note == f"{len(text.encode()) - limit} bytes]"


def test_deep_long_and_wide_data_is_cut_and_says_so() -> None:
    deep: Any = "bottom"
    for _ in range(5000):
        deep = [deep]
    assert f"deeper than {DEPTH_MAX}" in encode(deep).decode()
    assert clean(list(range(ITEMS_MAX + 3)))[-1] == "[+3 items]"
    assert clean({str(n): n for n in range(ITEMS_MAX + 3)})["[left out]"] == 3
    assert clean("x" * 10**6).endswith(" bytes]")


def test_an_object_that_is_no_data_is_refused() -> None:
    with pytest.raises(AuditError, match=r"builtins\.object"):
        encode({"value": object()})
