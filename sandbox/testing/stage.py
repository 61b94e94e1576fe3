"""Where checks are run: sandboxes of one launcher, a throw-away tree on the host, and what was found."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sandbox.errors import SandboxError, Unenforceable
from sandbox.outcome import Outcome
from sandbox.runtime import Sandbox

HELD: Final = "held"
BROKEN: Final = "broken"
REFUSED: Final = "refused"
NOT_TRIED: Final = "not tried"
# A wall that does not hold must not hurt the machine that tests it.
_BOUNDS: Final = {"memory": "128MiB", "pids": 32, "disk": "16MiB", "output": "1MiB"}
# What a host may lack without leaving the call uncontained.
_LIMITS: Final = {"memory", "pids", "cpus", "cpu_time", "io"}
# Emulated machines take many times as long for everything.
TIME_FACTOR: Final = float(os.environ.get("SANDBOX_TIME_FACTOR", "1"))


class NotTried(Exception):
    """This machine lacks what the check needs; says what."""


@dataclass(frozen=True)
class Check:
    """One promise. `section` is that of the design: promise, inside, egress, limits. `title` is the promise."""

    name: str
    section: str
    title: str
    run: Callable[[Stage], None]


@dataclass(frozen=True)
class Finding:
    """How one check ended: held, broken, refused (declared, and refused by name) or not tried."""

    check: Check
    verdict: str
    reason: str = ""


@dataclass
class Report:
    """All findings on one launcher."""

    launcher: str
    isolation: Mapping[str, Any]
    findings: list[Finding] = field(default_factory=list)
    # Limits that this host cannot hold for anybody: less of them was accepted, except where they were what was tried.
    short: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = {verdict: len(self.of(verdict)) for verdict in (HELD, REFUSED, BROKEN, NOT_TRIED)}
        return f"<Report {self.launcher} " + " ".join(f"{name}={count}" for name, count in counts.items()) + ">"

    def of(self, verdict: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.verdict == verdict]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken: every promise is held, or was refused by name."""
        return not self.of(BROKEN)

    def require(self) -> None:
        """Raises AssertionError naming every broken promise."""
        lines = [f"{finding.check.name}: {finding.reason}" for finding in self.of(BROKEN)]
        if lines:
            raise AssertionError(f"{self.launcher} breaks {len(lines)} promise(s):\n" + "\n".join(lines))


class Stage:
    """Runs probes under one launcher. `isolation` is that section of every manifest used here."""

    def __init__(self, isolation: Mapping[str, Any], state: Path) -> None:
        self.isolation = dict(isolation)
        self.state = state
        self.tried = ""
        self.short: tuple[str, ...] = ()
        # Not below /tmp: that is one of the tool's private places.
        base = "/var/lib" if os.access("/var/lib", os.W_OK) else str(Path.home())
        self.tree = Path(tempfile.mkdtemp(prefix="sandbox-check-", dir=base))
        os.chmod(self.tree, 0o755)  # noqa: S103 - the tool is somebody else

    def find_short(self) -> None:
        """See which limits this host cannot hold here: they are missing in every check, and on trial in their own."""
        try:
            self.run(["true"])
        except Unenforceable as error:
            self.short = tuple(sorted({*error.controls} & _LIMITS))
        except SandboxError:
            return  # every check will say why

    def box(self, **sections: Any) -> Sandbox:
        """A sandbox of this launcher. Sections are added to what every check has: bounds, and a private workspace."""
        isolation = {**self.isolation, **sections.pop("isolation", {})}
        # What may be less than full elsewhere must be full where it is what is being tried.
        accepted = {*isolation.get("best_effort", ()), *self.short} - {self.tried}
        isolation["best_effort"] = sorted(accepted)
        manifest: dict[str, Any] = {
            "resources": {**_BOUNDS, "wall_time": f"{60 * TIME_FACTOR}s", **sections.pop("resources", {})},
            "filesystem": {"write": [":workspace"], **sections.pop("filesystem", {})},
            "isolation": isolation,
            **sections,
        }
        return Sandbox(manifest, state=self.state)

    def run(self, argv: list[str], *, options: Mapping[str, Any] | None = None, **sections: Any) -> Outcome:
        with self.box(**sections) as box:
            return box.run(argv, **(options or {}))

    def python(self, code: str, *, options: Mapping[str, Any] | None = None, **sections: Any) -> Outcome:
        return self.run(["python3", "-I", "-c", code], options=options, **sections)

    def ask(self, code: str, *, options: Mapping[str, Any] | None = None, **sections: Any) -> Any:
        """What the code gives `answer(...)`. Raises AssertionError when it does not end well."""
        done = self.python(PRELUDE + code, options=options, **sections)
        assert done.ok, f"{done.ending.kind} {done.ending.message} {done.stderr.decode('utf-8', 'replace')[-400:]}"
        return json.loads(done.stdout)

    def file(self, name: str, text: str = "x") -> str:
        """A file on the host, readable by everyone."""
        path = self.tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    def directory(self, name: str) -> str:
        path = self.tree / name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def close(self) -> None:
        shutil.rmtree(self.tree, ignore_errors=True)


# `refusal(f, *args)`: the errno's name of what the kernel refused, or "" when it did not.
PRELUDE: Final = """
import errno, json, os, sys
def answer(value): print(json.dumps(value))
def refusal(what, *args):
    try: what(*args)
    except OSError as error: return errno.errorcode.get(error.errno or 0, repr(error))
    return ""
"""


class Listener:
    """A server on this host's own address that greets whoever connects, and counts."""

    def __init__(self) -> None:
        self.host = own_address()
        self._socket = socket.create_server((self.host, 0))
        self.port = int(self._socket.getsockname()[1])
        self.greeted = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer:
                self.greeted += 1
                peer.sendall(b"hello")

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


def own_address() -> str:
    """An address of this host that is not a loopback one. Raises NotTried without any."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            # Nothing is sent: the kernel only chooses the address that it would send from.
            sock.connect(("192.0.2.1", 9))
        except OSError as error:
            raise NotTried(f"this host has no address but loopback: {error}") from None
        return str(sock.getsockname()[0])


def judge(check: Check, stage: Stage) -> Finding:
    """Run one check and say how it ended. A limit's check has the name of the control."""
    stage.tried = check.name
    try:
        check.run(stage)
    except Unenforceable as error:
        return Finding(check, REFUSED, "; ".join(f"{name}: {why}" for name, why in error.controls.items()))
    except NotTried as error:
        return Finding(check, NOT_TRIED, str(error))
    except (AssertionError, SandboxError, OSError, ValueError, KeyError, AttributeError) as error:
        return Finding(check, BROKEN, f"{type(error).__name__}: {str(error)[:600]}")
    return Finding(check, HELD)
