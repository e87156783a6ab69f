"""How kernels whose programs make whole rows write them: as they are, or quantised for the product that follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import INTERPRETED

NONE = tl.constexpr(0)
EVEN_ODD = tl.constexpr(1)  # x's dtype, even columns before odd ones: a byte of 4-bit weights holds one of each
GIVEN = tl.constexpr(2)  # the scale is read, one for all rows or one a row
PER_TOKEN = tl.constexpr(3)  # int8 with scale = max|row| / 127
PAIRS = tl.constexpr(4)  # 16 bits as two signed bytes, 256 high + low, with scale = max|row| / PAIR_LIMIT
EVEN_ODD_PAIRS = tl.constexpr(5)  # of both bytes, even columns before odd ones
PAIR_LIMIT = tl.constexpr(32639.0)  # 127 * 256 + 127


def row_output(
    x: Tensor, num_tokens: int, width: int, quantised: torch.dtype | None, scale: Tensor | None, even_odd: bool
) -> tuple[Tensor, Tensor | None, tl.constexpr]:
    """(out, scale, mode) for store_row, on x's device.

    quantised: None = x's dtype; int8 or float8_e4m3fn with scale [1] or [num_tokens]; int8 or int16 without, which
    leaves a scale for each token to the kernel.  An int16 row is two rows of int8, the high bytes before the low:
    integers whose products with integer weights are exact, and that say more than the 11 significant bits of float16.
    even_odd, for quantised None or int16: each row's even columns before its odd ones; int16 rows have a multiple of 8.
    """
    pairs = quantised == torch.int16
    dtype = torch.int8 if pairs else quantised or x.dtype
    out = torch.empty(num_tokens * (2 if pairs else 1), width, dtype=dtype, device=x.device)
    if quantised is None:
        return out, None, EVEN_ODD if even_odd else NONE
    if scale is not None:
        return out, scale, GIVEN
    scale = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if not pairs:
        return out, scale, PER_TOKEN
    return out, scale, EVEN_ODD_PAIRS if even_odd else PAIRS


@triton.jit
def nearest_integer(x):
    """The integer nearest to x, ties to even, in the low 22 bits: adding 1.5 * 2^23 leaves no bits for fractions.

    Conversions to integers take four times as long.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def divide(x, y, reciprocal):
    """x / y rounded to even, where 1 / y is, too: a quotient corrected twice by the remainder (Markstein, 1990), a
    third of the instructions of a division.  All three are to be well within float32's range.
    """
    if INTERPRETED:
        return tl.div_rn(x, y)
    minus_y = y * -1.0  # becomes a sign in the instructions, where -y would be a subtraction
    q = x * reciprocal
    q = tl.fma(tl.fma(q, minus_y, x), reciprocal, q)
    return tl.fma(tl.fma(q, minus_y, x), reciprocal, q)


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
        return nearest_integer(q).to(tl.int8)
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
def _store_even_odd(out_row, x, width):
    """Write the low bytes of x, a whole row, even columns before odd ones, by words: what a thread has, it writes."""
    WORDS: tl.constexpr = x.shape[0] // 8  # of even columns
    shifts = (8 * tl.arange(0, 4))[None, :, None]
    words = tl.sum(tl.reshape(x & 0xFF, (WORDS, 4, 2)) << shifts, 1)  # bytes apart: a sum joins them
    word, odd = tl.arange(0, WORDS)[:, None], tl.arange(0, 2)[None, :]
    tl.store(out_row.to(tl.pointer_type(tl.int32)) + odd * (width // 8) + word, words, word < width // 8)


@triton.jit
def store_row(x, row, columns, mask, scale, out, out_scale, width, QUANTISE: tl.constexpr, ROW_SCALES: tl.constexpr):
    """Write these columns of a row, x float32, which is 0 beyond the mask, in the way that QUANTISE says."""
    TWO_BYTES: tl.constexpr = (QUANTISE == PAIRS) | (QUANTISE == EVEN_ODD_PAIRS)
    out_row = out + row.to(tl.int64) * width * (2 if TWO_BYTES else 1)
    if QUANTISE == NONE:
        tl.store(out_row + columns, x.to(out.dtype.element_ty), mask)
    elif QUANTISE == EVEN_ODD:
        tl.store(out_row + columns % 2 * (width // 2) + columns // 2, x.to(out.dtype.element_ty), mask)
    elif TWO_BYTES:
        largest = tl.max(tl.abs(x), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        tl.store(out_scale + row, largest / PAIR_LIMIT)
        number = nearest_integer(x * (PAIR_LIMIT / largest))
        high = (number + 128) >> 8
        if QUANTISE == PAIRS:
            tl.store(out_row + columns, high.to(tl.int8), mask)
            tl.store(out_row + width + columns, number.to(tl.int8), mask)
        else:
            _store_even_odd(out_row, high, width)
            _store_even_odd(out_row + width, number, width)
    else:
        if QUANTISE == PER_TOKEN:
            largest = tl.max(tl.abs(x), 0)
            s = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
            tl.store(out_scale + row, s)
        else:
            s = tl.load(scale + (row if ROW_SCALES else 0))
        tl.store(out_row + columns, quantise(x, s, out.dtype.element_ty), mask)
