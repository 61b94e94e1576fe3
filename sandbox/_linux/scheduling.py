"""How soon the calling process gets a core when it is woken: the length of its turns.

Since Linux 6.12 a task that asks for short turns may take the core from one that has long ones, as soon as it wakes;
its share of the time stays what it was. Older kernels pass over the wish. Source: sched_setattr(2),
Documentation/scheduler/sched-eevdf.rst.
"""

from __future__ import annotations

import errno
import os
import struct

from sandbox._linux import syscalls
from sandbox._linux.batch import Batch

# As short as the kernel gives.
SHORT_NS = 100_000
USUAL_NS = 0
_SIZE = 48
_KEEP_POLICY = 0x08
# A real-time task has no turns (EINVAL), and a filter may refuse the call: it costs some waiting, nothing else.
_NO_MATTER = dict.fromkeys((errno.EINVAL, errno.EPERM, errno.ENOSYS))


def add_turns(batch: Batch, length_ns: int) -> None:
    """Ask for turns of that length; USUAL_NS for the kernel's own choice."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = struct.pack("=IIQiIQQQ", _SIZE, 0, _KEEP_POLICY, nice, 0, length_ns, 0, 0)
    number = syscalls.number("sched_setattr")
    batch.add("sched_setattr", number, 0, batch.address(attributes), 0, instead=_NO_MATTER)


def take_turns(length_ns: int) -> None:
    """As `add_turns`, now."""
    batch = Batch()
    add_turns(batch, length_ns)
    batch.run()
