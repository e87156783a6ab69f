"""One token times an 8-bit matrix, int8 or e4m3, four weights a word."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import gated
from baichuan.kernels.planes import Planes, new_output, store_channels
from baichuan.kernels.primitives import INTERPRETED, prefetch, start_dependents, wait_for_inputs
from baichuan.kernels.spec import FLOATS, GemvBlock, KernelSpec, cdiv


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
    FP8: tl.constexpr, GATED: tl.constexpr, PLANES: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr, MODIFIER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    row = weight + tl.minimum(n, out_features - 1).to(tl.int64) * words
    rows = row[:, None]
    w = tl.load(rows + columns[None, :], (columns < words)[None, :], other=0, cache_modifier=MODIFIER)
    prefetch(row, BLOCK_K, words, LINES)
    inside = n < out_features
    column_scale = tl.load(scale + n, inside, other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up_row = row + out_features.to(tl.int64) * words
        up_rows = up_row[:, None]
        w_up = tl.load(up_rows + columns[None, :], (columns < words)[None, :], other=0, cache_modifier=MODIFIER)
        prefetch(up_row, BLOCK_K, words, LINES)
        up_scale = tl.load(scale + out_features + n, inside, other=0.0)
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        mask, later = k < words, (k + BLOCK_K < words)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, other=0, cache_modifier=MODIFIER)
        x0 = tl.load(planes + k, mask, other=0.0)
        x1 = tl.load(planes + words + k, mask, other=0.0)
        x2 = tl.load(planes + 2 * words + k, mask, other=0.0)
        x3 = tl.load(planes + 3 * words + k, mask, other=0.0)
        acc = _add_products(acc, now, x0, x1, x2, x3, FP8)
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, other=0, cache_modifier=MODIFIER)
            acc_up = _add_products(acc_up, now, x0, x1, x2, x3, FP8)
    factor = 1.0
    if FP8:
        factor = tl.load(input_scale)
    sums = tl.sum(acc, 1) * (column_scale * factor)
    if GATED:
        up = tl.sum(acc_up, 1) * (up_scale * factor)
        sums = gated(sums, up, ROUND)
    store_channels(y, sums.to(ROUND).to(tl.float32), n, inside, out_features, PLANES)


GEMV_8BIT = KernelSpec(_gemv_8bit, ("planes", "weight", "scale", "input_scale"), ("chunks", "out_features"), ("y",))


def choose_block(out_features: int, gated: bool) -> GemvBlock:
    """What measures fastest on an H200."""
    if gated:
        return GemvBlock(2, 256, 2, 16)
    return GemvBlock(8, 512, 4, 8) if out_features <= 8192 else GemvBlock(4, 512, 4, 16)


def gemv_8bit(
    planes: Planes,
    weight: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    input_scale: Tensor | None = None,
    gated: bool = False,
    out_planes: int = 0,
    block: GemvBlock | None = None,
) -> Tensor | Planes:
    """y = (x @ weightᵀ) * scale for one row x and int8 weights, or (x8 @ weightᵀ) * input_scale * scale for e4m3
    weights and x8 = e4m3(x / input_scale); gated: silu(first half of y) * second half.

    planes: of x or x8, four; weight: [out_features, in_features], in_features a multiple of 16;
    scale: [out_features] float32; input_scale: [1] float32 -> [1, out_features], or half of it if gated; as so many
    planes for out_planes > 0.
    """
    out_features = weight.shape[0] // (2 if gated else 1)
    block = block or choose_block(out_features, gated)
    y = new_output(out_features, out_dtype, weight.device, out_planes)
    GEMV_8BIT.launch(
        (cdiv(out_features, block.block_n),),
        (planes.values, weight.view(torch.int32), scale, scale if input_scale is None else input_scale),
        (weight.shape[1] // 16, out_features),
        (y.values if out_planes else y,),
        {
            "FP8": weight.dtype == torch.float8_e4m3fn,
            "GATED": gated,
            "PLANES": out_planes,
            "ROUND": FLOATS[out_dtype],
            **block.constants,
        },
        num_warps=block.num_warps,
    )
    return y
