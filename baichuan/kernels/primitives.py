"""What several kernels share: waiting for inputs, converting 8-bit numbers.

Conversions are written in PTX where Triton's own take several times the instructions; Triton's interpreter, which
cannot run PTX, takes the plain definition beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def start_dependents(OVERLAP: tl.constexpr):
    """Let the next kernel begin; it still waits for this one's results.

    A kernel that streams weights does so at its start, so that the next one stands ready.  A short one waits for its
    own inputs first: the weights that the next one asks for would delay them.
    """
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAP: tl.constexpr):
    """Every kernel before this one has ended and its results can be seen.  Only weights may be read earlier."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def prefetch(lines):
    """Have the second-level cache ask memory for the 128 bytes at each of these pointers."""
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
    """The same for BYTES from this address on, a multiple of 16 as BYTES is, in one instruction of one thread."""
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
def prefetch_beginning(matrix, size, HALVES: tl.constexpr, OVERLAP: tl.constexpr):
    """Have the second-level cache ask for the first numbers of a matrix of so many, HALVES: of a second one after it.

    The programs that run while the kernel before still does are the first ones, and so are the rows they will read.
    More than 2 MiB in all would delay that kernel by more than it saves.
    """
    if OVERLAP:
        BYTES: tl.constexpr = 2048 if HALVES else 4096
        NUMBERS: tl.constexpr = BYTES * 8 // matrix.dtype.element_ty.primitive_bitwidth
        begin = tl.program_id(0) * NUMBERS
        if begin + NUMBERS <= tl.minimum(size, 528 * NUMBERS):
            _prefetch_run((matrix + begin).to(tl.int64) & -16, BYTES)
            if HALVES:
                _prefetch_run((matrix + size + begin).to(tl.int64) & -16, BYTES)


@triton.jit
def int8_to_float32(x):
    """x as float32, exactly.  The byte becomes the mantissa of 2^23 + 128 + x, from which 2^23 + 128 is taken."""
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
    """x as float16, exactly, by the mantissa of 1024 + 128 + x."""
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
    """x as float32, exactly."""
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
