"""Combining the splits of a row's keys into its attention.

With part, peak and total of each split i:  sum_i part_i * w_i / sum_i total_i * w_i,  w_i = exp2(peak_i - largest peak)

prefill_attention starts a kernel for that, and so does decode_attention for few pairs of (sequence, head); for more the
split of a row that ends last does it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec


@triton.jit
def combine_parts(parts, part_sums, pair, used, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """[DIM_BLOCK] attention of a pair of (sequence, head) from its first `used` splits."""
    AT_ONCE: tl.constexpr = 8 if SPLITS > 8 else SPLITS  # splits whose values are in registers together
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    sums = part_sums + (pair * SPLITS + splits) * 2
    peaks = tl.load(sums, splits < used, other=-1e30)
    peak = tl.max(peaks, 0)
    total = tl.sum(tl.load(sums + 1, splits < used, other=0.0) * tl.exp2(peaks - peak), 0)
    result = tl.zeros((DIM_BLOCK,), tl.float32)
    for first in tl.static_range(0, SPLITS, AT_ONCE):
        splits = first + tl.arange(0, AT_ONCE)
        part = pair * SPLITS + splits
        weight = tl.exp2(tl.load(part_sums + part * 2, splits < used, other=-1e30) - peak)
        mask = (splits < used)[:, None] & (dims < HEAD_DIM)[None, :]
        values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
        result += tl.sum(values * weight[:, None], 0)
    return result / total


@triton.jit
def _combine_splits(
    parts, part_sums,
    num_heads,
    out,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A split with a total of 0 has no part.  A row without parts, another kernel's or padding, is not written."""
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    part = (row.to(tl.int64) * num_heads + head) * SPLITS + splits
    peaks = tl.load(part_sums + part * 2)
    totals = tl.load(part_sums + part * 2 + 1)
    used = totals != 0  # a total that is NaN comes from a part that is
    written = tl.where(tl.max(used.to(tl.int32), 0) > 0, HEAD_DIM, 0)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    result = tl.sum(values * weight[:, None], 0) / tl.sum(totals * weight, 0)
    target = (row.to(tl.int64) * num_heads + head) * HEAD_DIM + dims
    tl.store(out + target, result.to(out.dtype.element_ty), dims < written)


COMBINE_SPLITS = KernelSpec(_combine_splits, ("parts", "part_sums"), ("num_heads",), ("out",))


def parts_of(rows: int, heads: int, splits: int, dim: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """(parts, part_sums): room for what each split makes, float32; `out` twice where there is one split."""
    if splits == 1:
        return out, out
    parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=out.device)
    return parts, torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=out.device)
