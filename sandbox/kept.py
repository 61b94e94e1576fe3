"""Plans that are kept on disk between commands, so that an equal question need not be decided anew. Loads little.

A kept plan lies under a name that is the digest of all that decides it (`ask`): the profile's name, the overrides, our
own code, the interpreter, the directories and variables by which profiles are found. What else must be as it was is
checked when it is found: every profile and ceiling that was read, byte by byte, and the host's facts (`Kept.fits`). The
caller's variables are not in it: they are looked up for each call. docs/decisions/0081-kept-plans.md says what is never
kept, and why nothing in a jail can write here.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping

from sandbox import __version__, prepare_places, profile_places
from sandbox.digests import sha256

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

# Raise it when the same question gets another form of answer.
FORMAT = 1
SIZE_MAX = 1 << 20
COUNT_MAX = 64
_SHA256_BYTES = 32
_SUFFIX = ".plan"
_PARTS: dict[str, type] = {
    **dict.fromkeys(("key", "facts", "policy_id", "plan_id", "durability", "cwd"), str),
    **dict.fromkeys(("policy", "plan", "call", "env", "set"), dict),
    **dict.fromkeys(("sources", "allow"), list),
}
# What a resolution reads of the environment, beside what its profiles name (then it is not kept).
_VARIABLES = ("HOME", "XDG_CONFIG_HOME", profile_places.CEILING_VARIABLE)
# Directories of the package with what decides a plan.
_DECIDING = ("", "host", "launchers", "audit")


class Question:
    """What somebody wants to run, apart from its arguments: `key` names all that the answer depends on."""

    __slots__ = ("_text", "key", "state")

    def __init__(self, state: str, text: str) -> None:
        self.state = state
        self._text = text
        self.key = _digest(text.encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Question) and (self.state, self._text) == (other.state, other._text)

    def __hash__(self) -> int:
        return hash(self.key)


class Kept:
    """An answer as it was found: the parts of a call that do not depend on its arguments."""

    __slots__ = ("_data",)

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def __getitem__(self, name: str) -> Any:
        return self._data[name]

    def fits(self, facts: bytes) -> bool:
        """Whether it was decided for a host with these facts."""
        return bool(self._data["facts"] == facts_digest(facts))

    def environment(self, source: Mapping[str, str]) -> dict[str, str]:
        """The call's, with the caller's variables as they are now."""
        allowed = prepare_places.allowed_variables(self._data["allow"], source)
        return {**self._data["env"], **allowed, **self._data["set"]}


def facts_digest(facts: bytes) -> str:
    """Of all facts but the supervisor's own group, whose name is another each time under systemd; no plan has it."""
    data = json.loads(facts)
    data.pop("cgroup_path", None)
    return _digest(json.dumps(data, sort_keys=True).encode())


def ask(profile: str, settings: Mapping[str, Any], state: str, *, tty: bool) -> Question | None:
    """The question, or None for one whose answer is never kept, or which only an error can answer."""
    # Values that are set may be secrets, and `~USER` is the password file's.
    if not state or "env_set" in settings or "workspace" in settings or profile.startswith("~"):
        return None
    try:
        seen = _look(os.getcwd(), is_cwd_part=bool(settings) or profile_places.is_path(profile))
    except OSError:
        return None
    if seen is None:
        return None
    seen |= {
        "profile": profile,
        "settings": settings,
        "state": [os.path.realpath(path) for path in (state, prepare_places.usual_state())],
        "terminal": prepare_places.terminal_size() if tty else None,
    }
    return Question(state, json.dumps(seen, sort_keys=True))


def _look(cwd: str, *, is_cwd_part: bool) -> dict[str, Any] | None:
    project = f"{cwd.rstrip('/')}/pyproject.toml"
    variable = os.environ.get(profile_places.CEILING_VARIABLE)
    files = {path: _file_digest(path) for path in (project, profile_places.SYSTEM_CEILING)}
    if variable:
        ceiling = os.path.abspath(os.path.expanduser(variable))
        files[ceiling] = _file_digest(ceiling)
    directories = {path: _names(path) for path, _ in profile_places.directories(cwd)}
    own = profile_places.directories(cwd)[0][0]
    # A project without profiles is like any other, so that one answer serves in all of them.
    if not is_cwd_part and files[project] is None and directories[own] is None:
        cwd = ""
        del files[project], directories[own]
    return {
        "format": FORMAT,
        "version": __version__,
        "python": [sys.version, sys.executable, os.geteuid()],
        "places": prepare_places.shown_prefixes(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "cwd": cwd,
        "files": files,
        "directories": directories,
        "code": _code(),
    }


def _code() -> list[tuple[str, int, int, int]]:
    """(path, size, time of change, inode) of every file of ours that decides: an edited one decides otherwise."""
    package = os.path.dirname(__file__)
    found = []
    for name in _DECIDING:
        with os.scandir(f"{package}/{name}" if name else package) as entries:
            for entry in entries:
                if entry.name.endswith(".py"):
                    facts = entry.stat()
                    found.append((entry.path, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return sorted(found)


def _names(directory: str) -> list[str] | None:
    try:
        return sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _file_digest(path: str) -> str | None:
    """Of the bytes of a regular file; None when there is none. Raises OSError for one that cannot be read so."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(f"{path} is not a regular file")
        data = _read_all(fd, profile_places.FILE_BYTES_MAX + 1)
    finally:
        os.close(fd)
    if len(data) > profile_places.FILE_BYTES_MAX:
        raise OSError(f"{path} is too large")
    return _digest(data)


def _digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"


def find(question: Question) -> Kept | None:
    """The answer that was kept; None when there is none that holds."""
    with _cache(question.state) as cache_fd:
        data = _read(cache_fd, f"{question.key[7:]}{_SUFFIX}") if cache_fd is not None else None
    if data is None or data["key"] != question.key:
        return None
    try:
        same = all(_file_digest(path) == digest for path, digest in data["sources"])
    except OSError:
        return None
    return Kept(data) if same else None


def keep(question: Question, answer: Mapping[str, Any]) -> None:
    """Keep an answer for `find`. Where that cannot be done nothing is lost: the next one is decided anew."""
    body = json.dumps({**answer, "key": question.key}).encode()
    if len(body) > SIZE_MAX - _SHA256_BYTES:
        return
    with contextlib.suppress(OSError):
        os.mkdir(f"{question.state}/cache", 0o700)
    with _cache(question.state) as cache_fd, contextlib.suppress(OSError):
        if cache_fd is not None:
            _make_room(cache_fd)
            _write(cache_fd, f"{question.key[7:]}{_SUFFIX}", sha256(body).digest() + body)


@contextlib.contextmanager
def _cache(state: str) -> Iterator[int | None]:
    """The directory of kept plans; None unless it and the state directory are ours and closed to others' writing."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    with contextlib.ExitStack() as stack:
        try:
            state_fd = os.open(state, flags)
            stack.callback(os.close, state_fd)
            cache_fd = os.open("cache", flags | os.O_NOFOLLOW, dir_fd=state_fd)
            stack.callback(os.close, cache_fd)
        except OSError:
            yield None
            return
        ours = _is_ours(os.fstat(state_fd), 0o022) and _is_ours(os.fstat(cache_fd), 0o077)
        yield cache_fd if ours else None


def _is_ours(facts: os.stat_result, closed: int) -> bool:
    return facts.st_uid == os.geteuid() and not facts.st_mode & closed


def _read(cache_fd: int, name: str) -> Any:
    """What was written under this name; None unless it is ours, whole, and nobody else's to write."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=cache_fd)
    except OSError:
        return None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 1 or not _is_ours(facts, 0o077):
            return None
        content = _read_all(fd, SIZE_MAX + 1)
    except OSError:
        return None
    finally:
        os.close(fd)
    expected, body = content[:_SHA256_BYTES], content[_SHA256_BYTES:]
    if len(content) > SIZE_MAX or sha256(body).digest() != expected:
        return None
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(data, dict) and all(isinstance(data.get(name), kind) for name, kind in _PARTS.items())
    return data if whole else None


def _read_all(fd: int, size_max: int) -> bytes:
    chunks = []
    while size_max > 0 and (chunk := os.read(fd, size_max)):
        chunks.append(chunk)
        size_max -= len(chunk)
    return b"".join(chunks)


def _write(cache_fd: int, name: str, content: bytes) -> None:
    temporary = f".{name}.{os.getpid()}.{os.urandom(4).hex()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=cache_fd)
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.replace(temporary, name, src_dir_fd=cache_fd, dst_dir_fd=cache_fd)
    except OSError:
        os.unlink(temporary, dir_fd=cache_fd)
        raise


def _make_room(cache_fd: int) -> None:
    """Take the oldest away, so that there are never more than `COUNT_MAX`."""
    names = [name for name in os.listdir(cache_fd) if name.endswith(_SUFFIX)]
    if len(names) < COUNT_MAX:
        return
    ages = sorted((os.stat(name, dir_fd=cache_fd, follow_symlinks=False).st_mtime_ns, name) for name in names)
    for _, name in ages[: len(names) - COUNT_MAX + 1]:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=cache_fd)
