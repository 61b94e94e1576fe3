"""What stands for json and contextlib in the zygote does as they do."""

from __future__ import annotations

import json
import math
import os
import socket as standard_socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox._linux import bare, mounts

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_it_writes_and_reads_as_json_does(value: object) -> None:
    text = bare.dumps(value)
    assert text == json.dumps(value, separators=(",", ":"))
    assert bare.loads(text.encode()) == value
    assert bare.loads(json.dumps(value).encode()) == value
    assert bare.loads(json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "surrogatepass")) == value


def test_it_reads_what_is_no_number_as_json_does() -> None:
    assert math.isnan(bare.loads(b"NaN"))
    assert bare.loads(b"[Infinity,-Infinity]") == [math.inf, -math.inf]


@pytest.mark.parametrize("data", [b"", b"{", b"[1,]", b"nope", b'{"a":1}x', b'"\xff"', b'"a\nb"', b"[" * 100_000])
def test_it_refuses_what_json_refuses(data: bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        json.loads(data)
    with pytest.raises((ValueError, RecursionError)):
        bare.loads(data)


def test_it_refuses_to_write_what_json_refuses() -> None:
    for value in (b"bytes", {1, 2}, object(), {(1, 2): 3}):
        with pytest.raises(TypeError):
            json.dumps(value)
        with pytest.raises(TypeError):
            bare.dumps(value)
    circle: list[object] = []
    circle.append(circle)
    with pytest.raises(RecursionError):
        bare.dumps(circle)


def test_suppress_passes_over_its_own_kinds_only() -> None:
    with bare.suppress(KeyError, OSError):
        raise FileNotFoundError
    with pytest.raises(ValueError, match="kept"), bare.suppress(KeyError):
        raise ValueError("kept")


def test_a_socket_is_closed_at_the_end_of_its_with() -> None:
    with bare.Socket(standard_socket.AF_UNIX, standard_socket.SOCK_STREAM) as sock:
        fd = sock.fileno()
        os.fstat(fd)
    assert sock.fileno() == -1


@given(st.lists(st.sampled_from(["a", " ", "\t", "\n", "\\", "é", "0", "134", "/"])).map("".join))
def test_mount_points_are_read_as_the_kernel_writes_them(path: str) -> None:
    written = b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in path.encode())
    assert mounts._unescaped(written) == path.encode()
