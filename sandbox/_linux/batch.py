"""System calls made ready beforehand, then made one after the other with next to nothing between them.

A process forked from a large one pays for every object that it touches: in Python looking at an object writes to it
(its reference count), and the first write to a page copies the page. Code that works out and makes a hundred calls
costs hundreds of such copies, running through a list of ready arguments a few dozen. No policy.
Source: syscall(2), fork(2) on copy-on-write.
"""

from __future__ import annotations

import ctypes
import os

from sandbox._linux import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Action = Callable[[], object]
    Number = int | ctypes.c_long

# Of the system call's number and its arguments: mount(2) takes five.
_ARGUMENTS = 6
# PyDLL: letting go of the GIL and taking it again would touch more pages, and nobody else is there to have it.
_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (ctypes.c_long,) * _ARGUMENTS
# labs(3): takes the same arguments to no effect.
_idle = _libc.labs
_idle.restype = ctypes.c_long
_idle.argtypes = _syscall.argtypes


def slot(value: int = -1) -> ctypes.c_long:
    """A number that is known only when the calls are made."""
    return ctypes.c_long(value)


class Buffer:
    """Bytes at one place. `data` is what is there at first."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._memory = ctypes.create_string_buffer(data)

    @property
    def address(self) -> int:
        return ctypes.addressof(self._memory)

    def get(self, size: int) -> bytes:
        """The first `size` bytes."""
        return ctypes.string_at(self._memory, size)

    def put(self, data: bytes) -> None:
        """Precondition: no longer than it is."""
        ctypes.memmove(self._memory, data, len(data))


class Batch:
    """Calls in their order. `run` makes them; the first that fails ends it.

    Arguments are numbers, or ctypes integers whose value at the time of the call counts: with these a call uses what
    an earlier one returned.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any, Any, str]] = []
        self._kept: list[object] = []

    def __repr__(self) -> str:
        return f"<Batch of {len(self._calls)}>"

    def add(
        self,
        name: str,
        number: int,
        *args: Number,
        into: ctypes.c_long | ctypes.c_int | None = None,
        instead: Mapping[int, Action | None] | None = None,
    ) -> None:
        """One call. Its result goes `into`; `instead` of failing with one of these errno that action is taken."""
        padded = (number, *args, *(0,) * (_ARGUMENTS - 1 - len(args)))
        self._calls.append((padded, into, instead, name))

    def then(self, action: Action) -> None:
        """What takes Python."""
        self._calls.append((None, action, None, ""))

    def address(self, data: bytes | ctypes.Structure) -> int:
        """Where `data` (with a NUL behind it if it is bytes) stays while this batch does."""
        buffer = ctypes.create_string_buffer(data) if isinstance(data, bytes) else data
        self._kept.append(buffer)
        return ctypes.addressof(buffer)

    def run(self) -> None:
        """Raises OSError whose text names the call that failed."""
        for args, into, instead, name in self._calls:
            if args is None:
                into()
                continue
            result = _syscall(*args)
            if into is not None:
                into.value = result
            if result == -1:
                code = ctypes.get_errno()
                if instead is None or code not in instead:
                    raise OSError(code, f"{name}: {os.strerror(code)}")
                action = instead[code]
                if action is not None:
                    action()

    def rehearse(self) -> None:
        """Touch what `run` touches and make none of the calls. Afterwards what goes `into` somewhere is wrong there."""
        for args, into, _, _ in self._calls:
            if args is None:
                continue
            result = _idle(*args)
            if into is not None:
                into.value = result

    # -- calls that several steps make ----------------------------------------------------------------------------

    def mount(
        self, source: str, target: str, fstype: str, flags: int, options: str = "", *, missing: tuple[int, ...] = ()
    ) -> None:
        """mount(2). `missing`: errno that mean that the place is not there, which is no failure."""
        texts = [self.address(os.fsencode(text)) for text in (source, target, fstype, options)]
        instead = dict.fromkeys(missing)
        self.add(f"mount {target}", syscalls.number("mount"), *texts[:3], flags, texts[3], instead=instead or None)

    def unmount(self, target: str, flags: int) -> None:
        self.add(f"umount2 {target}", syscalls.number("umount2"), self.address(os.fsencode(target)), flags)

    def open(
        self,
        path: str,
        flags: int,
        *,
        into: ctypes.c_long | ctypes.c_int,
        at: Number = syscalls.AT_FDCWD,
        instead: Mapping[int, Action | None] | None = None,
    ) -> None:
        """openat(2), close-on-exec."""
        address = self.address(os.fsencode(path))
        flags |= os.O_CLOEXEC
        self.add(f"open {path}", syscalls.number("openat"), at, address, flags, 0, into=into, instead=instead)

    def write(
        self,
        path: str,
        data: bytes | Buffer,
        *,
        at: Number = syscalls.AT_FDCWD,
        optional: bool = False,
    ) -> None:
        """Write a control file and leave it open until `close_fds`. `optional`: it need not be there (ENOENT)."""
        fd = slot()
        self.open(path, os.O_WRONLY, into=fd, at=at, instead={2: None} if optional else None)
        # Without the file the descriptor is -1, and the write says EBADF.
        instead = {9: None} if optional else None
        address, size = (data.address, data.size) if isinstance(data, Buffer) else (self.address(data), len(data))
        self.add(f"write {path}", syscalls.number("write"), fd, address, size, instead=instead)

    def prctl(self, name: str, option: int, first: int = 0, second: int = 0) -> None:
        self.add(f"prctl {name}", syscalls.number("prctl"), option, first, second)
