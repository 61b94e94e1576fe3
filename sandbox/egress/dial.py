"""Connects to the first of several judged addresses that answers, in their order, without waiting long for a dead one.

The next address is tried when the one before has failed, or has not answered for a moment (RFC 8305 calls the moment
Connection Attempt Delay). What comes second is closed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Sequence
from typing import Final

from sandbox.egress.addresses import Address

CONNECT_TIMEOUT_S: Final = 10.0
NEXT_AFTER_S: Final = 0.3


async def dial(addresses: Sequence[Address], port: int) -> tuple[socket.socket, Address]:
    """A connected socket and where it goes to. Raises OSError or TimeoutError, as the last attempt did."""
    if len(addresses) == 1:
        return await _connect(addresses[0], port), addresses[0]
    attempts: dict[asyncio.Task[socket.socket], Address] = {}
    waiting = list(addresses)
    try:
        while True:
            if waiting:
                address = waiting.pop(0)
                attempts[asyncio.get_running_loop().create_task(_connect(address, port))] = address
            timeout_s = NEXT_AFTER_S if waiting else None
            done, _ = await asyncio.wait(attempts, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                address = attempts.pop(task)
                if task.exception() is None:
                    return task.result(), address
                if not attempts and not waiting:
                    return task.result(), address  # raises what it failed with
    finally:
        await _abandon(list(attempts))


async def _abandon(tasks: list[asyncio.Task[socket.socket]]) -> None:
    """Cancel what still tries, and close what has succeeded meanwhile."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, socket.socket):
            result.close()


async def _connect(address: Address, port: int) -> socket.socket:
    """A connected socket. Raises OSError, TimeoutError."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        where = (str(address), port)
        if _is_connected(sock, where):
            return sock
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await asyncio.get_running_loop().sock_connect(sock, where)
    except BaseException:
        sock.close()
        raise
    return sock


def _is_connected(sock: socket.socket, where: tuple[str, int]) -> bool:
    """Begin to connect; whether it is done already. Raises OSError when it was refused.

    A near host has answered before the first call returns, and the second call says so, without a turn of the loop.
    """
    code = sock.connect_ex(where)
    if code == errno.EINPROGRESS:
        code = sock.connect_ex(where)
    if code in (0, errno.EISCONN):
        return True
    if code in (errno.EALREADY, errno.EINPROGRESS):
        return False
    raise OSError(code, os.strerror(code))
