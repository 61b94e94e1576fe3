"""Filters that were compiled when this package was made: those of the policy that plans name. Loads little.

Compiling one takes some 60 ms, most of it the comparison with the policy; the first call with a state directory would
wait for it. The files lie under the digest of their policy: another policy, and so an edited one, is compiled here. A
test compares each with its policy as `compile` does with its own. `scripts/ship-filters` makes them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from sandbox.digests import sha256
from sandbox.seccomp import policy as policies

TYPE_CHECKING = False

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

_DIRECTORY = os.path.join(os.path.dirname(__file__), "shipped")


def path(policy: Mapping[str, Any], arch: str) -> str:
    """Where the filter of this policy lies, if it was shipped. `arch` is a `os.uname().machine`."""
    return os.path.join(_DIRECTORY, f"{arch}-{policy['digest'].removeprefix('sha256:')}.bpf")


def program(spec: Mapping[str, Any], cache_dir: Path) -> bytes:
    """The filter for this machine, as `compile.program` gives it. Raises what that raises."""
    policy = policies.resolve(spec)
    found = _read(path(policy, os.uname().machine))
    if found is not None:
        return found
    from sandbox.seccomp import compile as compiler

    return compiler.program(policy, cache_dir=cache_dir)


def _read(name: str) -> bytes | None:
    """A shipped program: its SHA-256, and itself. None when there is none, or one that is damaged."""
    try:
        with open(name, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        return None
    return content[32:] if sha256(content[32:]).digest() == content[:32] else None
