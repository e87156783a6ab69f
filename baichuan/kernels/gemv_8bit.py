"""One token times an 8-bit matrix, int8 or e4m3, four weights a word."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import NormInput, gated
from baichuan.kernels.planes import make_planes
from baichuan.kernels.primitives import INTERPRETED, start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv


@triton.jit
def _bytes_as_floats(word, FP8: tl.constexpr):
    """The four bytes of each word, int8 or e4m3, as float32, exactly."""
    if INTERPRETED:
        a, b, c, d = word << 24 >> 24, word << 16 >> 24, word << 8 >> 24, word >> 24
        if FP8:
            a = a.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            b = b.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            c = c.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
            d = d.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        return a.to(tl.float32), b.to(tl.float32), c.to(tl.float32), d.to(tl.float32)
    if FP8:
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi, a, b, c, d;
            .reg .b32 low, high;
            mov.b32 {lo, hi}, $4;
            cvt.rn.f16x2.e4m3x2 low, lo;
            cvt.rn.f16x2.e4m3x2 high, hi;
            mov.b32 {a, b}, low;
            mov.b32 {c, d}, high;
            cvt.f32.f16 $0, a;
            cvt.f32.f16 $1, b;
            cvt.f32.f16 $2, c;
            cvt.f32.f16 $3, d;
            }""",
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return tl.inline_asm_elementwise(  # each byte becomes the mantissa of 2^23 + 128 + byte
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
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _add_products(acc, words, x0, x1, x2, x3, FP8: tl.constexpr):
    a, b, c, d = _bytes_as_floats(words, FP8)
    return acc + a * x0[None, :] + b * x1[None, :] + c * x2[None, :] + d * x3[None, :]


@triton.jit
def _gemv_8bit(
    planes, weight, scale, input_scale,
    chunks, out_features,
    y,
    FP8: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * words
    w = tl.load(rows + columns[None, :], (columns < words)[None, :], other=0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up_rows = rows + out_features.to(tl.int64) * words
        w_up = tl.load(up_rows + columns[None, :], (columns < words)[None, :], other=0)
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        mask, later = k < words, (k + BLOCK_K < words)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, other=0)
        x0 = tl.load(planes + k, mask, other=0.0)
        x1 = tl.load(planes + words + k, mask, other=0.0)
        x2 = tl.load(planes + 2 * words + k, mask, other=0.0)
        x3 = tl.load(planes + 3 * words + k, mask, other=0.0)
        acc = _add_products(acc, now, x0, x1, x2, x3, FP8)
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, other=0)
            acc_up = _add_products(acc_up, now, x0, x1, x2, x3, FP8)
    inside = n < out_features
    factor = 1.0
    if FP8:
        factor = tl.load(input_scale)
    sums = tl.sum(acc, 1) * (tl.load(scale + n, inside, other=0.0) * factor)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:
        up = tl.sum(acc_up, 1) * (tl.load(scale + out_features + n, inside, other=0.0) * factor)
        result = gated(sums, up, dtype)
    else:
        result = sums.to(dtype)
    tl.store(y + n, result, inside)


GEMV_8BIT = KernelSpec(_gemv_8bit, ("planes", "weight", "scale", "input_scale"), ("chunks", "out_features"), ("y",))


def gemv_8bit(
    x: Tensor | NormInput,
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    input_scale: Tensor | None = None,
    gated: bool = False,
    block_n: int = 4,
    block_k: int = 512,
    num_warps: int = 4,
) -> Tensor:
    """y = (x @ weightᵀ) * scale for one row x and int8 weights, or (e4m3(x / input_scale) @ weightᵀ) * input_scale *
    scale for e4m3 weights; gated: silu(first half of y) * second half.

    x: [1, in_features], or the norm that is to be taken first; weight: [out_features, in_features], in_features a
    multiple of 16; scale: [out_features] float32; input_scale: [1] float32 -> [1, out_features], or half of it if gated
    """
    planes = make_planes(x, 4, input_scale)
    out_features = weight.shape[0] // (2 if gated else 1)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV_8BIT.launch(
        (cdiv(out_features, block_n),),
        (planes, weight.view(torch.int32), scale, scale if input_scale is None else input_scale),
        (weight.shape[1] // 16, out_features),
        (y,),
        {"FP8": weight.dtype == torch.float8_e4m3fn, "GATED": gated, "BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=num_warps,
    )
    return y
