"""GPUs: which there are, which call holds which, what a call uses of them, and what holds each of its limits.

Loaded only where a GPU is asked for or found. NVML is the source of everything that is known about a device; what it
does not answer is unknown, never 0. `facts` and `limits` are data and judgement, `nvml` the only user of `pynvml`.
Not defended against: the driver itself. Whoever holds a device node talks to it directly, and what NVML reports is as
true as the driver is.
"""
