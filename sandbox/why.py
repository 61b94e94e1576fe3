"""Would a profile permit this, by which rule, written where? Pure: no name is looked up, no packet sent, nothing run.

Answers by the same rules that the planner and the gateway go by. What only shows when it happens is said as a note:
the addresses of a name, permissions of files, budgets.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from sandbox import prepare
from sandbox.destinations import TLS_PORT, normal_name
from sandbox.egress.explain import sentence
from sandbox.egress.rules import Rules, Verdict
from sandbox.errors import ManifestError
from sandbox.grants import denied_by, path_within
from sandbox.http_rules import METHOD, NEVER_METHODS, Group, HttpRules
from sandbox.planner import COPIED_FILES, DEVICE_NODES, ETC_PATHS, PRIVATE_PLACES, SYSTEM_DIRECTORIES
from sandbox.profiles import Resolved
from sandbox.workspace.protected import is_protected

PORTS = {"http": 80, "https": TLS_PORT}
# Written for the jail, whatever the host's say.
OWN_FILES = tuple(
    f"/etc/{name}"
    for name in ("passwd", "group", "hosts", "hostname", "nsswitch.conf", "resolv.conf", "shells", "machine-id")
)


@dataclass(frozen=True, slots=True)
class Answer:
    """`rule` decided, as the manifest has it; `origin` is where it was written, empty for what nobody wrote."""

    question: str
    allowed: bool
    reason: str
    rule: str = ""
    origin: str = ""
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Judge:
    """Answers for one resolved profile."""

    def __init__(self, resolved: Resolved) -> None:
        self._resolved = resolved
        self._manifest = resolved.manifest
        self._rules = Rules(self._manifest.network.allow, self._manifest.network.deny)
        self._http = HttpRules(self._manifest.network.http)

    # -- network -------------------------------------------------------------------------------------------------

    def connect(self, destination: str) -> Answer:
        """`host:port`; without a port, 443. Raises ManifestError for what is no destination."""
        host, port = _destination(destination)
        question = f"connect {_authority(host, port)}"
        verdict = self._connection(host, port)
        if not verdict.allowed:
            return self._network(question, verdict, host)
        notes = ["" if _is_address(host) else "each address that the name has is judged, too, when it is connected to"]
        if verdict.protocol == "tls":
            notes.append("TLS only, for that very name")
        if group := self._http.group(host):
            notes.append(f"requests are judged: {'; '.join(str(rule) for rule in (*group.allow, *group.deny))}")
            notes.append("TLS is looked into" if group.inspects else "TLS is refused, since nobody looks into it")
        return self._network(question, verdict, host, notes)

    def request(self, method: str, url: str) -> Answer:
        """An HTTP request. Raises ManifestError for what is no URL."""
        parts = urlsplit(url)
        if parts.scheme not in PORTS or not parts.hostname or parts.username is not None:
            raise ManifestError(f"{url!r} is not a URL such as https://api.example.org/path", where="--http")
        host, port = _destination(f"{parts.netloc if parts.port else f'{parts.netloc}:{PORTS[parts.scheme]}'}")
        question = f"{method} {url}"
        verdict = self._connection(host, port)
        tls = parts.scheme == "https"
        if verdict.allowed and verdict.protocol == "tls" and not tls:
            verdict = verdict._replace(allowed=False, reason="not_tls", detail="plain HTTP")
        group = self._http.group(host)
        if not verdict.allowed or group is None:
            notes = ["no HTTP rule names this host: whatever is sent to it passes"] if verdict.allowed else []
            return self._network(question, verdict, host, notes)
        return self._judged(question, (method, parts.path or "/"), group, host, tls=tls)

    def _judged(self, question: str, request: tuple[str, str], group: Group, host: str, *, tls: bool) -> Answer:
        method, path = request
        found = group.judge(method, path, tls=tls)
        if method.upper() in NEVER_METHODS:
            never = " and ".join(sorted(NEVER_METHODS))
            found = found._replace(allowed=False, reason=METHOD, detail=f"anything but {never}")
        secrets = {name: entry for name, entry in self._manifest.secrets.entries.items() if entry.host == host}
        if found.allowed and not tls and any(not entry.plain for entry in secrets.values()):
            found = found._replace(allowed=False, reason="secret_needs_tls")
        notes = [f"the gateway sets {entry.header} from the secret {name}" for name, entry in secrets.items()]
        rule = found.rule or str((group.allow or group.deny)[0])
        reason = "permitted" if found.allowed else sentence(found.reason, detail=found.detail, rule=rule, host=host)
        return Answer(question, found.allowed, reason, rule, self._entry("network.http", rule), tuple(notes))

    def _connection(self, host: str, port: int) -> Verdict:
        if self._manifest.network.mode == "none":
            return Verdict(False, "", "no_network")
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return self._rules.judge_name(host, port)
        mapped = getattr(address, "ipv4_mapped", None)
        return self._rules.judge_address(mapped or address, port)

    def _network(self, question: str, verdict: Verdict, host: str, notes: Iterable[str] = ()) -> Answer:
        kept = tuple(filter(None, notes))
        if verdict.reason == "no_network":
            where = self._origin("network.mode")
            return Answer(question, False, "there is no network at all", "network.mode = none", where, kept)
        if verdict.allowed:
            return Answer(question, True, "permitted", verdict.rule, self._entry("network.allow", verdict.rule), kept)
        reason = sentence(verdict.reason, detail=verdict.detail, rule=verdict.rule, host=host)
        key = "network.deny" if verdict.reason == "denied_by_rule" else "network.allow"
        where = self._entry(key, verdict.rule) if verdict.rule else ""
        return Answer(question, False, reason, verdict.rule, where, kept)

    # -- files ---------------------------------------------------------------------------------------------------

    def read(self, path: str) -> Answer:
        """May the call read what is at `path`?"""
        real = os.path.realpath(path)
        question = f"read {real}"
        if denied := self._denied(question, real):
            return denied
        fs = self._manifest.filesystem
        for key, trees in (("filesystem.read", fs.read), ("filesystem.write", fs.write)):
            if tree := _longest(real, trees):
                return self._granted(question, key, tree)
        if fs.workspace and path_within(real, fs.workspace):
            return self._workspace(question, f"the workspace, {fs.workspace_mode}")
        if place := _longest(real, (*PRIVATE_PLACES, *(() if fs.workspace else ("/workspace",)))):
            if os.path.lexists(real):
                return Answer(question, False, f"what the host has in {place} is not seen inside", ":tmp")
            return Answer(question, True, "permitted: the call's own, and empty at first", ":tmp", "", (f"in {place}",))
        if tree := _longest(real, _shown()):
            return Answer(question, True, "permitted: part of what every jail sees", ":minimal", "", (f"in {tree}",))
        if real in OWN_FILES:
            return Answer(question, True, "permitted: inside it is a file of the jail's own, not this one", ":minimal")
        return Answer(question, False, "no grant names it: it does not exist inside")

    def write(self, path: str) -> Answer:
        """May the call write at `path`?"""
        real = os.path.realpath(path)
        question = f"write {real}"
        if denied := self._denied(question, real):
            return denied
        fs = self._manifest.filesystem
        granted, read = _longest(real, fs.write), _longest(real, fs.read)
        if fs.workspace and path_within(real, fs.workspace) and len(read) <= len(fs.workspace):
            return self._write_in_workspace(question, real)
        if granted and len(granted) >= len(read):
            return self._granted(question, "filesystem.write", granted)
        if not read and _longest(real, PRIVATE_PLACES):
            return Answer(question, True, "permitted: the call's own, gone after it", ":tmp")
        if not fs.workspace and path_within(real, "/workspace"):
            if ":workspace" in fs.write:
                return self._granted(question, "filesystem.write", ":workspace")
            return Answer(question, False, "filesystem.write does not name ':workspace'")
        answer = self.read(path)
        if answer.allowed:
            return Answer(question, False, "it is there for reading only", answer.rule, answer.origin)
        return Answer(question, False, answer.reason)

    def _write_in_workspace(self, question: str, real: str) -> Answer:
        fs = self._manifest.filesystem
        if fs.workspace_mode == "ro":
            where = self._origin("filesystem.workspace_mode")
            return Answer(question, False, "the workspace is read-only", "filesystem.workspace_mode = ro", where)
        relative = os.path.relpath(real, fs.workspace)
        if fs.workspace_mode == "rw" and (rule := is_protected(relative, fs.allow_protected)):
            reason = f"someone would run or trust it later ({rule}); filesystem.allow_protected can grant it"
            return Answer(question, False, reason, rule)
        kept = "kept apart until committed" if fs.workspace_mode == "cow" else "seen outside at once"
        return self._workspace(question, f"the workspace, {fs.workspace_mode}: {kept}")

    def execute(self, command: str) -> Answer:
        """May the call execute the program `command`, a name or a path?"""
        search = [*prepare.interpreter().search, "/usr/local/bin", "/usr/bin", "/bin"]
        found = command if "/" in command else next(
            (f"{directory}/{command}" for directory in search if os.access(f"{directory}/{command}", os.X_OK)), ""
        )  # fmt: skip
        question = f"execute {command}"
        if not found:
            return Answer(question, False, "no program of that name is in the jail's PATH")
        visible = self.read(found)
        if not visible.allowed or visible.rule == ":tmp":
            reason = "it is not there at first" if visible.allowed else visible.reason
            return Answer(question, False, f"{found}: {reason}", visible.rule, visible.origin)
        programs = self._manifest.process.allow_exec
        if programs is None:
            return Answer(question, True, "permitted: what is visible may be executed", visible.rule, visible.origin,
                          (found,))  # fmt: skip
        real = os.path.realpath(found)
        if tree := _longest(real, programs):
            return Answer(question, True, "permitted", tree, self._entry("process.allow_exec", tree), (found,))
        where = self._origin("process.allow_exec")
        return Answer(question, False, "process.allow_exec does not name it", "process.allow_exec", where)

    def _denied(self, question: str, real: str) -> Answer | None:
        pattern = denied_by(real, self._manifest.filesystem.deny)
        if pattern is None:
            return None
        where = self._entry("filesystem.deny", pattern)
        return Answer(question, False, "denied, wherever it is granted", pattern, where)

    def _granted(self, question: str, key: str, entry: str) -> Answer:
        return Answer(question, True, "permitted", entry, self._entry(key, entry))

    def _workspace(self, question: str, reason: str) -> Answer:
        where = self._origin("filesystem.workspace")
        return Answer(question, True, f"permitted: {reason}", self._manifest.filesystem.workspace, where)

    # -- where it is written -------------------------------------------------------------------------------------

    def _entry(self, key: str, entry: str) -> str:
        origin = self._resolved.origins.get(f"{key}[{entry}]")
        return str(origin) if origin else self._origin(key)

    def _origin(self, key: str) -> str:
        return str(self._resolved.origins.get(key, "default"))


def _destination(text: str) -> tuple[str, int]:
    """(name in normal form or address, port). Raises ManifestError."""
    host, colon, port = text.rpartition(":")
    if not colon or (":" in host and not host.startswith("[")):
        host, port = text, str(TLS_PORT)
    bare = host.strip("[]")
    try:
        if not port.isascii() or not 1 <= int(port) <= 65535:
            raise ValueError(port)
        return (str(ipaddress.ip_address(bare)) if _is_address(bare) else normal_name(bare)), int(port)
    except ValueError:
        message = f"{text!r} is not a destination such as api.example.org:443 or [2001:db8::1]:443"
        raise ManifestError(message, where="--connect") from None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _longest(path: str, trees: Iterable[str]) -> str:
    return max((tree for tree in trees if tree.startswith("/") and path_within(path, tree)), key=len, default="")


def _shown() -> list[str]:
    """What every jail shows of this host, read-only."""
    python = (real for real, _ in prepare.interpreter().paths)
    own = ("/proc", *(f"/dev/{name}" for name in DEVICE_NODES))
    return [*SYSTEM_DIRECTORIES, *ETC_PATHS, *COPIED_FILES, *python, *own]
