"""A tool may write anything to the result descriptor: what comes of it is a value or a CodecError, soon and small."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox import codec, reply
from sandbox._jail import encode
from sandbox.codec import CodecError
from sandbox.errors import ToolFailed

np = pytest.importorskip("numpy")


def container(header: Any, buffers: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return encode.MAGIC + struct.pack("<I", len(head)) + head + buffers


def survives(data: bytes) -> None:
    try:
        codec.decode_reply(data)
    except ToolFailed:
        pass


TAGS = sorted(reply._READERS)
NODE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<i8", "|O", "|b1", "<U2", "V8", "M8[ns]", "2020-01-01", "Europe/Berlin", "dataclass", "range"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(st.sampled_from(TAGS), st.lists(inner, max_size=5)).map(lambda pair: [pair[0], *pair[1]])
        | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=15,
)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode_reply(data)


@given(st.sampled_from(["json", "tree", "error"]), NODE, st.binary(max_size=64))
@settings(max_examples=600, deadline=60_000)
@pytest.mark.filterwarnings("ignore")  # pandas warns about odd input; a warning is not a failure here
def test_random_trees_give_a_value_or_a_codec_error(key: str, node: Any, buffers: bytes) -> None:
    survives(container({key: node}, buffers))


SAMPLES = [
    encode.encode_value({"a": [1, 2.5, None, "x"]}),
    encode.encode_value([(1, {2, 3}), b"bytes", np.arange(4), np.float32(1), 2**80, "\ud800"]),
    encode.encode_error(ValueError("x"), "call"),
]


@given(st.sampled_from(SAMPLES), st.data())
@settings(max_examples=600, deadline=60_000)
@pytest.mark.filterwarnings("ignore")
def test_damaged_containers_give_a_value_or_a_codec_error(sample: bytes, data: Any) -> None:
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    survives(bytes(damaged))
    survives(bytes(damaged[:cut]))
    survives(bytes(damaged) + bytes(damaged[cut:]))


def test_a_pickle_is_not_read() -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled",)

    with pytest.raises(CodecError):
        codec.decode_reply(pickle.dumps(Bomb()))
    with pytest.raises(CodecError):
        codec.decode_reply(container({"tree": ["array", "|O", [1], 8]}, pickle.dumps(Bomb())[:8]))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"json":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"json":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"json":' + b"1" * 5_000_000 + b"}",
        b'{"json":"' + b'\\"' * 5_000_000,
        b'{"json":[' + b"[]," * 3_000_000 + b"0]}",
        b'{"json":[' + b"1," * 5_000_000 + b"0]}",
        b'{"json":1e' + b"9" * 30 + b"}",
        b'\xef\xbb\xbf{"json":1}',
        b'{"json":"\xff"}',
        b'{"json":1,"tree":1}',
        b"null",
        b"",
    ],
    ids=lambda header: header[:14].decode("latin1") + f"~{len(header)}",
)
def test_expensive_headers_are_refused_before_they_cost(header: bytes) -> None:
    data = container(header)
    start = time.process_time()
    try:
        codec.decode_reply(data)
    except CodecError:
        pass
    else:
        assert len(header) < 60
    assert time.process_time() - start < 5


def test_a_deep_header_cannot_crash_a_caller_without_a_recursion_limit() -> None:
    script = (
        "import sys; sys.setrecursionlimit(10**8)\n"
        "from sandbox import codec\n"
        "data = sys.stdin.buffer.read()\n"
        "try:\n    codec.decode_reply(data)\n"
        "except codec.CodecError: print('refused')\n"
    )
    data = container(b'{"tree":' + b'["list",' * 1_000_000 + b"1" + b"]" * 1_000_000 + b"}")
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, b"refused\n"), done.stderr


def tree(node: Any, buffers: bytes = b"") -> bytes:
    return container({"tree": node}, buffers)


@pytest.mark.parametrize(
    "data",
    [
        tree(["bytes", 9], b"12345678"),
        tree(["bytes", -1], b"12345678"),
        tree(["bytes", 4], b"12345678"),
        tree(["bytes", True], b"1"),
        tree(["bytes", "4"], b"1234"),
        tree(["list", *[["bytes", 8]] * 2], b"12345678"),
        tree(["array", "<i8", [2**62, 4], 0]),
        tree(["array", "<i8", [-1, -1], 8], bytes(8)),
        tree(["array", "<i8", [2], 8], bytes(8)),
        tree(["array", "<i8", [1] * 64, 8], bytes(8)),
        tree(["array", "<i8", ["1"], 8], bytes(8)),
        tree(["array", "|O", [1], 8], bytes(8)),
        tree(["array", "V8", [1], 8], bytes(8)),
        tree(["array", "i8,O", [1], 16], bytes(16)),
        tree(["array", [["a", "O"]], [1], 8], bytes(8)),
        tree(["array", "<U9999999", [0], 0]),
        tree(["array", "<U0", [2**40], 0]),
        tree(["array", "<U1", [1], 4], struct.pack("<I", 0x7FFFFFFF)),
        tree(["array", "<f3", [1], 3], bytes(3)),
        tree(["set", ["list"]]),
        tree(["set", *range(100_001)]),
        tree(["dict", 1]),
        tree(["dict", ["list"], 1]),
        tree(["datetime", "2020-01-01", 0, "../../../etc/passwd"]),
        tree(["datetime", "2020-01-01", 0, "tzdata"]),
        tree(["datetime", "2020-01-01", 7]),
        tree(["timedelta", 10**12, 0, 0]),
        tree(["decimal", "1_0"]),
        tree(["decimal", "9" * 1_000_000]),
        tree(["uuid", "x"]),
        tree(["path", ["list"]]),
        tree(["object", "exec", "os.system", "a", 1]),
        tree(["object", "dataclass", "A", 1, 1]),
        tree(["frame", ["range", 0, 1, 1, None], ["range", 0, 2, 1, None], 2, ["", ["bytes", 2]]], b"ab"),
        tree(["frame", ["range", 0, 9, 1, None], ["range", 0, 2, 1, None], 2, ["str", ["list", "a", "b"]]]),
        tree(["nonsense"]),
        tree([]),
        tree([["list"]]),
        tree({"a": 1}),
        container({"error": 1}),
        container({"error": []}),
        container({"json": 1}, b"left over"),
        container({"value": 1}),
        b"",
    ],
)
def test_impossible_contents_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        codec.decode_reply(data)


def test_the_twins_of_the_impossible_contents_are_read() -> None:
    assert codec.decode_reply(tree(["bytes", 8], b"12345678")) == b"12345678"
    assert codec.decode_reply(tree(["array", "<i8", [1], 8], bytes(8))).tolist() == [0]
    assert codec.decode_reply(tree(["set", *range(100_000)])) == set(range(100_000))
    assert codec.decode_reply(tree(["datetime", "2020-01-01", 0, "Europe/Berlin"])).tzname() == "CET"


def test_a_header_that_claims_more_than_there_is_allocates_nothing() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CodecError):
            codec.decode_reply(encode.MAGIC + struct.pack("<I", 0xFFFFFFFF) + b"{}")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_a_reply_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(CodecError, match="the limit is"):
        codec.decode_reply(bytes(64 * 2**20 + 1))


@pytest.mark.parametrize(
    "keys",
    [
        [["tuple", *(-1 - (n >> bit & 1) for bit in range(14))] for n in range(2**14)],
        [["tuple", *(float(2 ** (61 * (n >> 2 * bit & 3))) for bit in range(7))] for n in range(2**14)],
    ],
    ids=["-1 and -2", "powers of 2**61"],
)
def test_keys_of_one_hash_are_refused(keys: list[Any]) -> None:
    for header in (["set", *keys], ["dict", *(part for key in keys for part in (key, 0))]):
        start = time.process_time()
        with pytest.raises(CodecError, match="one hash"):
            codec.decode_reply(tree(header))
        assert time.process_time() - start < 3


def test_a_bool_array_holds_only_bools() -> None:
    array = codec.decode_reply(tree(["array", "|b1", [3], 3], b"\x00\x01\x07"))
    assert array.view("u1").tolist() == [0, 1, 1]


def test_parts_of_an_error_that_are_no_text_are_left_out() -> None:
    with pytest.raises(ToolFailed) as failed:
        codec.decode_reply(container({"error": {"type_name": 5, "message": ["x"], "traceback": None, "phase": {}}}))
    assert (failed.value.type_name, failed.value.traceback_text) == ("Exception", "")


def test_an_errors_parts_are_bounded() -> None:
    parts = {"type_name": "t" * 10**6, "message": "m" * 10**6, "traceback": "b" * 10**6, "missing": "x" * 10**6}
    with pytest.raises(ToolFailed) as failed:
        codec.decode_reply(container({"error": parts}))
    assert len(str(failed.value)) + len(failed.value.traceback_text) < 60_000


def test_text_from_the_jail_gives_no_orders_to_a_terminal() -> None:
    evil = "\x1b]0;title\x07\x1b[2J\u202e\x9b\r\x08\ud800"
    parts = {"type_name": f"Bad\n{evil}", "message": f"line\n{evil}", "traceback": evil, "missing": f"mod\n{evil}"}
    with pytest.raises(ToolFailed) as failed:
        codec.decode_reply(container({"error": parts}))
    texts = [str(failed.value), failed.value.traceback_text, failed.value.type_name]
    with pytest.raises(ToolFailed) as failed:
        codec.decode_reply(container({"tree": ["object", "dataclass", evil, "a", 1]}), int)
    for text in [*texts, str(failed.value)]:
        assert all(c.isprintable() or c == "\n" for c in text)
        assert "\\x1b" in text
    assert "\n" not in texts[2]


def test_memory_stays_bounded_by_the_reply() -> None:
    """The costliest shapes known, each near a limit, in a process whose memory is limited."""
    script = (
        "import sys\n"
        "from sandbox import codec\n"
        "for line in sys.stdin.buffer.read().split(b'====='):\n"
        "    try:\n        codec.decode_reply(line)\n"
        "    except codec.CodecError: pass\n"
        "print('alive')\n"
    )
    shapes = [
        container(b'{"json":[' + b'{"a":1},' * 900_000 + b"0]}"),
        container(b'{"tree":["list",' + b'["set",1],' * 600_000 + b"0]}"),
        container(b'{"tree":["list",' + b'["list"],' * 900_000 + b"0]}"),
    ]
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=b"=====".join(shapes),
        capture_output=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.stdout == b"alive\n", done.stderr
