"""How a kernel whose programs make whole rows writes them: in the form that the next product takes (operand.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import Deinterleaved, E4m3PerToken, Form, Int8PerToken, Int16, Plain, StaticScale
from baichuan.kernels.primitives import INTERPRETED

# What the kernels' constant FORM can be: operand.py's forms as numbers.
PLAIN = tl.constexpr(0)
DEINTERLEAVED = tl.constexpr(1)
STATIC_SCALE = tl.constexpr(2)
INT8_PER_TOKEN = tl.constexpr(3)
INT16 = tl.constexpr(4)
INT16_DEINTERLEAVED = tl.constexpr(5)
E4M3_PER_TOKEN = tl.constexpr(6)
INT16_WITH_SUMS = tl.constexpr(1 << 20)  # deinterleaved; plus a group's channels, or 0: the row, no power of two
MANY_ROWS, ROWS = 512, 8  # from 512 rows on a program may write 8: rows_each
INT16_LIMIT = tl.constexpr(32639.0)  # 127 * 256 + 127: the largest number whose two bytes are both at most 127


def form_constant(form: Form) -> tl.constexpr:
    """The constant FORM of a kernel that writes rows in this form."""
    match form:
        case Plain():
            return PLAIN
        case Deinterleaved():
            return DEINTERLEAVED
        case StaticScale():
            return STATIC_SCALE
        case Int8PerToken():
            return INT8_PER_TOKEN
        case E4m3PerToken():
            return E4M3_PER_TOKEN
        case Int16(deinterleaved, sums):
            assert deinterleaved or not sums
            if sums:
                return tl.constexpr(INT16_WITH_SUMS.value + (sums if sums & (sums - 1) == 0 else 0))
            return INT16_DEINTERLEAVED if deinterleaved else INT16


def rows_each(num_tokens: int, smoother: Tensor | None) -> int:
    """Rows of a program, a divisor of their number: with many rows, several share the smoother and its reciprocal,
    which take as many instructions as all the rest.
    """
    return ROWS if smoother is not None and num_tokens >= MANY_ROWS and num_tokens % ROWS == 0 else 1


@triton.jit
def nearest_integer(x):
    """The integer nearest to x, ties to even, in the low 22 bits of the result, for |x| < 2^21.

    Adding 1.5 * 2^23 leaves a float32 no bits for a fraction, so that the sum's mantissa holds the integer.  A
    conversion instruction takes four times as long.
    """
    return (x + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def divide(x, y, reciprocal):
    """x / y rounded to nearest even, given 1 / y rounded in the same way; all three far from float32's limits.

    The quotient x * reciprocal is corrected twice by its remainder (Markstein, 1990): a third of the instructions of
    a division.
    """
    if INTERPRETED:
        return tl.div_rn(x, y)
    minus_y = y * -1.0  # folded into the multiply-adds as a sign; -y would become a subtraction of its own
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
    """clamp(x / scale) rounded to nearest even, as int8 or e4m3; the same bits as quant/scaled.py."""
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
def _store_deinterleaved_bytes(out_row, x, width):
    """Write the low byte of each number of x, a whole row, even columns before odd ones; width is a multiple of 8.

    Eight neighbouring columns become two 32-bit words, for a row of 16 columns:

        columns  0 2 4 6   8 10 12 14   1 3 5 7   9 11 13 15
        word        0           1          2           3

    Neighbouring columns lie in the same thread's registers, so that no thread needs another one's bytes.
    """
    WORDS: tl.constexpr = x.shape[0] // 8  # words of the even columns, and as many of the odd ones
    shifts = (8 * tl.arange(0, 4))[None, :, None]
    words = tl.sum(tl.reshape(x & 0xFF, (WORDS, 4, 2)) << shifts, 1)  # the bytes do not overlap: a sum joins them
    word, odd = tl.arange(0, WORDS)[:, None], tl.arange(0, 2)[None, :]
    tl.store(out_row.to(tl.pointer_type(tl.int32)) + odd * (width // 8) + word, words, word < width // 8)


@triton.jit
def _store_sums(sums, number, row, width, CHANNELS: tl.constexpr):
    """Write 16 times the sums of every CHANNELS integers of a whole row, 0 beyond its width; 0 channels: of all."""
    SUMMED: tl.constexpr = CHANNELS if CHANNELS > 0 else number.shape[0]
    COUNT: tl.constexpr = number.shape[0] // SUMMED
    group = tl.arange(0, COUNT)
    total = tl.sum(tl.reshape((number << 10) >> 10, (COUNT, SUMMED)), 1)  # the low 22 bits are the integer
    groups = width // SUMMED if CHANNELS > 0 else 1
    tl.store(sums + row * groups + group, 16.0 * total.to(tl.float32), group < groups)


@triton.jit
def store_row(x, row, columns, mask, scale, out, out_scale, width, FORM: tl.constexpr, ROW_SCALES: tl.constexpr):
    """Write these columns of a row in the given form.  x: float32, 0 beyond the mask; `columns` are the whole row,
    except where FORM is PLAIN, DEINTERLEAVED or STATIC_SCALE.

    scale: read where FORM is STATIC_SCALE, at `row` if ROW_SCALES, else at 0; out_scale: written at `row` where each
    token has a scale of its own.  An example, for the row (0.5, -1.0, 0.25, 1.0):

        PLAIN           0.5  -1.0  0.25  1.0
        DEINTERLEAVED   0.5  0.25 -1.0   1.0
        STATIC_SCALE     50  -100   25   100            scale 0.01
        INT8_PER_TOKEN   64  -127   32   127            out_scale 1 / 127
        E4M3_PER_TOKEN  224  -448  112   448            out_scale 1 / 448
        INT16            64  -127   32   127  (high)    out_scale 1 / 32639
                        -64  -127  -32   127  (low)     0.5 is 16320 = 256 * 64 - 64
    """
    TWO_ROWS: tl.constexpr = (FORM == INT16) | (FORM == INT16_DEINTERLEAVED) | (FORM >= INT16_WITH_SUMS)
    out_row = out + row.to(tl.int64) * width * (2 if TWO_ROWS else 1)
    if FORM == PLAIN:
        tl.store(out_row + columns, x.to(out.dtype.element_ty), mask)
    elif FORM == DEINTERLEAVED:
        tl.store(out_row + columns % 2 * (width // 2) + columns // 2, x.to(out.dtype.element_ty), mask)
    elif TWO_ROWS:
        largest = tl.max(tl.abs(x), 0)
        largest = tl.where(largest > 0, largest, 1.0)
        tl.store(out_scale + row, largest / INT16_LIMIT)
        number = nearest_integer(x * (INT16_LIMIT / largest))
        high = (number + 128) >> 8  # rounded, so that the low byte is signed
        if FORM == INT16:
            tl.store(out_row + columns, high.to(tl.int8), mask)
            tl.store(out_row + width + columns, number.to(tl.int8), mask)
        else:
            _store_deinterleaved_bytes(out_row, high, width)
            _store_deinterleaved_bytes(out_row + width, number, width)
        if FORM >= INT16_WITH_SUMS:
            _store_sums(out_scale + tl.num_programs(0), number, row, width, FORM - INT16_WITH_SUMS)
    else:
        if FORM == INT8_PER_TOKEN:
            largest = tl.max(tl.abs(x), 0)
            s = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
            tl.store(out_scale + row, s)
        elif FORM == E4M3_PER_TOKEN:
            s = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 448.0), 2.0**-100)
            tl.store(out_scale + row, s)
        else:
            s = tl.load(scale + (row if ROW_SCALES else 0))
        tl.store(out_row + columns, quantise(x, s, out.dtype.element_ty), mask)
