"""The supervisor's event loop: asyncio's, which watches our descriptors with next to no work for each.

A call has seven descriptors that are watched for a few milliseconds. asyncio makes objects for each and looks it up in
four tables, some forty function calls from the first to the last; here it is one entry and epoll_ctl(2), twice.
Source: epoll(7). What asyncio watches for itself, and what waits to be written to, goes asyncio's own way.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable

TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any, TypeVarTuple

    from _typeshed import FileDescriptorLike

    Args = TypeVarTuple("Args")


class Loop(asyncio.SelectorEventLoop):
    """As its parent, but for `add_reader` and `remove_reader` of a descriptor's number."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: dict[int, tuple[Callable[..., Any], tuple[Any, ...]]] = {}
        # Readable when anything in it is: so it is one descriptor of asyncio's, registered once.
        self._epoll = select.epoll()
        super().add_reader(self._epoll.fileno(), self._call_readers)

    def add_reader(self, fd: FileDescriptorLike, callback: Callable[[*Args], object], *args: *Args) -> None:
        """Call `callback(*args)` whenever `fd` is readable or at its end. Raises OSError when it cannot be watched."""
        if not isinstance(fd, int):
            super().add_reader(fd, callback, *args)
            return
        try:
            if fd in self._watched:
                self._epoll.modify(fd, select.EPOLLIN)
            else:
                self._epoll.register(fd, select.EPOLLIN)
        except FileNotFoundError:
            # What had this number was closed while it was watched.
            self._epoll.register(fd, select.EPOLLIN)
        self._watched[fd] = (callback, args)

    def remove_reader(self, fd: FileDescriptorLike) -> bool:
        """Whether it was watched. After this it is not called again, also where that is already due."""
        if not isinstance(fd, int):
            return super().remove_reader(fd)
        if self._watched.pop(fd, None) is None:
            return False
        with contextlib.suppress(OSError):
            # ENOENT, EBADF: it was closed before, which ends the watch as well.
            self._epoll.unregister(fd)
        return True

    def _call_readers(self) -> None:
        # What one callback does may end the watch of another, whose number may then be a new descriptor's.
        due = [(fd, self._watched.get(fd)) for fd, _ in self._epoll.poll(0)]
        for fd, watch in due:
            if watch is None or self._watched.get(fd) is not watch:
                continue
            callback, args = watch
            try:
                callback(*args)
            except Exception as error:  # noqa: BLE001 - told as asyncio tells it, and the others get their turn
                self.call_exception_handler({"message": f"reader of descriptor {fd}", "exception": error})

    def close(self) -> None:
        if not self.is_closed():
            super().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._watched.clear()
        super().close()
