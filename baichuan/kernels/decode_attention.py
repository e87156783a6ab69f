"""Attention of one new token of each sequence: rotation, KV store and softmax in one kernel, long contexts split.

A program takes one head of one sequence and a split of its keys, a contiguous share.  Inside the split every slot of a
block keeps an online softmax of its own, over the keys that it meets, so that the loop exchanges nothing between
threads.  With 20 older keys, the new token's key 20, BLOCK_K = 4 and SPLITS = 2:

    split 0     keys  0  1  2  3 |  4  5  6  7 |  8  9 10 11        share = 12 keys: a multiple of BLOCK_K
    split 1     keys 12 13 14 15 | 16 17 18 19 |  then key 20
    slot              0  1  2  3    0  1  2  3    0  1  2  3

    slot 1 of split 0: largest score, sum of exp2(score - largest), and that sum times v, of keys 1, 5 and 9
    end of a split:    its slots are combined; the split that ends with the new token stores its k and v and adds them
    SPLITS > 1:        combine_splits combines the splits of each head

Slots and splits are combined in a fixed order, so that every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.combine_splits import COMBINE_SPLITS, if_single, parts_of
from baichuan.kernels.kv_store import as_cached
from baichuan.kernels.prefill_attention import LOG2_E
from baichuan.kernels.primitives import start_dependents, to_float32, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.records import AttentionSpec, LayerCache, Step

# What measures fastest on an H200.  With few pairs of (sequence, head) small programs, and many of them, wait less.
FEW_PAIRS = 64
SMALL_BLOCK, BLOCK = (8, 1), (16, 2)  # (keys of a block, warps)
PROGRAMS = 640  # that the pairs are split into, where they are not few
MAX_SPLITS = 32


@triton.jit
def _rotated(x_row, cos, sin, dims, mask, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr):
    """One head of q or k as float32, with RoPE rotated by cos and sin and rounded to the dtype before."""
    x = tl.load(x_row + dims, mask, other=0.0)
    if ROTARY:
        half: tl.constexpr = HEAD_DIM // 2
        first = dims < half
        other = tl.load(x_row + tl.where(first, dims + half, dims - half), mask, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * cos + tl.where(first, -other, other) * sin).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def _place(block, head, num_heads, position, TOKENS_PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where one head's key or value of a position, which lies in this block of the cache, begins."""
    heads = block.to(tl.int64) * num_heads + head
    return (heads * TOKENS_PER_BLOCK + position % TOKENS_PER_BLOCK) * HEAD_DIM


@triton.jit
def _load_keys(k_cache, v_cache, base, keys, end, dims, dim_mask, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """(k, v) [BLOCK_K, DIM_BLOCK] of these keys, of which the first lies at `base`; 0 from key `end` on."""
    places = base + tl.arange(0, BLOCK_K)[:, None] * HEAD_DIM + dims[None, :]
    mask = (keys < end)[:, None] & dim_mask[None, :]
    return tl.load(k_cache + places, mask, other=0.0), tl.load(v_cache + places, mask, other=0.0)


@triton.jit
def _attend_keys(q, k, v, distance, slope, acc, total, largest, ROTARY: tl.constexpr):
    """(acc, total, largest) of every slot with one more key in each.

    distance: [BLOCK_K] key position - query position, 0 where there is no key; scores are multiplied by log2(e)
    """
    scores = tl.sum(to_float32(k) * q[None, :], 1)
    if not ROTARY:
        scores += slope * distance.to(tl.float32)
    scores = tl.where(distance < 0, scores, -float("inf"))
    new_largest = tl.maximum(largest, scores)
    shrink = tl.exp2(largest - new_largest)
    p = tl.exp2(scores - new_largest)
    return acc * shrink[:, None] + p[:, None] * to_float32(v), total * shrink + p, new_largest


@triton.jit
def _combine_slots(acc, total, largest):
    """(total, result, peak) of all slots together."""
    peak = tl.max(largest, 0)
    weight = tl.exp2(largest - peak)
    return tl.sum(total * weight, 0), tl.sum(acc * weight[:, None], 0), peak


@triton.jit
def _attend_new_token(q, k_kept, v_kept, total, result, peak):
    """(total, result, peak) with the new token's own key and value, as the cache has kept them."""
    score = tl.sum(k_kept.to(tl.float32) * q, 0)
    new_peak = tl.maximum(peak, score)
    shrink, p = tl.exp2(peak - new_peak), tl.exp2(score - new_peak)
    return total * shrink + p, result * shrink + p * v_kept.to(tl.float32), new_peak


@triton.jit
def _decode_attention(
    qkv, cos, sin, slopes, num_singles, context_lengths, tables, k_scale, v_scale,
    num_heads, blocks_per_row,
    k_cache, v_cache, out, parts, part_sums,
    TOKENS_PER_BLOCK: tl.constexpr, SOFTMAX_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, QUANTISED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_K: tl.constexpr, MIXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Writes out where SPLITS is 1, else each split's result to parts and its peak and total to part_sums.

    decode_attention has the shapes.  DIM_BLOCK: HEAD_DIM as a power of two
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = num_heads * HEAD_DIM
    dims = tl.arange(0, DIM_BLOCK)
    dim_mask = dims < HEAD_DIM
    # Lengths, tables and older keys and values were written long before the previous kernel: nothing waits for them.
    context = tl.load(context_lengths + row)
    written = HEAD_DIM
    if MIXED:
        context, written = if_single(num_singles, row, context, HEAD_DIM)
    share = tl.cdiv(tl.cdiv(context, SPLITS), BLOCK_K) * BLOCK_K
    start = split * share
    if start < context:
        position = context - 1
        end = tl.minimum(start + share, position)
        table = tables + row * blocks_per_row
        keys = start + tl.arange(0, BLOCK_K)
        base = _place(tl.load(table + start // TOKENS_PER_BLOCK), head, num_heads, start, TOKENS_PER_BLOCK, HEAD_DIM)
        k, v = _load_keys(k_cache, v_cache, base, keys, end, dims, dim_mask, HEAD_DIM, BLOCK_K)
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
        for first_key in tl.range(start + BLOCK_K, end, BLOCK_K, num_stages=3):  # loads run two blocks ahead
            keys = first_key + tl.arange(0, BLOCK_K)
            block = tl.load(table + first_key // TOKENS_PER_BLOCK)
            base = _place(block, head, num_heads, first_key, TOKENS_PER_BLOCK, HEAD_DIM)
            k, v = _load_keys(k_cache, v_cache, base, keys, end, dims, dim_mask, HEAD_DIM, BLOCK_K)
            distance = tl.where(keys < end, keys - position, 0)
            acc, total, largest = _attend_keys(q, k, v, distance, slope, acc, total, largest, ROTARY)
        start_dependents(OVERLAP)  # not earlier: loading the next kernel's weights would delay the keys
        total, result, peak = _combine_slots(acc, total, largest)
        if position < start + share:  # this split ends with the new token
            cached: tl.constexpr = k_cache.dtype.element_ty
            k_kept, v_kept = as_cached(k_new, k_scale, cached), as_cached(v_new, v_scale, cached)
            block = tl.load(table + position // TOKENS_PER_BLOCK)
            base = _place(block, head, num_heads, position, TOKENS_PER_BLOCK, HEAD_DIM)
            tl.store(k_cache + base + dims, k_kept, dim_mask)
            tl.store(v_cache + base + dims, v_kept, dim_mask)
            total, result, peak = _attend_new_token(q, k_kept, v_kept, total, result, peak)
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
        if SPLITS == 1:  # a row of padding, whose context is empty
            nothing = tl.zeros((DIM_BLOCK,), out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * width + head * HEAD_DIM + dims, nothing, dims < written)


DECODE_ATTENTION = KernelSpec(
    _decode_attention,
    ("qkv", "cos", "sin", "slopes", "num_singles", "context_lengths", "tables", "k_scale", "v_scale"),
    ("num_heads", "blocks_per_row"),
    ("k_cache", "v_cache", "out", "parts", "part_sums"),
)


def choose_block(pairs: int, quantised: bool) -> tuple[int, int]:
    """(keys of a block, warps).  pairs: of (sequence, head)"""
    return SMALL_BLOCK if quantised or pairs <= FEW_PAIRS else BLOCK


def choose_splits(pairs: int) -> int:
    """Into how many splits each (sequence, head) pair's keys are cut; a power of two.

    It does not depend on the lengths, so that one captured graph serves them all: a split without keys takes next to
    no time.
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
    out: Tensor,
    block: tuple[int, int] | None = None,
) -> None:
    """ops.Ops.attention into `out` for the step's first sequences, with a single new token each.

    A sequence of context length 0 is padding.
    cos, sin: [capacity, head_dim / 2] float32, not read with ALiBi; slopes: [num_heads] float32, not read with RoPE;
    splits: see choose_splits; block: see choose_block; out: [num_tokens, num_heads * head_dim]
    """
    rows, heads, dim = step.singles, spec.num_heads, spec.head_dim
    parts, sums = parts_of(rows, heads, splits, dim, out)
    quantised = cache.k_scale is not None
    block_k, num_warps = block or choose_block(rows * heads, quantised)
    assert cache.tokens_per_block % block_k == 0, "the keys of a load lie in one block of the cache"
    k_scale, v_scale = (cache.k_scale, cache.v_scale) if quantised else (qkv, qkv)
    shape = {"HEAD_DIM": dim, "DIM_BLOCK": next_power_of_2(dim), "SPLITS": splits, "BLOCK_K": block_k}
    shape["MIXED"] = step.mixed
    num_singles = step.num_singles if step.mixed and step.num_singles is not None else step.context_lengths
    DECODE_ATTENTION.launch(
        (splits, heads, rows),
        (qkv, cos, sin, slopes, num_singles, step.context_lengths, cache.tables, k_scale, v_scale),
        (heads, cache.tables.shape[1]),
        (cache.k, cache.v, out, parts, sums),
        {
            "TOKENS_PER_BLOCK": cache.tokens_per_block,
            "SOFTMAX_SCALE": dim**-0.5,
            "ROTARY": spec.rotary,
            "QUANTISED": quantised,
            **shape,
        },
        num_warps=num_warps,
    )
    if splits > 1:
        COMBINE_SPLITS.launch(
            (heads, rows),
            (parts, sums, num_singles, step.context_lengths),
            (heads,),
            (out,),
            {**shape, "SUMS_SAY": False},
            num_warps=1,
        )
