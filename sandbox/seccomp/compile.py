"""A policy becomes the BPF program that the kernel runs: compiled by libseccomp, kept on disk by digest.

libseccomp builds one part per decision: part 0 is a binary tree over all call numbers, and a call whose arguments
matter ends there in a marker that names its own part. So each call has its own "else" answer, where a libseccomp
filter has one for everything. `link` makes one short program of them. Every program is then simulated against the
policy before anyone gets it: a bug in whatever libseccomp is installed cannot weaken a filter in silence.

Our own numbers go in as if they were this machine's: libseccomp would translate foreign ones by its table of names,
which ends years before ours. `link` writes the check of the architecture, so a filter for arm64 can be made anywhere.

Runs in the supervisor, never in a jail. A cache hit asks libseccomp for its version and does not load pyseccomp.
Source: seccomp(2), seccomp_init(3), seccomp_attr_set(3), seccomp_rule_add(3), seccomp_export_bpf(3).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sandbox._linux import seccomp as linux_seccomp
from sandbox._linux import seccomp_library
from sandbox.errors import InternalError, LauncherUnavailable
from sandbox.seccomp import bpf
from sandbox.seccomp import policy as policies
from sandbox.seccomp.link import Target, link
from sandbox.seccomp.numbers import AUDIT_ARCH, NUMBERS, X32_BIT

# Part of the cache key: raise it whenever the same policy compiles to other bytes.
COMPILER_VERSION = 1
_BINARY_TREE = 2  # SCMP_FLTATR_CTL_OPTIMIZE, libseccomp 2.5
_SHA256_BYTES = 32
_HIGH_GARBAGE = 0xDEAD_BEEF_0000_0000
_NO_LIBRARY = (
    "install libseccomp 2.5 or newer (Debian, Ubuntu: apt install libseccomp2; Fedora: dnf install libseccomp)"
)

_Rule = tuple[int, int, list[policies.Condition]]  # return value, call number, conditions


def program(spec: Mapping[str, Any], *, arch: str = "", cache_dir: Path | None = None) -> bytes:
    """The filter for a policy, or for its short form in a plan, as an array of `struct sock_filter`.

    `arch` is a `os.uname().machine`, this machine's by default. With `cache_dir` the result is looked up and
    stored there by digest. Raises LauncherUnavailable when the host lacks what compiling needs or has another
    architecture, ValueError for a policy that makes no sense.
    """
    arch = arch or os.uname().machine
    if arch not in NUMBERS:
        known = ", ".join(NUMBERS)
        raise LauncherUnavailable(
            f"no seccomp filter for architecture {arch!r}", step="seccomp", hint=f"known: {known}"
        )
    policy = policies.resolve(spec)
    if cache_dir is None:
        return compile_policy(policy, arch)
    path = cache_dir / f"{_cache_key(policy, arch)}.bpf"
    cached = _load(path)
    if cached is None:
        cached = compile_policy(policy, arch)
        _store(path, cached)
    return cached


def compile_policy(policy: Mapping[str, Any], arch: str) -> bytes:
    """Compile and verify, without the cache."""
    library = _library()
    queue: list[tuple[int, policies.Guard]] = []

    def answer(nr: int, then: str | policies.Guard, queued: int) -> int:
        """The return value for `then`: a guard becomes a part behind those already queued, shared when it is equal."""
        if isinstance(then, str):
            return bpf.return_value(then)
        if (nr, then) not in queue[queued:]:
            queue.append((nr, then))
        return bpf.marker(queue.index((nr, then), queued) + 1)

    def build(rules: Iterable[_Rule], otherwise: str) -> bytes:
        values = bpf.return_value(otherwise), bpf.return_value(policy["foreign_abi"])
        return _build(library, rules, *values)

    numbers = NUMBERS[arch]
    calls = ((numbers[name], then) for name, then in sorted(policy["calls"].items()) if name in numbers)
    parts = [build([(answer(nr, then, 0), nr, []) for nr, then in calls], policy["unknown"])]
    # The list grows while we walk it: a guard inside a guard queues a part of its own, behind this one.
    for at, (nr, guard) in enumerate(queue):
        rules = [(answer(nr, rule["then"], at + 1), nr, rule["when"]) for rule in guard["rules"]]
        parts.append(build(rules, guard["else"]))
    target = Target(
        compiled_for=library.system_arch(),
        arch=AUDIT_ARCH[arch],
        has_x32=arch == "x86_64",
        highest=max(numbers.values()),
        foreign=bpf.return_value(policy["foreign_abi"]),
        unknown=bpf.return_value(policy["unknown"]),
    )
    linked = link(parts, target)
    verify(linked, policy, arch)
    return linked


def _library() -> Any:
    """pyseccomp, which is untyped. Loading it runs `ldconfig`, so it waits until something is really compiled."""
    try:
        with seccomp_library.by_name():
            import pyseccomp
    except ImportError as error:
        raise LauncherUnavailable(
            "cannot compile a seccomp filter: pyseccomp is missing", step="seccomp", hint="pip install pyseccomp"
        ) from error
    except (RuntimeError, OSError, AttributeError) as error:
        raise LauncherUnavailable(
            f"cannot compile a seccomp filter: {error}", step="seccomp", hint=_NO_LIBRARY
        ) from error
    return pyseccomp


def _build(library: Any, rules: Iterable[_Rule], otherwise: int, foreign: int) -> bytes:
    try:
        filter_ = library.SyscallFilter(otherwise)
        filter_.set_attr(library.Attr.ACT_BADARCH, foreign)
        filter_.set_attr(library.Attr.CTL_OPTIMIZE, _BINARY_TREE)
        for value, nr, when in rules:
            # libseccomp refuses a rule that says what the default says.
            if value != otherwise:
                conditions = [library.Arg(c["arg"], library.MASKED_EQ, c["mask"], c["value"]) for c in when]
                filter_.add_rule_exactly(value, nr, *conditions)
        with open(os.memfd_create("seccomp", os.MFD_CLOEXEC), "w+b") as file:
            filter_.export_bpf(file)
            file.seek(0)
            return file.read()
    except OSError as error:
        raise LauncherUnavailable(
            f"libseccomp cannot build the filter: {error}", step="seccomp", errno=error.errno, hint=_NO_LIBRARY
        ) from error


def verify(compiled: bytes, policy: Mapping[str, Any], arch: str) -> None:
    """Compare a program with its policy: every number, foreign ABIs, and each guard around its own boundaries.

    Raises InternalError at the first difference.
    """
    code = bpf.decode(compiled)
    token = AUDIT_ARCH[arch]
    names = {nr: name for name, nr in NUMBERS[arch].items()}
    unknown = [nr for nr in range(max(names) + 64) if nr not in names]
    for nr in (*names, *unknown, 0xFFFF_FFFF):
        for args in _samples(policy["calls"].get(names.get(nr, ""), "")):
            expected = policies.evaluate(policy, names.get(nr, ""), args)
            _compare(code, token, nr, args, expected)
    foreign = [(other, nr) for other in (*AUDIT_ARCH.values(), 0x4000_0003, 0) if other != token for nr in names]
    if arch == "x86_64":
        foreign += [(token, X32_BIT | nr) for nr in range(600)]
    for other, nr in foreign:
        _compare(code, other, nr, (), policy["foreign_abi"])


def _compare(code: Sequence[bpf.Instruction], token: int, nr: int, args: Sequence[int], expected: str) -> None:
    found = bpf.simulate(code, token, nr, args).action
    if found != bpf.action_name(bpf.return_value(expected)):
        shown = ", ".join(f"{arg:#x}" for arg in args)
        raise InternalError(
            f"seccomp filter says {found} to call {nr}({shown}) of {token:#x}, the policy says {expected}",
            hint=f"please report this with the version of libseccomp ({_library_version()})",
        )


def _samples(then: str | policies.Guard) -> Iterator[tuple[int, ...]]:
    """Arguments worth trying: the values a guard names, their neighbours by one bit, and all with a dirty top half."""
    if isinstance(then, str):
        yield (0,) * 6
        yield (0xFFFF_FFFF_FFFF_FFFF,) * 6
        return
    values: dict[int, set[int]] = {}
    for condition in _conditions(then):
        mask, value = condition["mask"], condition["value"]
        found = values.setdefault(condition["arg"], {0, 0xFFFF_FFFF})
        found |= {value, value ^ (mask & -mask), value ^ (1 << (mask.bit_length() - 1)), value | (~mask & 0xFFFF_FFFF)}
    for picked in itertools.product(*values.values()):
        args = [0] * 6
        for arg, value in zip(values, picked, strict=True):
            args[arg] = value
        yield tuple(args)
        yield tuple(arg | _HIGH_GARBAGE for arg in args)


def _conditions(guard: policies.Guard) -> Iterator[policies.Condition]:
    for rule in guard["rules"]:
        yield from rule["when"]
        if not isinstance(rule["then"], str):
            yield from _conditions(rule["then"])


def _library_version() -> str:
    try:
        return linux_seccomp.libseccomp_version()
    except OSError as error:
        raise LauncherUnavailable(
            f"cannot compile a seccomp filter: {error}", step="seccomp", hint=_NO_LIBRARY
        ) from error


def _cache_key(policy: Mapping[str, Any], arch: str) -> str:
    parts = [COMPILER_VERSION, policy["digest"], arch, _library_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _load(path: Path) -> bytes | None:
    """A stored program, or None when there is none that can be trusted to be what was stored.

    The file is its own SHA-256 and the program. It must be ours and closed to others' writing: the sum recognises
    damage, not malice.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None  # not there, or a link: compiled afresh and replaced
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            return None
        content = file.read(_SHA256_BYTES + bpf.MAX_INSTRUCTIONS * bpf.INSTRUCTION_BYTES + 1)
    expected, stored = content[:_SHA256_BYTES], content[_SHA256_BYTES:]
    if hashlib.sha256(stored).digest() != expected:
        return None
    return stored


def _store(path: Path, compiled: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(hashlib.sha256(compiled).digest() + compiled)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError:
        # The program in hand is right; without a cache (full disk, read-only home) the next start compiles again.
        return
