"""Who holds which unit: one locked file each, in a directory that all supervisors of this user share on the host.

The lock (flock) is the lease: it goes when its descriptor is closed, however the supervisor ends. The file's text says
who holds it, and what has to be put back when its holder died. A slice takes a shared lock on its GPU beside its own,
so that nobody gets the GPU as a whole meanwhile.
Not covered: supervisors of other users, and programs that use a GPU without us; the choice looks at those through NVML.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox.errors import LaunchError
from sandbox.gpu.facts import GpuUnit

_SAFE = re.compile(r"[^A-Za-z0-9-]")
_TEXT_MAX = 4096


class Lease:
    """One unit, held. `left`: what a holder that died left to be put back, as it had noted it."""

    def __init__(self, unit: GpuUnit, fds: list[int], left: Mapping[str, Any]) -> None:
        self.unit = unit
        self.left = left
        self._fds = fds
        self._text: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Lease {self.unit.index} {self.unit.uuid} held={bool(self._fds)}>"

    def note(self, **text: Any) -> None:
        """Say more about this lease in its file: names of ours only."""
        self._text.update(text)
        data = json.dumps(self._text).encode()[:_TEXT_MAX]
        os.ftruncate(self._fds[0], 0)
        os.pwrite(self._fds[0], data, 0)

    def release(self) -> None:
        """Give the unit back. Safe to call again."""
        if self._fds:
            os.ftruncate(self._fds[0], 0)
        self.abandon()

    def abandon(self) -> None:
        """Give it back as a holder that dies would: what was noted stays for the next one."""
        while self._fds:
            os.close(self._fds.pop())


class Leases:
    """The directory of lease files. One object may serve any number of threads."""

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = directory or default_directory()

    def __repr__(self) -> str:
        return f"<Leases {self.directory}>"

    def acquire(self, ordered: Sequence[GpuUnit], number: int, holder: Mapping[str, Any]) -> list[Lease]:
        """Lease the first `number` of these units that are free. All or none.

        Raises LaunchError (step `gpu_lease`) naming who holds the others.
        """
        found: list[Lease] = []
        busy: list[str] = []
        with self._choosing():
            for unit in ordered:
                if len(found) == number:
                    break
                lease = self._try(unit)
                if lease is None:
                    busy.append(f"GPU {unit.index} is leased by {_holder(self._read(unit))}")
                else:
                    found.append(lease)
            if len(found) < number:
                for lease in found:
                    lease.release()
                raise LaunchError(f"no GPU is free: {'; '.join(busy)}", step="gpu_lease")
            for lease in found:
                lease.note(**holder)
        return found

    def holders(self, units: Sequence[GpuUnit]) -> dict[str, dict[str, Any]]:
        """Unit -> what its holder said, for those that are leased now."""
        found = {}
        for unit in units:
            try:
                fd = os.open(self._path(unit.uuid), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                # Shared: it never stands in the way of another look, and `_try` repeats itself.
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found[unit.uuid] = self._read(unit)
            finally:
                os.close(fd)
        return found

    def _try(self, unit: GpuUnit) -> Lease | None:
        fds: list[int] = []
        try:
            fds.append(self._lock(unit.uuid, fcntl.LOCK_EX))
            if unit.parent:
                fds.append(self._lock(unit.parent, fcntl.LOCK_SH))
        except BlockingIOError:
            for fd in fds:
                os.close(fd)
            return None
        return Lease(unit, fds, _parsed(os.pread(fds[0], _TEXT_MAX, 0)))

    def _lock(self, uuid: str, kind: int) -> int:
        fd = os.open(self._path(uuid), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def _read(self, unit: GpuUnit) -> dict[str, Any]:
        try:
            return _parsed(self._path(unit.uuid).read_bytes()[:_TEXT_MAX])
        except OSError:
            return {}

    @contextlib.contextmanager
    def _choosing(self) -> Iterator[None]:
        """One chooser at a time on this host: of two that want several units each, none may keep half of them."""
        _make(self.directory)
        fd = os.open(self.directory / "choosing", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _path(self, uuid: str) -> Path:
        return self.directory / f"{_SAFE.sub('_', uuid)}.lease"


def default_directory() -> Path:
    """The same for all of this user's supervisors on the host, emptied at boot."""
    uid = os.geteuid()
    if uid == 0:
        return Path("/run/toolcall-sandbox/gpu")
    runtime = Path(f"/run/user/{uid}")
    return runtime / "toolcall-sandbox/gpu" if runtime.is_dir() else Path(f"/tmp/toolcall-sandbox-{uid}/gpu")  # noqa: S108


def _make(directory: Path) -> None:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = directory.lstat()
    # Below /tmp anybody could have made it first.
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
        raise LaunchError(f"{directory} is not a directory of ours alone", step="gpu_lease")


def _parsed(data: bytes) -> dict[str, Any]:
    """The note of a holder that may have died while it wrote."""
    try:
        parsed = json.loads(data or b"{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _holder(text: Mapping[str, Any]) -> str:
    if not text:
        return "someone"
    return f"call {text.get('call_id', '?')} of process {text.get('pid', '?')}"
