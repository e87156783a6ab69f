"""The end of a product on the tensor cores: its scales, and the sum of the parts of programs that share a tile."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2


@triton.jit
def scaled(sums, x_scale, scale, m, n, num_rows, out_features, X_SCALE: tl.constexpr, ROW_SCALES: tl.constexpr,
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
def store_tile(sums, x_scale, scale, m, n, num_rows, out_features, y, SPLITS: tl.constexpr, X_SCALE: tl.constexpr,
               ROW_SCALES: tl.constexpr, COLUMN_SCALES: tl.constexpr):  # fmt: skip
    """Write the sums [rows m, columns n] to y, scaled unless they are one of several parts."""
    inside = (m < num_rows)[:, None] & (n < out_features)[None, :]
    target = m.to(tl.int64)[:, None] * out_features + n[None, :]
    if SPLITS > 1:
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


def part_target(y: Tensor, splits: int, sum_dtype: torch.dtype) -> Tensor:
    """Where the product's kernel writes: y itself, or [splits, *y.shape] of the sums' dtype."""
    return y if splits == 1 else torch.empty(splits, *y.shape, dtype=sum_dtype, device=y.device)


def add_parts(parts: Tensor, x_scale: Tensor, scale: Tensor, y: Tensor, scales: Mapping[str, bool]) -> None:
    """y = the scaled sum of what part_target holds; nothing where that is y.  scales: see `scaled`."""
    if parts is y:
        return
    num_rows, out_features = y.shape
    block_m, block_n = min(next_power_of_2(num_rows), 4), 512
    ADD_PARTS.launch(
        (cdiv(num_rows, block_m), cdiv(out_features, block_n)),
        (parts, x_scale, scale),
        (num_rows, out_features),
        (y,),
        {"SPLITS": parts.shape[0], "BLOCK_M": block_m, "BLOCK_N": block_n, **scales},
    )
