"""How kernels whose programs make whole rows write them: as they are, or quantised for the product that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import INTERPRETED

NONE = tl.constexpr(0)
GIVEN = tl.constexpr(1)  # the scale is read, one for all rows or one a row
PER_TOKEN = tl.constexpr(2)  # int8 with scale = max|row| / 127
PAIRS = tl.constexpr(3)  # 16 bits as two signed bytes, 256 high + low, with scale = max|row| / PAIR_LIMIT
PAIR_LIMIT = tl.constexpr(32639.0)  # 127 * 256 + 127


def row_output(
    x: Tensor, num_tokens: int, width: int, quantised: torch.dtype | None, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, tl.constexpr]:
    """(out, scale, mode) for store_row, on x's device.

    quantised: None = x's dtype; int8 or float8_e4m3fn with scale [1] or [num_tokens]; int8 or int16 without, which
    leaves a scale for each token to the kernel.  An int16 row is two rows of int8, the high bytes before the low:
    integers whose products with integer weights are exact, and that say more than the 11 significant bits of float16.
    """
    pairs = quantised == torch.int16
    dtype = torch.int8 if pairs else quantised or x.dtype
    out = torch.empty(num_tokens * (2 if pairs else 1), width, dtype=dtype, device=x.device)
    if quantised is None:
        return out, None, NONE
    if scale is not None:
        return out, scale, GIVEN
    scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    return out, scale, PAIRS if pairs else PER_TOKEN


@triton.jit
def round_even(x):
    """x rounded to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def divide(x, y, reciprocal):
    """x / y rounded to even, where 1 / y is, too: a quotient corrected twice by the remainder (Markstein, 1990), a
    third of the instructions of a division.  All three are to be well within float32's range.
    """
    if INTERPRETED:
        return tl.div_rn(x, y)
    q = x * reciprocal
    q = tl.fma(tl.fma(-q, y, x), reciprocal, q)
    return tl.fma(tl.fma(-q, y, x), reciprocal, q)


@triton.jit
def load_smoother(smoother, columns, mask):
    """(smoother, 1 / smoother) at these columns, float32; 1 beyond the mask."""
    divisor = tl.load(smoother + columns, mask, other=1.0)
    return divisor, tl.div_rn(1.0, divisor)


@triton.jit
def quantise(x, scale, dtype: tl.constexpr):
    """clamp(x / scale) as int8, rounded to even, or e4m3; the same bits as quant/scaled.py."""
    limit = scale * (127.0 if dtype == tl.int8 else 448.0)
    q = divide(tl.clamp(x, -limit, limit), scale, tl.div_rn(1.0, scale))
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
def _store(target, x, first, width, EVEN_ODD: tl.constexpr):
    """x to columns first.. of the row at target, or, EVEN_ODD, even columns to its first half and odd ones after."""
    BLOCK: tl.constexpr = x.shape[0]
    if EVEN_ODD:
        even, odd = tl.split(tl.reshape(x, (BLOCK // 2, 2)))
        columns, half = first // 2 + tl.arange(0, BLOCK // 2), width // 2
        tl.store(target + columns, even, columns < half)
        tl.store(target + half + columns, odd, columns < half)
    else:
        columns = first + tl.arange(0, BLOCK)
        tl.store(target + columns, x, columns < width)


@triton.jit
def store_row(x, row, first, scale, out, out_scale, width, QUANTISE: tl.constexpr, EVEN_ODD: tl.constexpr,
              ROW_SCALES: tl.constexpr):  # fmt: skip
    """Write x, float32, to columns first.. of a row in the way that QUANTISE says; x is 0 beyond the row's width.

    EVEN_ODD: even columns before odd ones, as the products with 4-bit weights, of which a byte holds two, take them
    """
    target = out + row.to(tl.int64) * width * (2 if QUANTISE == PAIRS else 1)
    if QUANTISE == NONE:
        _store(target, x.to(out.dtype.element_ty), first, width, EVEN_ODD)
    elif QUANTISE == PAIRS:
        largest = tl.max(tl.abs(x), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        tl.store(out_scale + row, largest / PAIR_LIMIT)
        number = round_even(x * (PAIR_LIMIT / largest)).to(tl.int32)
        low = (number << 24) >> 24
        _store(target, ((number - low) >> 8).to(tl.int8), first, width, EVEN_ODD)
        _store(target + width, low.to(tl.int8), first, width, EVEN_ODD)
    else:
        if QUANTISE == PER_TOKEN:
            largest = tl.max(tl.abs(x), 0)
            s = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
            tl.store(out_scale + row, s)
        else:
            s = tl.load(scale + (row if ROW_SCALES else 0))
        _store(target, quantise(x, s, out.dtype.element_ty), first, width, EVEN_ODD)
