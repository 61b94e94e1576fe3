"""A CUDA program in plain Python, run inside a jail by `bench/gpu.py`: the driver API by ctypes, nothing installed.

    python3 gpu_program.py open                 make a context, say which device
    python3 gpu_program.py fill MIB SECONDS     allocate so much, say when, hold it
    python3 gpu_program.py hash SECONDS         keep all multiprocessors busy with an xorshift, as a miner would

Prints one JSON line per event; exit status 3 when the driver cannot be used.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time

PTX = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry spin(.param .u64 out, .param .u32 rounds)
{
    .reg .pred %p<2>;
    .reg .b32 %r<8>;
    .reg .b64 %rd<4>;
    ld.param.u64 %rd1, [out];
    ld.param.u32 %r1, [rounds];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r2, 256, %r3;
    add.u32 %r4, %r4, 1;
    mov.u32 %r5, 0;
LOOP:
    shl.b32 %r6, %r4, 13;
    xor.b32 %r4, %r4, %r6;
    shr.u32 %r6, %r4, 17;
    xor.b32 %r4, %r4, %r6;
    shl.b32 %r6, %r4, 5;
    xor.b32 %r4, %r4, %r6;
    add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, %r1;
    @%p1 bra LOOP;
    setp.ne.u32 %p1, %r4, 0;
    @%p1 bra END;
    st.global.u32 [%rd1], %r4;
END:
    ret;
}
\0"""


class Cuda:
    """The driver's library, a context on the first visible device."""

    def __init__(self) -> None:
        try:
            self.lib = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            stop(f"libcuda.so.1: {error}")
        self.check("cuInit", 0)
        count = ctypes.c_int()
        self.check("cuDeviceGetCount", ctypes.byref(count))
        self.device, self.context = ctypes.c_int(), ctypes.c_void_p()
        self.check("cuDeviceGet", ctypes.byref(self.device), 0)
        name = ctypes.create_string_buffer(100)
        self.check("cuDeviceGetName", name, 100, self.device)
        self.check("cuCtxCreate_v2", ctypes.byref(self.context), 0, self.device)
        say(event="open", devices=count.value, name=name.value.decode())

    def check(self, function: str, *args: object) -> None:
        code = getattr(self.lib, function)(*args)
        if code:
            stop(f"{function}: {code}")

    def allocate(self, size: int) -> ctypes.c_uint64:
        pointer = ctypes.c_uint64()
        self.check("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer

    def attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.check("cuDeviceGetAttribute", ctypes.byref(value), number, self.device)
        return value.value


def say(**event: object) -> None:
    print(json.dumps({**event, "at_s": time.monotonic()}), flush=True)


def stop(why: str) -> None:
    say(event="failed", why=why)
    sys.exit(3)


def fill(cuda: Cuda, mib: int, seconds: float) -> None:
    # Said before: over its limit it may be killed before it could say that it has the memory.
    say(event="allocating", mib=mib)
    pointer = cuda.allocate(mib << 20)
    cuda.check("cuMemsetD8_v2", pointer, 1, ctypes.c_size_t(mib << 20))
    cuda.check("cuCtxSynchronize")
    say(event="filled", mib=mib)
    time.sleep(seconds)


def spin(cuda: Cuda, seconds: float) -> None:
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    cuda.check("cuModuleLoadData", ctypes.byref(module), PTX)
    cuda.check("cuModuleGetFunction", ctypes.byref(function), module, b"spin")
    blocks = cuda.attribute(16) * 8  # multiprocessors
    out, rounds = cuda.allocate(4), ctypes.c_uint32(1 << 20)
    args = (ctypes.c_void_p * 2)(ctypes.addressof(out), ctypes.addressof(rounds))
    say(event="hashing", blocks=blocks)
    end, launches = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        cuda.check("cuLaunchKernel", function, blocks, 1, 1, 256, 1, 1, 0, None, args, None)
        cuda.check("cuCtxSynchronize")
        launches += 1
    say(event="hashed", launches=launches)


def main(argv: list[str]) -> None:
    cuda = Cuda()
    if argv[0] == "fill":
        fill(cuda, int(argv[1]), float(argv[2]))
    elif argv[0] == "hash":
        spin(cuda, float(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
