"""Several tokens times a matrix on the tensor cores; a quantised one is dequantised on its way to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import INTERPRETED, start_dependents, to_dtype, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2


@dataclass(frozen=True)
class Tile:
    """How the product is cut up."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1  # programs among which the input channels of one tile are divided


@triton.jit
def _int4_to_float16(packed):
    """_int4_to_dtype by the mantissa of 1024 + 8 + n."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 e, o, t, bias;
        mov.b32 bias, 0x64086408;
        shr.u32 t, $4, 4;
        lop3.b32 e, $4, 0x0F0F0F0F, 0x08080808, 0x6A;
        lop3.b32 o, t, 0x0F0F0F0F, 0x08080808, 0x6A;
        prmt.b32 t, e, 0x64646464, 0x4140;
        sub.f16x2 $0, t, bias;
        prmt.b32 t, e, 0x64646464, 0x4342;
        sub.f16x2 $1, t, bias;
        prmt.b32 t, o, 0x64646464, 0x4140;
        sub.f16x2 $2, t, bias;
        prmt.b32 t, o, 0x64646464, 0x4342;
        sub.f16x2 $3, t, bias;
        }""",
        "=r,=r,=r,=r,r",
        [packed],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _int4_to_dtype(packed, dtype: tl.constexpr, IN_PTX: tl.constexpr):
    """(even, odd) input channels of bytes that hold two signed nibbles, exactly."""
    if IN_PTX:
        return _int4_to_float16(packed)
    else:
        byte = packed.to(tl.int8, bitcast=True).to(tl.int32)
        return ((byte << 28) >> 28).to(dtype), (byte >> 4).to(dtype)


@triton.jit
def _scaled(sums, x_scale, scale, m, n, num_rows, out_features, X_SCALE: tl.constexpr, ROW_SCALES: tl.constexpr,
            COLUMN_SCALES: tl.constexpr):  # fmt: skip
    """The sums [rows m, columns n] times their scales, float32."""
    result = sums.to(tl.float32)
    if X_SCALE:
        if ROW_SCALES:
            result *= tl.load(x_scale + m, m < num_rows, other=0.0)[:, None]
        else:
            result *= tl.load(x_scale)
    if COLUMN_SCALES:
        result *= tl.load(scale + n, n < out_features, other=0.0).to(tl.float32)[None, :]
    return result


@triton.jit
def _gemm(
    x, x_scale, weight, scale,
    num_rows, in_features, width, out_features,
    y,
    INT4: tl.constexpr, GROUP: tl.constexpr, COLUMN_SCALES: tl.constexpr, ROW_SCALES: tl.constexpr,
    X_SCALE: tl.constexpr, PAIRS: tl.constexpr, PRECISION: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    band = tl.program_id(0) // (BAND * blocks_n)  # programs that run together share rows of x and of the weight
    band_height = tl.minimum(blocks_m - band * BAND, BAND)
    place = tl.program_id(0) % (BAND * blocks_n)
    block_m = band * BAND + place % band_height
    m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = place // band_height * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rows = x + tl.minimum(m, num_rows - 1).to(tl.int64)[:, None] * in_features
    w_rows = tl.minimum(n, out_features - 1).to(tl.int64)[:, None]
    exact: tl.constexpr = x.dtype.element_ty == tl.int8
    IN_PTX: tl.constexpr = x.dtype.element_ty == tl.float16 and not INTERPRETED
    # e4m3's sums are kept in float32 from block to block; by themselves the tensor cores keep fewer bits
    E4M3_TERMS: tl.constexpr = BLOCK_K if x.dtype.element_ty == tl.float8e4nv else None
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if exact else tl.float32)
    share = tl.cdiv(tl.cdiv(in_features, BLOCK_K), SPLITS) * BLOCK_K
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, in_features), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x_rows + k[None, :], (k < in_features)[None, :], other=0.0)
        if INT4:
            pair = start // 2 + tl.arange(0, BLOCK_K // 2)
            packed = tl.load(weight + w_rows * width + pair[None, :], (pair < width)[None, :], other=0)
            even, odd = _int4_to_dtype(packed, a.dtype, IN_PTX)
            b = tl.interleave(even, odd)  # [BLOCK_N, BLOCK_K]
            if GROUP > 0:
                SPAN: tl.constexpr = min(BLOCK_K, GROUP)  # of the block's channels that share a scale
                GROUPS: tl.constexpr = BLOCK_K // SPAN
                group = start // GROUP + tl.arange(0, GROUPS)
                groups = in_features // GROUP
                s = tl.load(scale + w_rows * groups + group[None, :], (group < groups)[None, :], other=0.0)
                b = tl.reshape(b, (BLOCK_N, GROUPS, SPAN)) * s.to(a.dtype)[:, :, None]
                b = tl.reshape(b, (BLOCK_N, BLOCK_K))
        else:
            b = tl.load(weight + w_rows * width + k[None, :], (k < in_features)[None, :], other=0.0)
            if b.dtype != a.dtype:
                b = to_dtype(b, a.dtype)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION, max_num_imprecise_acc=E4M3_TERMS,
                     out_dtype=acc.dtype)  # fmt: skip
    if PAIRS:  # from here on rows are of y
        high, low = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M // 2, 2, BLOCK_N)), (0, 2, 1)))
        acc = 256.0 * high.to(tl.float32) + low.to(tl.float32)
        m = block_m * (BLOCK_M // 2) + tl.arange(0, BLOCK_M // 2)
        num_rows = num_rows // 2
    inside = (m < num_rows)[:, None] & (n < out_features)[None, :]
    target = m.to(tl.int64)[:, None] * out_features + n[None, :]
    if SPLITS > 1:
        tl.store(y + tl.program_id(1).to(tl.int64) * num_rows * out_features + target, acc, inside)
    else:
        result = _scaled(acc, x_scale, scale, m, n, num_rows, out_features, X_SCALE, ROW_SCALES, COLUMN_SCALES)
        tl.store(y + target, result.to(y.dtype.element_ty), inside)


GEMM = KernelSpec(
    _gemm, ("x", "x_scale", "weight", "scale"), ("num_rows", "in_features", "width", "out_features"), ("y",)
)


@triton.jit
def _add_parts(
    parts, x_scale, scale,
    num_rows, out_features,
    y,
    SPLITS: tl.constexpr, ROW_SCALES: tl.constexpr, X_SCALE: tl.constexpr, COLUMN_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m < num_rows)[:, None] & (n < out_features)[None, :]
    place = m.to(tl.int64)[:, None] * out_features + n[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), parts.dtype.element_ty)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + place + split * num_rows.to(tl.int64) * out_features, inside, other=0)
    result = _scaled(total, x_scale, scale, m, n, num_rows, out_features, X_SCALE, ROW_SCALES, COLUMN_SCALES)
    tl.store(y + place, result.to(y.dtype.element_ty), inside)


ADD_PARTS = KernelSpec(_add_parts, ("parts", "x_scale", "scale"), ("num_rows", "out_features"), ("y",))


# What measures fastest on an H200 for up to so many rows of x: by far most time goes into the weights where rows are
# few, and into the tensor cores where they are many.
TILES = {
    "bytes": (
        (16, Tile(16, 64, 256, 4, 4)),
        (32, Tile(32, 64, 128, 4, 6)),
        (64, Tile(64, 64, 128, 4, 5)),
        (128, Tile(128, 64, 128, 4, 5)),
        (None, Tile(128, 128, 128, 8, 3)),
    ),
    "converted": (
        (16, Tile(16, 32, 256, 4, 4)),
        (32, Tile(32, 32, 256, 4, 4)),
        (64, Tile(64, 64, 128, 4, 4)),
        (None, Tile(128, 128, 64, 4, 3)),
    ),
    "dense": (
        (16, Tile(16, 64, 128, 4, 5)),
        (64, Tile(64, 64, 64, 4, 6)),
        (None, Tile(128, 128, 64, 8, 3)),
    ),
    "float32": ((None, Tile(16, 32, 64, 4, 2)),),
}
PROGRAMS = 264  # as many as a GPU's multiprocessors run at once; input channels are split to come near it
MIN_STEPS = 4  # blocks of input channels that a split has at least


def choose_tile(
    num_rows: int, in_features: int, out_features: int, x_dtype: torch.dtype, weight_dtype: torch.dtype
) -> Tile:
    """The tile for num_rows rows of x (for pairs, two a token)."""
    if x_dtype == torch.float32:
        kind = "float32"
    elif x_dtype == weight_dtype:
        kind = "bytes" if x_dtype.itemsize == 1 else "dense"
    else:
        kind = "converted"
    tile = next(tile for limit, tile in TILES[kind] if limit is None or num_rows <= limit)
    return split(tile, num_rows, in_features, out_features, PROGRAMS, MIN_STEPS)


def split(tile: Tile, num_rows: int, in_features: int, out_features: int, max_programs: int, min_steps: int) -> Tile:
    """The tile with the most splits, a power of two, that keep within max_programs and leave min_steps to each."""
    programs, splits = cdiv(num_rows, tile.block_m) * cdiv(out_features, tile.block_n), 1
    while 2 * splits * programs <= max_programs and cdiv(in_features, tile.block_k) >= 2 * splits * min_steps:
        splits *= 2
    return replace(tile, splits=splits)


def gemm(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    out_dtype: torch.dtype,
    x_scale: Tensor | None = None,
    pairs: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """y = (x @ W(weight)ᵀ) * scale * x_scale for the types of records.py.

    x: [num_rows, in_features] of a float type, or int8 or e4m3 with x_scale [1] or [num_rows], or 16-bit numbers as
    pairs, [2 * num_rows, in_features] int8 as store_row.py writes them, with x_scale [num_rows];
    weight: [out_features, in_features] of x's type or int8, or [out_features, in_features / 2] uint8;
    scale: [out_features], or [out_features, groups] for uint8, or None for 1 -> [num_rows, out_features]
    """
    x_rows, in_features = x.shape
    num_rows = x_rows // 2 if pairs else x_rows
    out_features, width = weight.shape
    int4 = weight.dtype == torch.uint8
    groups = scale.shape[1] if int4 else 1
    tile = tile or choose_tile(x_rows, in_features, out_features, x.dtype, weight.dtype)
    y = torch.empty(num_rows, out_features, dtype=out_dtype, device=x.device)
    target = y
    if tile.splits > 1:
        sum_dtype = torch.int32 if x.dtype == torch.int8 and not pairs else torch.float32
        target = torch.empty(tile.splits, num_rows, out_features, dtype=sum_dtype, device=x.device)
    scales = {
        "COLUMN_SCALES": scale is not None and groups == 1,
        "X_SCALE": x_scale is not None,
        "ROW_SCALES": x_scale is not None and x_scale.numel() > 1,
    }
    scale = x if scale is None else scale
    x_scale = scale if x_scale is None else x_scale
    GEMM.launch(
        (cdiv(x_rows, tile.block_m) * cdiv(out_features, tile.block_n), tile.splits),
        (x, x_scale, weight, scale),
        (x_rows, in_features, width, out_features),
        (target,),
        {
            "INT4": int4,
            "GROUP": 0 if groups == 1 else in_features // groups,
            "PRECISION": "ieee",
            "SPLITS": tile.splits,
            "PAIRS": pairs,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BAND": 8,
            **scales,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if tile.splits > 1:
        block_m, block_n = min(next_power_of_2(num_rows), 4), 512
        ADD_PARTS.launch(
            (cdiv(num_rows, block_m), cdiv(out_features, block_n)),
            (target, x_scale, scale),
            (num_rows, out_features),
            (y,),
            {"SPLITS": tile.splits, "BLOCK_M": block_m, "BLOCK_N": block_n, **scales},
        )
    return y
