"""What splits of keys have made of a row's attention, combined: for decode_attention and prefill_attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec


@triton.jit
def if_single(num_singles, row, context, HEAD_DIM: tl.constexpr):
    """(context, dimensions to write) of a row with one new token; 0 and 0 of a prompt's and of padding"""
    single = row < tl.load(num_singles)
    return tl.where(single, context, 0), tl.where(single, HEAD_DIM, 0)


@triton.jit
def _combine_splits(
    parts, part_sums, num_singles, context_lengths,
    num_heads,
    out,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, MIXED: tl.constexpr,
    SUMS_SAY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """SUMS_SAY: a split with a total of 0 has no part, a row without parts is not written; False: by the lengths."""
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    written = HEAD_DIM
    used = splits >= 0
    if not SUMS_SAY:
        context = tl.load(context_lengths + row)
        if MIXED:
            context, written = if_single(num_singles, row, context, HEAD_DIM)
        share = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_K) * BLOCK_K
        used = splits * share < context
    part = (row.to(tl.int64) * num_heads + head) * SPLITS + splits
    peaks = tl.load(part_sums + part * 2, used, other=-1e30)
    totals = tl.load(part_sums + part * 2 + 1, used, other=0.0)
    if SUMS_SAY:
        used = totals > 0
        written = tl.where(tl.max(totals, 0) > 0, HEAD_DIM, 0)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.maximum(tl.sum(totals * weight, 0), 1e-30)  # 0 only in a row of padding
    result = tl.sum(values * weight[:, None], 0) / total
    target = (row.to(tl.int64) * num_heads + head) * HEAD_DIM + dims
    tl.store(out + target, result.to(out.dtype.element_ty), dims < written)


COMBINE_SPLITS = KernelSpec(
    _combine_splits, ("parts", "part_sums", "num_singles", "context_lengths"), ("num_heads",), ("out",)
)


def parts_of(rows: int, heads: int, splits: int, dim: int, out: Tensor) -> tuple[Tensor, Tensor]:
    """(parts, part_sums): room for what each split makes, float32; `out` twice where there is one split."""
    if splits == 1:
        return out, out
    parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=out.device)
    return parts, torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=out.device)
