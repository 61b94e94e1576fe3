"""Names looked up outside, by the host's own resolver, for connections that a rule allows.

Every answer is used for a few seconds only, and a connection dials an address of the very answer that was judged: a
name that changes between look and dial changes nothing. Lookups run in a few threads, since libc's resolver blocks;
one call may keep only some of them busy.
"""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from sandbox.egress.addresses import Address, parse_address

THREADS: Final = 16
TIMEOUT_S: Final = 10.0
KEEP_S: Final = 10.0
KEEP_FAILURE_S: Final = 2.0
CACHE_MAX: Final = 4096
ADDRESSES_MAX: Final = 16


class LookupFailed(Exception):
    """The name has no address, or nobody could say in time."""


class Resolver:
    """Looks names up, keeps answers for some seconds, and asks once however many wait."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="lookup")
        self._kept: dict[str, tuple[float, tuple[Address, ...] | str]] = {}
        self._running: dict[str, asyncio.Future[tuple[Address, ...]]] = {}

    def kept(self, name: str) -> tuple[Address, ...] | None:
        """The addresses of a name that was looked up just now, without waiting; None when it has to be looked up."""
        found = self._kept.get(name)
        if found is None or found[0] < time.monotonic() or isinstance(found[1], str):
            return None
        return found[1]

    async def lookup(self, name: str) -> tuple[Address, ...]:
        """Every address of `name`, in the order in which they should be tried. Raises LookupFailed."""
        found = self._kept.get(name)
        if found is not None and found[0] >= time.monotonic():
            if isinstance(found[1], str):
                raise LookupFailed(found[1])
            return found[1]
        running = self._running.get(name)
        if running is None:
            running = asyncio.get_running_loop().run_in_executor(self._threads, _getaddrinfo, name)
            self._running[name] = running
            running.add_done_callback(lambda done: self._keep(name, done))
        try:
            return await asyncio.wait_for(asyncio.shield(running), TIMEOUT_S)
        except TimeoutError:
            raise LookupFailed(f"no answer in {TIMEOUT_S:g} s") from None
        except OSError as error:
            raise LookupFailed(error.strerror or str(error)) from None

    def _keep(self, name: str, done: asyncio.Future[tuple[Address, ...]]) -> None:
        self._running.pop(name, None)
        if done.cancelled():
            return
        if len(self._kept) >= CACHE_MAX:
            self._kept.clear()
        error = done.exception()
        if error is None:
            self._kept[name] = (time.monotonic() + KEEP_S, done.result())
        elif isinstance(error, OSError):
            self._kept[name] = (time.monotonic() + KEEP_FAILURE_S, error.strerror or str(error))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _getaddrinfo(name: str) -> tuple[Address, ...]:
    """Raises OSError (socket.gaierror). The name is in normal form, so nothing of libc's address syntax applies."""
    answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    found: dict[Address, None] = {}
    for _, _, _, _, where in answers:
        try:
            found[parse_address(str(where[0]))] = None
        except ValueError:
            continue  # a link-local answer with a zone id: means something else on every machine
    if not found:
        raise OSError(socket.EAI_NONAME, "no usable address")
    return tuple(found)[:ADDRESSES_MAX]
