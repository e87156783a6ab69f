"""What several kernels share: waiting for inputs, converting 8-bit and 4-bit numbers, quantising a row.

Conversions are written in PTX where Triton's own take several times the instructions; Triton's interpreter, which
cannot run PTX, takes the plain definition beside it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# How a row is quantised.
NONE = tl.constexpr(0)
PER_TOKEN = tl.constexpr(1)  # scale = max|row| / 127, computed here
GIVEN = tl.constexpr(2)  # scale is read, one for all rows or one a row


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


@triton.jit
def round_even(x):
    """x rounded to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantise(x, scale, dtype: tl.constexpr):
    """clamp(x / scale) as int8, rounded to even, or e4m3; the same bits as quant/scaled.py."""
    limit: tl.constexpr = 127.0 if dtype == tl.int8 else 448.0
    q = tl.clamp(tl.div_rn(x, scale), -limit, limit)
    if dtype == tl.int8:
        return round_even(q).to(tl.int8)
    if INTERPRETED:
        q = _round_to_e4m3(q)
    return q.to(dtype)


@triton.jit
def _round_to_e4m3(x):
    """x rounded to even at three mantissa bits: the interpreter's own rounding loses the carry into the exponent."""
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)


@triton.jit
def store_row(x, row, columns, mask, smoother, scale, out, out_scale, width, QUANTISE: tl.constexpr,
              SMOOTH: tl.constexpr, ROW_SCALES: tl.constexpr):  # fmt: skip
    """Write one row, x float32, as it is or quantised; the way all quantising kernels end."""
    out_row = out + row.to(tl.int64) * width + columns
    if QUANTISE == NONE:
        tl.store(out_row, x.to(out.dtype.element_ty), mask)
    else:
        x = tl.where(mask, x, 1.0)  # division is several times slower where it meets a 0
        if SMOOTH:
            x = tl.div_rn(x, tl.load(smoother + columns, mask, other=1.0))
        if QUANTISE == PER_TOKEN:
            largest = tl.max(tl.where(mask, tl.abs(x), 0.0), 0)
            s = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
            tl.store(out_scale + row, s)
        else:
            s = tl.load(scale + (row if ROW_SCALES else 0))
        tl.store(out_row, quantise(x, s, out.dtype.element_ty), mask)
