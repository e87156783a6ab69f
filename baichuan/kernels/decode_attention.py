"""Attention of one new token a sequence: rotation, KV store and softmax in one kernel, long caches split.

Every slot of a block of keys keeps a softmax of its own over the keys that it meets, so that the loop waits for no
other thread; the slots, and then the splits, are combined in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.kv_store import as_cached
from baichuan.kernels.prefill_attention import LOG2_E
from baichuan.kernels.primitives import start_dependents, to_float32, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.records import AttentionSpec, LayerCache, Step

# What measures fastest on an H200: (keys at a time, warps) of a program, and the programs that (row, head) pairs are
# split into.  The fewer pairs there are, the less a program may have to wait for.
FEW_PAIRS = 64
SMALL_BLOCK, BLOCK = (8, 1), (16, 2)
PROGRAMS = 640
MAX_SPLITS = 32


@triton.jit
def _rotated(x_row, cos, sin, dims, mask, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """One head, float32, turned by its position's cos and sin and rounded to the dtype."""
    x = tl.load(x_row + dims, mask, other=0.0)
    if ROTARY:
        half: tl.constexpr = HEAD_DIM // 2
        first = dims < half
        other = tl.load(x_row + tl.where(first, dims + half, dims - half), mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + tl.where(first, -other, other) * sin).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _attend_keys(q, k, v, distance, slope, acc, total, largest, ROTARY: tl.constexpr):
    """One block of keys, each in its slot.  distance: key position - query position, 0 where there is no key."""
    scores = tl.sum(to_float32(k) * q[None, :], 1)
    if not ROTARY:
        scores += slope * distance.to(tl.float32)
    scores = tl.where(distance < 0, scores, -float("inf"))
    new_largest = tl.maximum(largest, scores)
    shrink = tl.exp2(largest - new_largest)
    p = tl.exp2(scores - new_largest)
    return acc * shrink[:, None] + p[:, None] * to_float32(v), total * shrink + p, new_largest


@triton.jit
def _decode_attention(
    qkv, cos, sin, slopes, context_lengths, k_scale, v_scale,
    num_heads, capacity,
    k_cache, v_cache, out, parts, part_sums,
    SOFTMAX_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROTARY: tl.constexpr,
    QUANTISED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = num_heads * HEAD_DIM
    dims = tl.arange(0, DIM_BLOCK)
    dim_mask = dims < HEAD_DIM
    # The lengths and the cache's older keys are not the work of the kernels before this one, so none waits for them.
    context = tl.load(context_lengths + row)
    share = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_K) * BLOCK_K
    start = split * share
    if start < context:
        position = context - 1
        end = tl.minimum(start + share, position)
        base = (row * num_heads + head).to(tl.int64) * capacity * HEAD_DIM
        keys = start + tl.arange(0, BLOCK_K)
        places = base + keys[:, None] * HEAD_DIM + dims[None, :]
        mask = (keys < end)[:, None] & dim_mask[None, :]
        k = tl.load(k_cache + places, mask, other=0.0)
        v = tl.load(v_cache + places, mask, other=0.0)
        c, s, slope = 0.0, 0.0, 0.0
        if ROTARY:
            angle = position * (HEAD_DIM // 2) + dims % (HEAD_DIM // 2)
            c, s = tl.load(cos + angle, dim_mask, other=0.0), tl.load(sin + angle, dim_mask, other=0.0)
        else:
            slope = tl.load(slopes + head) * LOG2_E
        scale = SOFTMAX_SCALE * LOG2_E
        if QUANTISED:
            scale = scale * tl.load(k_scale)
        wait_for_inputs(OVERLAP)
        q_row = qkv + row.to(tl.int64) * 3 * width + head * HEAD_DIM
        q = _rotated(q_row, c, s, dims, dim_mask, HEAD_DIM, ROTARY) * scale
        k_new = _rotated(q_row + width, c, s, dims, dim_mask, HEAD_DIM, ROTARY)
        v_new = tl.load(q_row + 2 * width + dims, dim_mask, other=0.0).to(tl.float32)
        largest = tl.full((BLOCK_K,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_K,), tl.float32)
        acc = tl.zeros((BLOCK_K, DIM_BLOCK), tl.float32)
        distance = tl.where(keys < end, keys - position, 0)
        acc, total, largest = _attend_keys(q, k, v, distance, slope, acc, total, largest, ROTARY)
        for first_key in tl.range(start + BLOCK_K, end, BLOCK_K, num_stages=3):  # keys asked for two blocks ahead
            keys = first_key + tl.arange(0, BLOCK_K)
            places = base + keys[:, None] * HEAD_DIM + dims[None, :]
            mask = (keys < end)[:, None] & dim_mask[None, :]
            k = tl.load(k_cache + places, mask, other=0.0)
            v = tl.load(v_cache + places, mask, other=0.0)
            distance = tl.where(keys < end, keys - position, 0)
            acc, total, largest = _attend_keys(q, k, v, distance, slope, acc, total, largest, ROTARY)
        start_dependents(OVERLAP)  # not earlier: the next kernel's weights would delay the keys
        peak = tl.max(largest, 0)
        weight = tl.exp2(largest - peak)
        total = tl.sum(total * weight, 0)
        result = tl.sum(acc * weight[:, None], 0)
        if position < start + share:  # this split ends with the new token
            cached: tl.constexpr = k_cache.dtype.element_ty
            k_kept, v_kept = as_cached(k_new, k_scale, cached), as_cached(v_new, v_scale, cached)
            tl.store(k_cache + base + position * HEAD_DIM + dims, k_kept, dim_mask)
            tl.store(v_cache + base + position * HEAD_DIM + dims, v_kept, dim_mask)
            score = tl.sum(k_kept.to(tl.float32) * q, 0)
            new_peak = tl.maximum(peak, score)
            shrink, p_new = tl.exp2(peak - new_peak), tl.exp2(score - new_peak)
            total = total * shrink + p_new
            result = result * shrink + p_new * v_kept.to(tl.float32)
            peak = new_peak
        if QUANTISED:
            result = result * tl.load(v_scale)
        if SPLITS == 1:
            result = (result / total).to(out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * width + head * HEAD_DIM + dims, result, dim_mask)
        else:
            part = (row.to(tl.int64) * num_heads + head) * SPLITS + split
            tl.store(parts + part * HEAD_DIM + dims, result, dim_mask)
            tl.store(part_sums + part * 2, peak)
            tl.store(part_sums + part * 2 + 1, total)
    else:
        wait_for_inputs(OVERLAP)
        if SPLITS == 1:  # a row of padding
            nothing = tl.zeros((DIM_BLOCK,), out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * width + head * HEAD_DIM + dims, nothing, dim_mask)


DECODE_ATTENTION = KernelSpec(
    _decode_attention,
    ("qkv", "cos", "sin", "slopes", "context_lengths", "k_scale", "v_scale"),
    ("num_heads", "capacity"),
    ("k_cache", "v_cache", "out", "parts", "part_sums"),
)


@triton.jit
def _combine_splits(
    parts, part_sums, context_lengths,
    num_heads,
    out,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_lengths + row)
    share = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_K) * BLOCK_K
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    used = splits * share < context
    part = (row.to(tl.int64) * num_heads + head) * SPLITS + splits
    peaks = tl.load(part_sums + part * 2, used, other=-1e30)
    totals = tl.load(part_sums + part * 2 + 1, used, other=0.0)
    mask = used[:, None] & (dims < HEAD_DIM)[None, :]
    values = tl.load(parts + part[:, None] * HEAD_DIM + dims[None, :], mask, other=0.0)
    weight = tl.exp2(peaks - tl.max(peaks, 0))
    total = tl.maximum(tl.sum(totals * weight, 0), 1e-30)  # 0 only in a row of padding
    result = tl.sum(values * weight[:, None], 0) / total
    target = (row.to(tl.int64) * num_heads + head) * HEAD_DIM + dims
    tl.store(out + target, result.to(out.dtype.element_ty), dims < HEAD_DIM)


COMBINE_SPLITS = KernelSpec(_combine_splits, ("parts", "part_sums", "context_lengths"), ("num_heads",), ("out",))


def choose_block(pairs: int, quantised: bool) -> tuple[int, int]:
    """(keys at a time, warps) of the programs for so many (row, head) pairs"""
    return SMALL_BLOCK if quantised or pairs <= FEW_PAIRS else BLOCK


def choose_splits(pairs: int) -> int:
    """Into how many parts each (row, head) pair's keys are split; a power of two.

    The lengths have no say, so that one captured graph serves them all: a part without keys costs next to nothing.
    """
    if pairs <= FEW_PAIRS:
        return MAX_SPLITS
    return next_power_of_2(max(PROGRAMS // pairs, 1) + 1) // 2


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slopes: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    step: Step,
    splits: int,
    block: tuple[int, int] | None = None,
) -> Tensor:
    """ops.Ops.attention for a step of one token a sequence.  A sequence of context length 0 is padding.

    cos, sin: [capacity, head_dim / 2] float32, unread with ALiBi; slopes: [num_heads] float32, unread with RoPE;
    block: keys at a time, and warps, of a program.
    """
    rows, heads, dim = step.batch_size, spec.num_heads, spec.head_dim
    out = torch.empty(rows, heads * dim, dtype=qkv.dtype, device=qkv.device)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(rows, heads, splits, dim, dtype=torch.float32, device=qkv.device)
        sums = torch.empty(rows, heads, splits, 2, dtype=torch.float32, device=qkv.device)
    quantised = cache.k_scale is not None
    block_k, num_warps = block or choose_block(rows * heads, quantised)
    k_scale, v_scale = (cache.k_scale, cache.v_scale) if quantised else (qkv, qkv)
    shape = {"HEAD_DIM": dim, "DIM_BLOCK": next_power_of_2(dim), "SPLITS": splits, "BLOCK_K": block_k}
    DECODE_ATTENTION.launch(
        (splits, heads, rows),
        (qkv, cos, sin, slopes, step.context_lengths, k_scale, v_scale),
        (heads, cache.k.shape[2]),
        (cache.k, cache.v, out, parts, sums),
        {"SOFTMAX_SCALE": dim**-0.5, "ROTARY": spec.rotary, "QUANTISED": quantised, **shape},
        num_warps=num_warps,
    )
    if splits > 1:
        COMBINE_SPLITS.launch(
            (heads, rows),
            (parts, sums, step.context_lengths),
            (heads,),
            (out,),
            shape,
            num_warps=1,
        )
    return out
