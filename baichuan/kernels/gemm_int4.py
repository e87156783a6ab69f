"""Several tokens times a matrix of 4-bit integers, which become floats on their way to the tensor cores.

A byte holds an even input channel in its low nibble and the odd one after it in its high nibble.  The nibbles of a
block of bytes [BLOCK_N, HALF] become two matrices of floats, and the product is the sum of two:

    y tile = x[even channels] @ (low nibbles)T + x[odd channels] @ (high nibbles)T

so that x comes deinterleaved (operand.Deinterleaved), the even channels of a row before its odd ones.  The weight is
the first operand, yT = W @ xT: Hopper's tensor cores take that one from registers, where it has just been converted.

Groups of channels share a scale.  Where there are several (GROUP > 0), the floats are scaled before the product, in
PARTS equal parts of a block's channels, each of which lies in one group.  For BLOCK_K = 128:

    GROUP 32:   | scale 0 | scale 1 | scale 2 | scale 3 |      4 parts of 32 channels
    GROUP 128:  | scale 0 | scale 0 | scale 0 | scale 0 |      4 parts as well: fewer would cost time, see below

Where the whole row is one group (GROUP = 0), y is scaled instead.  Where groups have a zero (ZERO), it is subtracted
from the floats, with what the conversion leaves to subtract, before they are scaled; one group is then a group like
others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemm_parts import multiply, store_tile
from baichuan.kernels.operand import Deinterleaved, Operand
from baichuan.kernels.primitives import INTERPRETED, start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec
from baichuan.kernels.tiles import Tile, choose_tile, place_of_tile, share_of_split


def _mantissas(prefix: str) -> tl.constexpr:
    """PTX from a word of four bytes to eight 16-bit floats: each nibble + 8 as the low mantissa bits after `prefix`.

    Flipping the sign bit of a signed nibble adds 8 to it: lop3 masks a nibble and flips its bit in one instruction,
    prmt puts `prefix` before the byte.
    """
    return tl.constexpr(
        f"""{{
        .reg .b32 e, o, t;
        shr.u32 t, $4, 4;
        lop3.b32 e, $4, 0x0F0F0F0F, 0x08080808, 0x6A;
        lop3.b32 o, t, 0x0F0F0F0F, 0x08080808, 0x6A;
        prmt.b32 $0, e, {prefix}, 0x4140;
        prmt.b32 $1, e, {prefix}, 0x4342;
        prmt.b32 $2, o, {prefix}, 0x4140;
        prmt.b32 $3, o, {prefix}, 0x4342;
        }}"""
    )


FLOAT16_MANTISSAS = _mantissas("0x64646464")  # 1024 + 8 + nibble: from 1024 to 2048 float16's mantissa counts by ones
BFLOAT16_MANTISSAS = _mantissas("0x43434343")  # 128 + 8 + nibble: from 128 to 256 bfloat16's does
FLOAT16_BIAS, BFLOAT16_BIAS = tl.constexpr(1024.0 + 8.0), tl.constexpr(128.0 + 8.0)


@triton.jit
def _biased_int4(packed, dtype: tl.constexpr):
    """(low, high) nibbles of bytes, signed, plus the dtype's bias, as floats: the even and the odd input channels."""
    if INTERPRETED or dtype == tl.float32:
        byte = packed.to(tl.int8, bitcast=True).to(tl.int32)
        return ((byte << 28) >> 28).to(dtype), (byte >> 4).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            FLOAT16_MANTISSAS if dtype == tl.float16 else BFLOAT16_MANTISSAS,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(dtype.value, dtype.value),
            is_pure=True,
            pack=4,
        )


@triton.jit
def _part_scales(rows, start, in_features, GROUP: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The scales, or zeros, [BLOCK_N, PARTS] of PARTS parts of WIDTH channels each from channel `start` on.

    rows: pointers [BLOCK_N, 1] to each row's first one
    """
    PAIRS: tl.constexpr = 2 * WIDTH == GROUP
    LOADS: tl.constexpr = PARTS // 2 if PAIRS else PARTS
    STEP: tl.constexpr = PARTS // LOADS * WIDTH
    # Triton sees that the first form's addresses follow one another.
    group = start // GROUP + tl.arange(0, LOADS) if STEP == GROUP else (start + tl.arange(0, LOADS) * STEP) // GROUP
    loaded = tl.load(rows + group[None, :], (group < in_features // GROUP)[None, :], other=0)
    if PAIRS:  # each for two parts, in registers: two loads of one address would be two instructions
        loaded = tl.reshape(tl.join(loaded, loaded), (loaded.shape[0], PARTS))
    return loaded


@triton.jit
def _times_part_scales(values, scales, zeros, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
                       ZERO: tl.constexpr):  # fmt: skip
    """(values [BLOCK_N, HALF] - zeros) * scales, where each of the PARTS equal parts of a row has one of both.

    scales, with ZERO also zeros: [BLOCK_N, PARTS]
    """
    parts = tl.reshape(values, (BLOCK_N, PARTS, HALF // PARTS))
    if ZERO:
        parts -= zeros[:, :, None]
    return tl.reshape(parts * scales.to(values.dtype)[:, :, None], (BLOCK_N, HALF))


@triton.jit
def _gemm_int4(
    x, weight, scale, zero,
    num_rows, in_features, out_features,
    y,
    GROUP: tl.constexpr, ZERO: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    block_m, block_n = place_of_tile(num_rows, out_features, BLOCK_M, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = BLOCK_K // 2
    DTYPE: tl.constexpr = x.dtype.element_ty
    FLOAT_BIAS: tl.constexpr = FLOAT16_BIAS if tl.float16 == DTYPE else BFLOAT16_BIAS
    BIAS: tl.constexpr = 0.0 if INTERPRETED or tl.float32 == DTYPE else FLOAT_BIAS
    width = in_features // 2
    x_rows = x + (m % num_rows).to(tl.int64)[:, None] * in_features
    row = tl.minimum(n, out_features - 1).to(tl.int64)[:, None]
    w_rows = weight + row * width
    first, end = share_of_split(in_features, BLOCK_K)
    if GROUP > 0:
        # With fewer than four parts Triton passes the converted block through shared memory.
        PARTS: tl.constexpr = max(BLOCK_K // GROUP, 4)
        WIDTH: tl.constexpr = BLOCK_K // PARTS
        scale_rows = scale + row * (in_features // GROUP)
        next_scales = _part_scales(scale_rows, first, in_features, GROUP, PARTS, WIDTH)
        zero_rows = zero + row * (in_features // GROUP)
        next_zeros = _part_scales(zero_rows, first, in_features, GROUP, PARTS, WIDTH) if ZERO else 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    # With few rows a product is done before the sum that it is added to is ready: two sums wait half as often.
    TWO_SUMS: tl.constexpr = BLOCK_M < 32
    odd_acc = acc
    for start in range(first, end, BLOCK_K):
        byte = start // 2 + tl.arange(0, HALF)[None, :]
        packed = tl.load(w_rows + byte, byte < width, other=0)
        x_even = tl.load(x_rows + byte, byte < width, other=0.0)
        x_odd = tl.load(x_rows + width + byte, byte < width, other=0.0)
        even, odd = _biased_int4(packed, x_even.dtype)
        if not ZERO:
            even, odd = even - BIAS, odd - BIAS
        if GROUP > 0:
            scales, zeros = next_scales, next_zeros  # loaded one block ahead, so that the loop does not wait for memory
            next_scales = _part_scales(scale_rows, start + BLOCK_K, in_features, GROUP, PARTS, WIDTH)
            if ZERO:
                zeros = (zeros.to(tl.float32) + BIAS).to(x_even.dtype)  # a whole number of at most the mantissa's bits
                next_zeros = _part_scales(zero_rows, start + BLOCK_K, in_features, GROUP, PARTS, WIDTH)
            even = _times_part_scales(even, scales, zeros, BLOCK_N, HALF, PARTS, ZERO)
            odd = _times_part_scales(odd, scales, zeros, BLOCK_N, HALF, PARTS, ZERO)
        acc = tl.dot(even, tl.trans(x_even), acc, input_precision="ieee")
        if TWO_SUMS:
            odd_acc = tl.dot(odd, tl.trans(x_odd), odd_acc, input_precision="ieee")
        else:
            acc = tl.dot(odd, tl.trans(x_odd), acc, input_precision="ieee")
    if TWO_SUMS:
        acc += odd_acc
    store_tile(tl.trans(acc), scale, scale, m, n, num_rows, out_features, y, SPLIT, False, False, GROUP == 0)


GEMM_INT4 = KernelSpec(
    _gemm_int4, ("x", "weight", "scale", "zero"), ("num_rows", "in_features", "out_features"), ("y",)
)


def gemm_int4(
    x: Operand,
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
    zero: Tensor | None = None,
) -> Tensor:
    """y = x @ W(weight, scale, zero)ᵀ for records.Int4Weight.

    x: [num_tokens, in_features], Deinterleaved; weight: [out_features, in_features / 2] uint8;
    scale, zero: [out_features, groups]; tile: None = what measured fastest -> [num_tokens, out_features]
    """
    assert isinstance(x.form, Deinterleaved)
    num_tokens, in_features = x.values.shape
    out_features, groups = weight.shape[0], scale.shape[1]
    group_size, zeros = in_features // groups, zero is not None
    tile = tile or choose_tile(num_tokens, in_features, out_features, x.values.dtype, weight.dtype, (group_size, zeros))
    y = torch.empty(num_tokens, out_features, dtype=out_dtype, device=weight.device)
    by_column = groups == 1 and not zeros  # y is scaled
    constants = {"GROUP": 0 if by_column else group_size, "ZERO": zeros}
    inputs = (x.values, weight, scale, scale if zero is None else zero)
    scales = {"COLUMN_SCALES": by_column, "X_SCALE": False, "ROW_SCALES": False}
    multiply(GEMM_INT4, tile, inputs, constants, y, torch.float32, (scale, scale), scales)
    return y
