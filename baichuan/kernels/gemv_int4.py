"""One token times a 4-bit matrix, eight weights a word.

Unpacking must cost few instructions, as a word brings eight multiply-adds: masked out where it stands, in the word or
in the word shifted by whole bytes, a nibble n becomes mantissa bits of a float32 near 128, which is 128 + n ^ 8 for the
even nibbles and 128 + (n ^ 8) / 16 for the odd ones.  The planes of the odd ones hold 16 x; what the constants add to a
word's sum is known from x alone and is taken from it at once, for all rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import gated
from baichuan.kernels.planes import Planes, new_output, store_channels
from baichuan.kernels.primitives import INTERPRETED, prefetch, start_dependents, wait_for_inputs
from baichuan.kernels.spec import FLOATS, GemvBlock, KernelSpec, cdiv

CHUNK = 32  # input channels in 16 bytes, which one group holds


@triton.jit
def _offset_nibbles(word):
    """Nibble j of each word as 136 + n for even j and 128 + (n + 8) / 16 for odd j, float32, exactly."""
    if INTERPRETED:
        return (
            136.0 + (word << 28 >> 28).to(tl.float32), 128.0 + ((word << 24 >> 28) + 8).to(tl.float32) / 16,
            136.0 + (word << 20 >> 28).to(tl.float32), 128.0 + ((word << 16 >> 28) + 8).to(tl.float32) / 16,
            136.0 + (word << 12 >> 28).to(tl.float32), 128.0 + ((word << 8 >> 28) + 8).to(tl.float32) / 16,
            136.0 + (word << 4 >> 28).to(tl.float32), 128.0 + ((word >> 28) + 8).to(tl.float32) / 16,
        )  # fmt: skip
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        shl.b32 a, $8, 16;
        shl.b32 b, $8, 8;
        shr.u32 c, $8, 8;
        shr.u32 d, $8, 16;
        lop3.b32 $0, a, 0x000F0000, 0x43080000, 0x6A;
        lop3.b32 $1, b, 0x0000F000, 0x43008000, 0x6A;
        lop3.b32 $2, b, 0x000F0000, 0x43080000, 0x6A;
        lop3.b32 $3, $8, 0x0000F000, 0x43008000, 0x6A;
        lop3.b32 $4, $8, 0x000F0000, 0x43080000, 0x6A;
        lop3.b32 $5, c, 0x0000F000, 0x43008000, 0x6A;
        lop3.b32 $6, c, 0x000F0000, 0x43080000, 0x6A;
        lop3.b32 $7, d, 0x0000F000, 0x43008000, 0x6A;
        }""",
        "=f,=f,=f,=f,=f,=f,=f,=f,r",
        [word],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _add_products(acc, words, x0, x1, x2, x3, x4, x5, x6, x7):
    a, b, c, d, e, f, g, h = _offset_nibbles(words)
    acc = acc + a * x0[None, :] + b * x1[None, :] + c * x2[None, :] + d * x3[None, :]
    return acc + e * x4[None, :] + f * x5[None, :] + g * x6[None, :] + h * x7[None, :]


@triton.jit
def _add_groups(acc, part, scales, k, words, WORDS_PER_GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):  # fmt: skip
    """acc + the sums of four words, which never straddle groups, times their scales."""
    part = tl.sum(tl.reshape(part, (BLOCK_N, BLOCK_K // 4, 4)), 2)
    first = k + tl.arange(0, BLOCK_K // 4) * 4
    scale = tl.load(scales + (first // WORDS_PER_GROUP)[None, :], (first < words)[None, :], other=0.0)
    return acc + part * scale.to(tl.float32)


@triton.jit
def _gemv_int4(
    planes, packed, scale,
    chunks, out_features,
    y,
    WORDS_PER_GROUP: tl.constexpr, GATED: tl.constexpr, PLANES: tl.constexpr, ROUND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LINES: tl.constexpr, MODIFIER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    words = chunks * 4
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, out_features - 1).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    rows = (packed + row * words)[:, None]
    # beyond the row any bits are numbers, and x is 0 there
    w = tl.load(rows + columns[None, :], (columns < words)[None, :], cache_modifier=MODIFIER)
    prefetch(packed + row * words, BLOCK_K, words, LINES)
    inside = n < out_features
    if WORDS_PER_GROUP == 0:
        row_scale = tl.load(scale + n, inside, other=0.0).to(tl.float32)
    WIDTH: tl.constexpr = BLOCK_K if WORDS_PER_GROUP == 0 else BLOCK_K // 4
    acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    if GATED:
        up_rows = rows + out_features.to(tl.int64) * words
        w_up = tl.load(up_rows + columns[None, :], (columns < words)[None, :], cache_modifier=MODIFIER)
        prefetch(packed + (row + out_features) * words, BLOCK_K, words, LINES)
        acc_up = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        if WORDS_PER_GROUP == 0:
            up_scale = tl.load(scale + out_features + n, inside, other=0.0).to(tl.float32)
    if WORDS_PER_GROUP > 0:
        scales = scale + row[:, None] * (words // WORDS_PER_GROUP)
        up_scales = scales + out_features.to(tl.int64) * (words // WORDS_PER_GROUP)
    wait_for_inputs(OVERLAP)
    for start in range(0, words, BLOCK_K):
        k = start + columns
        mask, later = k < words, (k + BLOCK_K < words)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, cache_modifier=MODIFIER)
        x0 = tl.load(planes + k, mask, other=0.0)
        x1 = tl.load(planes + words + k, mask, other=0.0)
        x2 = tl.load(planes + 2 * words + k, mask, other=0.0)
        x3 = tl.load(planes + 3 * words + k, mask, other=0.0)
        x4 = tl.load(planes + 4 * words + k, mask, other=0.0)
        x5 = tl.load(planes + 5 * words + k, mask, other=0.0)
        x6 = tl.load(planes + 6 * words + k, mask, other=0.0)
        x7 = tl.load(planes + 7 * words + k, mask, other=0.0)
        constant = (136.0 * (x0 + x2 + x4 + x6) + 128.5 * (x1 + x3 + x5 + x7))[None, :]
        if WORDS_PER_GROUP > 0:
            part = _add_products(-constant, now, x0, x1, x2, x3, x4, x5, x6, x7)
            acc = _add_groups(acc, part, scales, start, words, WORDS_PER_GROUP, BLOCK_N, BLOCK_K)
        else:
            acc = _add_products(acc - constant, now, x0, x1, x2, x3, x4, x5, x6, x7)
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, cache_modifier=MODIFIER)
            if WORDS_PER_GROUP > 0:
                part = _add_products(-constant, now, x0, x1, x2, x3, x4, x5, x6, x7)
                acc_up = _add_groups(acc_up, part, up_scales, start, words, WORDS_PER_GROUP, BLOCK_N, BLOCK_K)
            else:
                acc_up = _add_products(acc_up - constant, now, x0, x1, x2, x3, x4, x5, x6, x7)
    sums = tl.sum(acc, 1)
    if WORDS_PER_GROUP == 0:
        sums *= row_scale
    if GATED:
        up = tl.sum(acc_up, 1)
        if WORDS_PER_GROUP == 0:
            up *= up_scale
        sums = gated(sums, up, ROUND)
    store_channels(y, sums.to(ROUND).to(tl.float32), n, inside, out_features, PLANES)


GEMV_INT4 = KernelSpec(_gemv_int4, ("planes", "packed", "scale"), ("chunks", "out_features"), ("y",))


def choose_block(out_features: int, gated: bool) -> GemvBlock:
    """What measures fastest on an H200."""
    if gated:
        return GemvBlock(2, 128, 1, 8)
    return GemvBlock(4, 256, 2, 8) if out_features <= 8192 else GemvBlock(4, 128, 1, 8)


def gemv_int4(
    planes: Planes,
    packed: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    out_planes: int = 0,
    block: GemvBlock | None = None,
) -> Tensor | Planes:
    """y = x @ (unpack(packed) * scale)ᵀ for one row x; gated: silu(first half of y) * second half.

    planes: of x, eight; packed: [out_features, in_features / 2] uint8, in_features a multiple of 32;
    scale: [out_features, groups] -> [1, out_features], or half of it if gated; as so many planes for
    out_planes > 0.
    """
    words = packed.shape[1] // 4
    out_features = packed.shape[0] // (2 if gated else 1)
    block = block or choose_block(out_features, gated)
    y = new_output(out_features, out_dtype, packed.device, out_planes)
    groups = scale.shape[1]
    GEMV_INT4.launch(
        (cdiv(out_features, block.block_n),),
        (planes.values, packed.view(torch.int32), scale),
        (words // 4, out_features),
        (y.values if out_planes else y,),
        {
            "WORDS_PER_GROUP": 0 if groups == 1 else words // groups,
            "GATED": gated,
            "PLANES": out_planes,
            "ROUND": FLOATS[out_dtype],
            **block.constants,
        },
        num_warps=block.num_warps,
    )
    return y
