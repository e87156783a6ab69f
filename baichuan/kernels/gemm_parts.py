"""What the products on the tensor cores share: launch, scales, and the sum of splits.

Where y has too few tiles for all of the GPU's processors, a tile's input channels are shared out to several programs,
its splits (split-K).  Each writes its unscaled sums to a part of its own, and a second kernel adds the parts up:

    splits 1:   gemm -> y
    splits 3:   gemm -> parts [3, num_tokens, out_features] -> add_parts -> y = scales * (part 0 + part 1 + part 2)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2, shared_memory
from baichuan.kernels.tiles import Tile

SPARE_BYTES = 4 << 10  # bytes of shared memory that stages leave free, for scales that threads exchange


@triton.jit
def scaled(sums, x_scale, scale, m, n, num_rows, out_features, X_SCALE: tl.constexpr, ROW_SCALES: tl.constexpr,
           COLUMN_SCALES: tl.constexpr):  # fmt: skip
    """The sums of y[m, n] times their scales, in float32; m, n: row and column numbers."""
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
def store_tile(sums, x_scale, scale, m, n, num_rows, out_features, y, SPLIT: tl.constexpr, X_SCALE: tl.constexpr,
               ROW_SCALES: tl.constexpr, COLUMN_SCALES: tl.constexpr):  # fmt: skip
    """Write the sums of y[m, n], scaled; with SPLIT unscaled, to this split's part, where y points to the parts."""
    inside = (m < num_rows)[:, None] & (n < out_features)[None, :]
    target = m.to(tl.int64)[:, None] * out_features + n[None, :]
    if SPLIT:
        tl.store(y + tl.program_id(1).to(tl.int64) * num_rows * out_features + target, sums, inside)
    else:
        result = scaled(sums, x_scale, scale, m, n, num_rows, out_features, X_SCALE, ROW_SCALES, COLUMN_SCALES)
        tl.store(y + target, result.to(y.dtype.element_ty), inside)


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
        total += tl.load(parts + place + tl.cast(split, tl.int64) * num_rows * out_features, inside, other=0)
    result = scaled(total, x_scale, scale, m, n, num_rows, out_features, X_SCALE, ROW_SCALES, COLUMN_SCALES)
    tl.store(y + place, result.to(y.dtype.element_ty), inside)


ADD_PARTS = KernelSpec(_add_parts, ("parts", "x_scale", "scale"), ("num_rows", "out_features"), ("y",))


def stages_that_fit(tile: Tile, x: Tensor, weight: Tensor) -> int:
    """The tile's stages, or as many as fit into shared memory: a stage is a block of x and one of the weight, block_k
    channels each.
    """
    bytes_per_stage = tile.block_k * (tile.block_m * x[0].nbytes + tile.block_n * weight[0].nbytes) // x.shape[1]
    return max(min(tile.num_stages, (shared_memory(x.device) - SPARE_BYTES) // bytes_per_stage), 1)


def multiply(
    kernel: KernelSpec,
    tile: Tile,
    inputs: Sequence[Tensor],
    constants: Mapping[str, object],
    y: Tensor,
    sum_dtype: torch.dtype,
    factors: tuple[Tensor, Tensor],
    scales: Mapping[str, bool],
) -> None:
    """Launch a kernel that ends with store_tile, and add_parts after it where the tile has splits.

    inputs: of the kernel, the first x [x_rows, in_features], among the others weight [out_features, ...];
    y: [num_tokens, out_features]; sum_dtype: of the parts; factors: x_scale and scale; scales: which are applied
    """
    (x_rows, in_features), out_features = inputs[0].shape, y.shape[1]
    target = y if tile.splits == 1 else torch.empty(tile.splits, *y.shape, dtype=sum_dtype, device=y.device)
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
    kernel.launch(
        (cdiv(x_rows, tile.block_m) * cdiv(out_features, tile.block_n), tile.splits),
        inputs,
        (x_rows, in_features, out_features),
        (target,),
        {"SPLIT": tile.splits > 1, **blocks, **constants},
        num_warps=tile.num_warps,
        num_stages=stages_that_fit(tile, inputs[0], inputs[kernel.inputs.index("weight")]),
    )
    if target is not y:
        add_parts(target, factors, scales, y)


def add_parts(parts: Tensor, factors: tuple[Tensor, Tensor], scales: Mapping[str, bool], y: Tensor) -> None:
    """Write the sum of the parts, scaled, to y.  parts: [splits, num_tokens, out_features]; the others as above"""
    splits, num_rows, out_features = parts.shape
    block_m, block_n = min(next_power_of_2(num_rows), 4), 512
    ADD_PARTS.launch(
        (cdiv(num_rows, block_m), cdiv(out_features, block_n)),
        (parts, *factors),
        (num_rows, out_features),
        (y,),
        {"SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, **scales},
    )


def scale_sums(sums: Tensor, x_scale: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """sums * x_scale * scale in out_dtype.

    sums: [num_tokens, out_features] float32 or int32, or parts [splits, num_tokens, out_features] that are added up;
    x_scale: [1] or [num_tokens]; scale: [out_features]
    """
    parts = sums if sums.dim() == 3 else sums[None]
    y = torch.empty(parts.shape[1:], dtype=out_dtype, device=sums.device)
    scales = {"COLUMN_SCALES": True, "X_SCALE": True, "ROW_SCALES": x_scale.numel() > 1}
    add_parts(parts, (x_scale, scale), scales, y)
    return y
