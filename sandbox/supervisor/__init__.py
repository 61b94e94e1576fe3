"""The process that owns running calls: timers, limits, kill, the audit chain. One asyncio loop, no privileges asked.

It is started by exec of a fresh interpreter, or forked from a command line that is nothing else yet. Standard library,
`audit` and the seccomp compiler only: it has to be there some tens of milliseconds after the first call.
"""
