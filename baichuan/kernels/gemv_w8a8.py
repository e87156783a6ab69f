"""One token of 8-bit integers times an 8-bit matrix, four products an instruction, summed exactly in int32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import gated
from baichuan.kernels.primitives import INTERPRETED, prefetch, start_dependents, wait_for_inputs
from baichuan.kernels.spec import GemvBlock, KernelSpec, cdiv


@triton.jit
def _add_dot4(acc, a, b):
    """acc + the sum of the four products of signed bytes of the words a and b."""
    if INTERPRETED:
        for byte in tl.static_range(4):
            acc += ((a << (24 - 8 * byte)) >> 24) * ((b << (24 - 8 * byte)) >> 24)
        return acc
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _gemv_w8a8(
    x, weight, scale, input_scale,
    chunks, out_features,
    y,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr, MODIFIER: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row = weight + tl.minimum(n, out_features - 1).to(tl.int64) * words
    rows = row[:, None]
    # beyond the row any bits are numbers, and x is 0 there
    w = tl.load(rows + columns[None, :], (columns < words)[None, :], cache_modifier=MODIFIER)
    prefetch(row, BLOCK_K, words, LINES)
    inside = n < out_features
    column_scale = tl.load(scale + n, inside, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    if GATED:
        up_row = row + out_features.to(tl.int64) * words
        up_rows = up_row[:, None]
        w_up = tl.load(up_rows + columns[None, :], (columns < words)[None, :], cache_modifier=MODIFIER)
        prefetch(up_row, BLOCK_K, words, LINES)
        up_scale = tl.load(scale + out_features + n, inside, other=0.0)
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    wait_for_inputs(OVERLAP)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        later = (k + BLOCK_K < words)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, cache_modifier=MODIFIER)
        factor = tl.load(x + k, k < words, other=0)
        acc = _add_dot4(acc, now, factor[None, :])
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, cache_modifier=MODIFIER)
            acc_up = _add_dot4(acc_up, now, factor[None, :])
    factor = tl.load(input_scale)
    sums = tl.sum(acc, 1).to(tl.float32) * (column_scale * factor)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:
        sums = gated(sums, tl.sum(acc_up, 1).to(tl.float32) * (up_scale * factor), dtype)
    tl.store(y + n, sums.to(dtype), inside)


GEMV_W8A8 = KernelSpec(_gemv_w8a8, ("x", "weight", "scale", "input_scale"), ("chunks", "out_features"), ("y",))


def choose_block(out_features: int, gated: bool) -> GemvBlock:
    """What measures fastest on an H200."""
    return GemvBlock(2, 256, 2, 16) if gated else GemvBlock(2, 512, 4, 32)


def gemv_w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    block: GemvBlock | None = None,
) -> Tensor:
    """y = (x @ weightᵀ) * scale * input_scale for one row x; gated: silu(first half of y) * second half.

    x: [1, in_features] int8, in_features a multiple of 16; weight: [out_features, in_features] int8;
    scale: [out_features] float32; input_scale: [1] float32 -> [1, out_features], or half of it if gated.
    """
    out_features = weight.shape[0] // (2 if gated else 1)
    block = block or choose_block(out_features, gated)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV_W8A8.launch(
        (cdiv(out_features, block.block_n),),
        (x.view(torch.int32), weight.view(torch.int32), scale, input_scale),
        (weight.shape[1] // 16, out_features),
        (y,),
        {"GATED": gated, **block.constants},
        num_warps=block.num_warps,
    )
    return y
