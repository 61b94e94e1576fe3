"""Run each tool call of an AI agent in its own single-use container, and keep a record of it.

The public names load on first use: `import sandbox` itself costs a few milliseconds, and the jail's own
processes import `sandbox._jail` and `sandbox._linux` through here without pulling in anything else.
"""

from __future__ import annotations

# Not from typing: the jail's processes come through here, and every page that they load is copied at each fork.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from sandbox.codec import CodecError
    from sandbox.context import CallContext, call_context
    from sandbox.errors import (
        AuditError,
        CallError,
        CallLost,
        CallTimeout,
        ChainBroken,
        Denied,
        InternalError,
        LaunchError,
        LauncherUnavailable,
        LimitExceeded,
        ManifestError,
        ProfileError,
        Revoked,
        SandboxError,
        ToolFailed,
        Unenforceable,
        WorkspaceError,
    )
    from sandbox.manifest import Manifest
    from sandbox.outcome import Outcome
    from sandbox.profiles import resolve
    from sandbox.runtime import Sandbox
    from sandbox.tool import sandboxed

__version__ = "0.1.0"

_HOMES = {
    "CallContext": "context",
    "CodecError": "codec",
    "Manifest": "manifest",
    "Outcome": "outcome",
    "Sandbox": "runtime",
    "call_context": "context",
    "resolve": "profiles",
    "sandboxed": "tool",
    **dict.fromkeys(
        (
            "AuditError",
            "CallError",
            "CallLost",
            "CallTimeout",
            "ChainBroken",
            "Denied",
            "InternalError",
            "LaunchError",
            "LauncherUnavailable",
            "LimitExceeded",
            "ManifestError",
            "ProfileError",
            "Revoked",
            "SandboxError",
            "ToolFailed",
            "Unenforceable",
            "WorkspaceError",
        ),
        "errors",
    ),
}

__all__ = [
    "AuditError",
    "CallContext",
    "CallError",
    "CallLost",
    "CallTimeout",
    "ChainBroken",
    "CodecError",
    "Denied",
    "InternalError",
    "LaunchError",
    "LauncherUnavailable",
    "LimitExceeded",
    "Manifest",
    "ManifestError",
    "Outcome",
    "ProfileError",
    "Revoked",
    "Sandbox",
    "SandboxError",
    "ToolFailed",
    "Unenforceable",
    "WorkspaceError",
    "__version__",
    "call_context",
    "resolve",
    "sandboxed",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sandbox' has no attribute {name!r}")
    # Not above: the jail's processes come through here, and it brings others along.
    from importlib import import_module

    value = getattr(import_module(f"sandbox.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
