"""Our errors as a person reads them."""

from __future__ import annotations

import sys

from sandbox.errors import SandboxError


def complain(error: SandboxError) -> None:
    """One message on standard error: what, and what to do about it."""
    text = str(error)
    prefix, _, rest = text.partition(": ")
    if prefix.startswith("overrides "):
        from sandbox.cli.words import option_of

        text = f"{option_of(prefix.removeprefix('overrides ')) or prefix}: {rest}"
    print(f"sandbox: {text}", file=sys.stderr)
    record_id = getattr(error.record, "record_id", "")
    if record_id:
        print(f"sandbox: record {record_id}", file=sys.stderr)
