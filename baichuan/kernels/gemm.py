"""Several tokens times a matrix on the tensor cores.

Each program computes one tile of y, block_m tokens by block_n output channels, or one split's share of it:

                 block_n rows of weight                     y
                +------------------+              +----+----+----+
      block_m   |                  |              |    | ## |    |   ## = x tile @ (weight tile)T,
      rows      |  BLOCK_K columns |  =>  loop => +----+----+----+        summed over in_features,
      of x      |  at a time       |              |    |    |    |        or over a split of them (tiles.py)
                +------------------+              +----+----+----+
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemm_parts import multiply, store_tile
from baichuan.kernels.operand import Int16, Operand
from baichuan.kernels.primitives import start_dependents, to_dtype, wait_for_inputs
from baichuan.kernels.spec import KernelSpec
from baichuan.kernels.tiles import Tile, choose_tile, place_of_tile, prefetch_weight, share_of_split


@triton.jit
def _gemm(
    x, x_scale, weight, scale,
    num_rows, in_features, out_features,
    y,
    COLUMN_SCALES: tl.constexpr, ROW_SCALES: tl.constexpr, X_SCALE: tl.constexpr, INT16: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    block_m, block_n = place_of_tile(num_rows, out_features, BLOCK_M, BLOCK_N)
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + (m % num_rows).to(tl.int64)[:, None] * in_features
    w_rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * in_features
    first, end = share_of_split(in_features, BLOCK_K)
    prefetch_weight(w_rows, first, in_features)
    wait_for_inputs(OVERLAP)
    SUM: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    # Within a block of channels the tensor cores add products of e4m3 with fewer bits than float32 has; the sums of
    # the blocks are added in float32.
    E4M3_TERMS: tl.constexpr = BLOCK_K if x.dtype.element_ty == tl.float8e4nv else None
    # Hopper's tensor cores take 64 rows of their first operand at a time.  Where x has fewer, yT = weight @ xT.
    SWAPPED: tl.constexpr = BLOCK_M < 64
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), SUM)
    for start in range(first, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x_rows + k[None, :], (k < in_features)[None, :], other=0.0)
        b = tl.load(w_rows + k[None, :], (k < in_features)[None, :], other=0.0)
        if b.dtype != a.dtype:
            b = to_dtype(b, a.dtype)
        left, right = (b, a) if SWAPPED else (a, b)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee", max_num_imprecise_acc=E4M3_TERMS,
                     out_dtype=SUM)  # fmt: skip
    if SWAPPED:
        acc = tl.trans(acc)
    if INT16:  # rows of acc are of high and low bytes in turn, two for each row of y
        high, low = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M // 2, 2, BLOCK_N)), (0, 2, 1)))
        acc = 256.0 * high.to(tl.float32) + low.to(tl.float32)
        m = block_m * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
        num_rows = num_rows // 2
    store_tile(acc, x_scale, scale, m, n, num_rows, out_features, y, SPLIT, X_SCALE, ROW_SCALES, COLUMN_SCALES)


GEMM = KernelSpec(_gemm, ("x", "x_scale", "weight", "scale"), ("num_rows", "in_features", "out_features"), ("y",))


def gemm(x: Operand, weight: Tensor, scale: Tensor | None, out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """y = (x @ weightᵀ) * scale * x.scale for the types of records.py.

    x: [num_tokens, in_features] in any form but the deinterleaved ones; weight: [out_features, in_features] of the
    type of x's values, or int8; scale: [out_features] float32, or None for 1; tile: None = what measured fastest
    -> [num_tokens, out_features]
    """
    x_rows, in_features = x.values.shape
    int16 = isinstance(x.form, Int16)
    num_tokens, out_features = x_rows // 2 if int16 else x_rows, weight.shape[0]
    tile = tile or choose_tile(x_rows, in_features, out_features, x.values.dtype, weight.dtype)
    y = torch.empty(num_tokens, out_features, dtype=out_dtype, device=weight.device)
    sum_dtype = torch.int32 if x.values.dtype == torch.int8 and not int16 else torch.float32
    scales = {
        "COLUMN_SCALES": scale is not None,
        "X_SCALE": x.scale is not None,
        "ROW_SCALES": x.scale is not None and x.scale.numel() > 1,
    }
    scale = x.values if scale is None else scale
    x_scale = scale if x.scale is None else x.scale
    inputs, constants = (x.values, x_scale, weight, scale), {"INT16": int16, **scales}
    multiply(GEMM, tile, inputs, constants, y, sum_dtype, (x_scale, scale), scales)
    return y
