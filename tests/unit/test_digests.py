"""Digests are SHA-256, whoever makes them, and OpenSSL is not loaded for a few."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import digests

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("left", [0, digests.OWN_BYTES_MAX])
@given(data=st.binary(max_size=4096))
def test_a_digest_is_what_hashlib_says(left: int, data: bytes) -> None:
    digests._left_bytes = left
    assert digests.sha256(data).hexdigest() == hashlib.sha256(data).hexdigest()
    assert digests.sha256(data).digest() == hashlib.sha256(data).digest()


@given(pieces=st.lists(st.binary(max_size=9000), max_size=6))
def test_pieces_give_the_digest_of_the_whole(pieces: list[bytes]) -> None:
    running = digests.Running()
    for at, piece in enumerate(pieces):
        assert running.hexdigest() == hashlib.sha256(b"".join(pieces[:at])).hexdigest()
        running.update(piece)
    assert running.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def loads_openssl(code: str) -> bool:
    start = f"import sys; sys.path.append({str(ROOT)!r}); from sandbox.digests import Running, sha256\n"
    end = "\nprint('_hashlib' in sys.modules)"
    argv = [sys.executable, "-I", "-S", "-c", start + code + end]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout == "True\n"


def test_openssl_is_loaded_for_whoever_goes_on() -> None:
    pytest.importorskip("_hashlib")
    assert not loads_openssl("for _ in range(30): sha256(b'x' * 2000)")
    assert loads_openssl("for _ in range(100): sha256(b'x' * 2000)")
    assert loads_openssl("sha256(bytes(1 << 20))")
    assert not loads_openssl("r = Running(); r.update(b'x' * 9000); r.hexdigest()")
    assert loads_openssl("r = Running(); r.update(b'x' * 9000); r.update(b'x' * 9000)")
