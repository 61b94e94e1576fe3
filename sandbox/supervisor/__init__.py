"""The process that owns running calls: timers, limits, kill, the audit chain. One asyncio loop, no privileges asked.

It is started by exec of a fresh interpreter and never forks but for its zygote. Standard library, `audit` and the
seccomp compiler only: it has to be there some tens of milliseconds after the first call.
"""
