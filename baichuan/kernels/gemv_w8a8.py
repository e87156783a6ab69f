"""One token of 8-bit integers times an 8-bit matrix, four products an instruction, summed exactly in int32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import gated
from baichuan.kernels.primitives import INTERPRETED, start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv


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
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * words
    w = tl.load(rows + columns[None, :], (columns < words)[None, :])  # any bits are numbers, and x is 0 there
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    if GATED:
        up_rows = rows + out_features.to(tl.int64) * words
        w_up = tl.load(up_rows + columns[None, :], (columns < words)[None, :])
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.int32)
    wait_for_inputs(OVERLAP)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        later = (k + BLOCK_K < words)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later)
        factor = tl.load(x + k, k < words, other=0)
        acc = _add_dot4(acc, now, factor[None, :])
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later)
            acc_up = _add_dot4(acc_up, now, factor[None, :])
    inside = n < out_features
    factor = tl.load(input_scale)
    sums = tl.sum(acc, 1).to(tl.float32) * (tl.load(scale + n, inside, other=0.0) * factor)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:
        up = tl.sum(acc_up, 1).to(tl.float32) * (tl.load(scale + out_features + n, inside, other=0.0) * factor)
        result = gated(sums, up, dtype)
    else:
        result = sums.to(dtype)
    tl.store(y + n, result, inside)


GEMV_W8A8 = KernelSpec(_gemv_w8a8, ("x", "weight", "scale", "input_scale"), ("chunks", "out_features"), ("y",))


def gemv_w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    input_scale: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    block_n: int = 4,
    block_k: int = 512,
    num_warps: int = 4,
) -> Tensor:
    """y = (x @ weightᵀ) * scale * input_scale for one row x; gated: silu(first half of y) * second half.

    x: [1, in_features] int8, in_features a multiple of 16; weight: [out_features, in_features] int8;
    scale: [out_features] float32; input_scale: [1] float32 -> [1, out_features], or half of it if gated.
    """
    out_features = weight.shape[0] // (2 if gated else 1)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV_W8A8.launch(
        (cdiv(out_features, block_n),),
        (x.view(torch.int32), weight.view(torch.int32), scale, input_scale),
        (weight.shape[1] // 16, out_features),
        (y,),
        {"GATED": gated, "BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=num_warps,
    )
    return y
