"""What several kernels share: overlapping with the kernel before, prefetching, converting 8-bit numbers.

Overlap is CUDA's programmatic dependent launch (CUDA C++ Programming Guide, same name): a kernel may start while the
one before it on the stream is still running.  Each kernel calls two functions:

    kernel A     |--------- work ---------|
                     ^ start_dependents: B's programs may start as A's leave room
    kernel B             |- loads weights -|........|--- work ---|
                                           ^ wait_for_inputs: here B waits until all of A is done

Before wait_for_inputs a kernel reads nothing that another one writes, and writes nothing: the allocator may have given
it memory that an earlier kernel still reads.  A kernel that streams weights calls
start_dependents first of all, so that the next one stands ready when it ends.  A short kernel calls it after
wait_for_inputs: the weights that the next one asks for would delay its own inputs.

Conversions are written in PTX where Triton's own take several times the instructions.  Triton's interpreter cannot run
PTX and takes the plain definition beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def start_dependents(OVERLAP: tl.constexpr):
    """Let the next kernel on the stream start."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Wait until every kernel before this one has ended and its results can be read."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch(lines):
    """Bring the 128 bytes at each of these pointers into the L2 cache."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [lines.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _prefetch_run(address, BYTES: tl.constexpr):
    """Bring BYTES from this address on into the L2 cache; both are multiples of 16.  One thread asks for them all."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [address, tl.full((), BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_beginning(matrix, size, GATED: tl.constexpr, OVERLAP: tl.constexpr):
    """Bring this program's share of the first 2 MiB of a matrix of `size` numbers into the L2 cache.

    GATED: two matrices of that size lie one after the other, gate and up, and the first 1 MiB of each is brought.
    The programs that run while the kernel before still does are the first ones, and the rows that they read come
    first in the matrix.  More than 2 MiB would delay the kernel before by more than this one gains.
    """
    if OVERLAP:
        BYTES: tl.constexpr = 2048 if GATED else 4096
        NUMBERS: tl.constexpr = BYTES * 8 // matrix.dtype.element_ty.primitive_bitwidth
        begin = tl.program_id(0) * NUMBERS
        if begin + NUMBERS <= tl.minimum(size, 528 * NUMBERS):
            _prefetch_run((matrix + begin).to(tl.int64) & -16, BYTES)
            if GATED:
                _prefetch_run((matrix + size + begin).to(tl.int64) & -16, BYTES)


@triton.jit
def int8_to_float32(x):
    """int8 as float32, exactly.

    The byte with its sign bit flipped is x + 128.  As low mantissa bits of 2^23 it makes 2^23 + 128 + x, from which
    2^23 + 128 is subtracted.
    """
    if INTERPRETED:
        return x.to(tl.float32)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, a, b, c, d;
        xor.b32 t, $4, 0x80808080;
        prmt.b32 a, t, 0x4B000000, 0x7440;
        prmt.b32 b, t, 0x4B000000, 0x7441;
        prmt.b32 c, t, 0x4B000000, 0x7442;
        prmt.b32 d, t, 0x4B000000, 0x7443;
        add.f32 $0, a, 0fCB000080;
        add.f32 $1, b, 0fCB000080;
        add.f32 $2, c, 0fCB000080;
        add.f32 $3, d, 0fCB000080;
        }""",
        "=f,=f,=f,=f,r",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def int8_to_float16(x):
    """int8 as float16, exactly, in the same way: 1024 + 128 + x, less 1024 + 128."""
    if INTERPRETED:
        return x.to(tl.float16)
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 t, a, b, bias;
        mov.b32 bias, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 a, t, 0x64646464, 0x4140;
        prmt.b32 b, t, 0x64646464, 0x4342;
        sub.f16x2 $0, a, bias;
        sub.f16x2 $1, b, bias;
        }""",
        "=r,=r,r",
        [x],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def to_float32(x):
    """x, of any type, as float32, exactly."""
    if x.dtype == tl.int8:
        return int8_to_float32(x)
    else:
        return x.to(tl.float32)


@triton.jit
def to_dtype(x, dtype: tl.constexpr):
    """An 8-bit x as a wider float type, exactly."""
    if x.dtype == tl.int8:
        if dtype == tl.float16:
            return int8_to_float16(x)
        else:
            return int8_to_float32(x).to(dtype)
    else:
        return x.to(dtype)
