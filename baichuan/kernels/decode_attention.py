"""Attention of one new token of each sequence: rotation, KV store and softmax in one kernel, long contexts split.

A program takes one head of one sequence and a split of its keys, a contiguous share; long rows have more splits.
Inside the split every slot of a block keeps an online softmax of its own, over the keys that it meets, so that the
loop exchanges nothing between threads.  With 22 older keys, the new token's key 22, BLOCK_K = 4 and two splits:

    split 0     keys  8  9 10 11 |  0  1  2  3 |  4  5  6  7        share = 12 keys: a multiple of BLOCK_K
    split 1     keys 20 21       | 12 13 14 15 | 16 17 18 19 |  then key 22
    slot              0  1  2  3    0  1  2  3    0  1  2  3

    slot 1 of split 0: of keys 9, 1 and 5 the largest score and the sums of exp2(score - largest) and of that times v

The last block of a split comes first: it alone may have fewer than BLOCK_K keys, so that the loop needs no mask.  After
the loop the slots are combined, and the split that ends with the new token stores that token's key and value, and
attends to them too.  The splits of a row are combined by the one that ends last, which learns this from a counter; with
few pairs of (sequence, head) a kernel of its own does it.

Slots and splits are combined in a fixed order, so that every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.combine_splits import COMBINE_SPLITS, combine_parts, parts_of
from baichuan.kernels.kv_store import as_cached
from baichuan.kernels.prefill_attention import LOG2_E
from baichuan.kernels.primitives import start_dependents, to_float32, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.kernels.splits import FEW_PAIRS, MOST_KEYS, Splits
from baichuan.records import AttentionSpec, LayerCache, Step

# What measures fastest on an H100 and an H200.  With few pairs of (sequence, head) small programs wait less.
SMALL_BLOCK, BLOCK = (8, 1), (16, 2)  # (keys of a block, warps)


@triton.jit
def _share(context, LEAST: tl.constexpr, SPLITS: tl.constexpr, MOST_KEYS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Keys of each of a row's splits but the last, a multiple of BLOCK_K.  context: keys of the row, the new one too"""
    count = tl.minimum(tl.maximum(tl.cdiv(context, MOST_KEYS), LEAST), SPLITS) if LEAST < SPLITS else SPLITS
    return tl.cdiv(tl.cdiv(context, count), BLOCK_K) * BLOCK_K


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
    """Where the key or value of one head begins in the cache.  block: that of the position"""
    heads = (block * num_heads + head).to(tl.int64)  # fewer than 2^31: each takes 2 KB or more of a block
    return heads * (TOKENS_PER_BLOCK * HEAD_DIM) + (position & (TOKENS_PER_BLOCK - 1)) * HEAD_DIM


@triton.jit
def _load_keys(k_cache, v_cache, base, count, dims, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """(k, v) [BLOCK_K, DIM_BLOCK] of `count` keys from `base` on, then zeros.  count: None = BLOCK_K"""
    slots = tl.arange(0, BLOCK_K)
    places = slots[:, None] * HEAD_DIM + dims[None, :]
    k_places, v_places = k_cache + base + places, v_cache + base + places
    if count is None and dims.shape[0] == HEAD_DIM:
        return tl.load(k_places), tl.load(v_places)
    else:
        mask = (dims < HEAD_DIM)[None, :]
        if count is not None:
            mask = mask & (slots < count)[:, None]
        return tl.load(k_places, mask, other=0.0), tl.load(v_places, mask, other=0.0)


@triton.jit
def _attend_keys(q, k, v, first_distance, count, slope, acc, total, largest, ROTARY: tl.constexpr):
    """(acc, total, largest) of every slot with one more key in each of the first `count` slots.  count: None = all

    first_distance: position of the first key - position of the query; scores are multiplied by log2(e)
    """
    slots = tl.arange(0, k.shape[0])
    scores = tl.sum(to_float32(k) * q[None, :], 1)
    if not ROTARY:
        scores += slope * (first_distance + slots).to(tl.float32)
    if count is not None:
        scores = tl.where(slots < count, scores, -float("inf"))
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
    k_cache, v_cache, out, parts, part_sums, ended,
    TOKENS_PER_BLOCK: tl.constexpr, SOFTMAX_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ROTARY: tl.constexpr, QUANTISED: tl.constexpr, LEAST: tl.constexpr, SPLITS: tl.constexpr, MOST_KEYS: tl.constexpr,
    BLOCK_K: tl.constexpr, MIXED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Writes a row of `out` where it has one split.  Otherwise each split writes its result to parts and its peak and
    total to part_sums; where LEAST < SPLITS, the split that ends last then writes the row of `out`.

    decode_attention has the shapes.  DIM_BLOCK: HEAD_DIM as a power of two; LEAST, SPLITS: bounds of a row's splits
    """
    head, row, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = num_heads * HEAD_DIM
    dims = tl.arange(0, DIM_BLOCK)
    dim_mask = dims < HEAD_DIM
    pair = row * num_heads + head
    part = pair * SPLITS + split
    # Lengths, tables and older keys and values were written long before the previous kernel: nothing waits for them.
    context = tl.load(context_lengths + row)
    written = HEAD_DIM
    if MIXED:  # a prompt's row and one of padding have nothing to attend to, nor to write
        single = row < tl.load(num_singles)
        context, written = tl.where(single, context, 0), tl.where(single, HEAD_DIM, 0)
    share = _share(context, LEAST, SPLITS, MOST_KEYS, BLOCK_K)
    start = split * share
    if start < context:
        position = context - 1
        end = tl.minimum(start + share, position)
        table = tables + row * blocks_per_row
        last = start + tl.maximum(end - start - 1, 0) // BLOCK_K * BLOCK_K
        base = _place(tl.load(table + last // TOKENS_PER_BLOCK), head, num_heads, last, TOKENS_PER_BLOCK, HEAD_DIM)
        k, v = _load_keys(k_cache, v_cache, base, end - last, dims, HEAD_DIM, BLOCK_K)
        next_block = tl.load(table + start // TOKENS_PER_BLOCK)
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
        acc, total, largest = _attend_keys(q, k, v, last - position, end - last, slope, acc, total, largest, ROTARY)
        for first_key in tl.range(start, last, BLOCK_K, num_stages=3):  # loads keys two blocks ahead, places three
            block = next_block
            next_block = tl.load(table + (first_key + BLOCK_K) // TOKENS_PER_BLOCK)
            base = _place(block, head, num_heads, first_key, TOKENS_PER_BLOCK, HEAD_DIM)
            k, v = _load_keys(k_cache, v_cache, base, None, dims, HEAD_DIM, BLOCK_K)
            distance = first_key - position
            acc, total, largest = _attend_keys(q, k, v, distance, None, slope, acc, total, largest, ROTARY)
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
        used = tl.cdiv(context, share)
        target = out + row.to(tl.int64) * width + head * HEAD_DIM + dims
        if SPLITS == 1 or (LEAST < SPLITS and used == 1):
            tl.store(target, (result / total).to(out.dtype.element_ty), dim_mask)
        else:
            tl.store(parts + part * HEAD_DIM + dims, result, dim_mask)
            tl.store(part_sums + part * 2, peak)
            tl.store(part_sums + part * 2 + 1, total)
            if LEAST < SPLITS:
                tl.debug_barrier()  # all threads have stored before one of them counts the split
                if tl.atomic_add(ended + pair, 1, sem="acq_rel") == used - 1:
                    tl.store(ended + pair, 0)  # as the next kernel expects it
                    result = combine_parts(parts, part_sums, pair, used, HEAD_DIM, DIM_BLOCK, SPLITS)
                    tl.store(target, result.to(out.dtype.element_ty), dim_mask)
    else:
        if SPLITS > 1 and LEAST == SPLITS:  # _combine_splits reads the sums of every split
            wait_for_inputs(OVERLAP)
            tl.store(part_sums + part * 2, -1e30)
            tl.store(part_sums + part * 2 + 1, 0.0)
        if split == 0:  # a row of padding, whose context is empty
            wait_for_inputs(OVERLAP)
            nothing = tl.zeros((DIM_BLOCK,), out.dtype.element_ty)
            tl.store(out + row.to(tl.int64) * width + head * HEAD_DIM + dims, nothing, dims < written)


DECODE_ATTENTION = KernelSpec(
    _decode_attention,
    ("qkv", "cos", "sin", "slopes", "num_singles", "context_lengths", "tables", "k_scale", "v_scale"),
    ("num_heads", "blocks_per_row"),
    ("k_cache", "v_cache", "out", "parts", "part_sums", "ended"),
)


def choose_block(pairs: int, quantised: bool) -> tuple[int, int]:
    """(keys of a block, warps).  pairs: of (sequence, head)"""
    return SMALL_BLOCK if quantised or pairs <= FEW_PAIRS else BLOCK


def decode_attention(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slopes: Tensor,
    cache: LayerCache,
    spec: AttentionSpec,
    step: Step,
    splits: Splits,
    out: Tensor,
    ended: Tensor,
    block: tuple[int, int] | None = None,
) -> None:
    """ops.Ops.attention into `out` for the step's first sequences, with a single new token each.

    A sequence of context length 0 is padding.
    cos, sin: [capacity, head_dim / 2] float32, not read with ALiBi; slopes: [num_heads] float32, not read with RoPE;
    splits: see choose_splits; block: see choose_block; out: [num_tokens, num_heads * head_dim]
    ended: [MOST_COUNTED] int32, how many splits of a pair have ended; zeros before and after
    """
    rows, heads, dim = step.singles, spec.num_heads, spec.head_dim
    parts, sums = parts_of(rows, heads, splits.most, dim, out)
    quantised = cache.k_scale is not None
    block_k, num_warps = block or choose_block(rows * heads, quantised)
    assert cache.tokens_per_block % block_k == 0, "the keys of a load lie in one block of the cache"
    assert splits.least == splits.most or rows * heads <= ended.shape[0], "a count for each pair"
    head_shape = {"HEAD_DIM": dim, "DIM_BLOCK": next_power_of_2(dim)}
    k_scale, v_scale = (cache.k_scale, cache.v_scale) if quantised else (qkv, qkv)
    num_singles = step.num_singles if step.mixed and step.num_singles is not None else step.context_lengths
    DECODE_ATTENTION.launch(
        (heads, rows, splits.most),
        (qkv, cos, sin, slopes, num_singles, step.context_lengths, cache.tables, k_scale, v_scale),
        (heads, cache.tables.shape[1]),
        (cache.k, cache.v, out, parts, sums, ended),
        {
            "TOKENS_PER_BLOCK": cache.tokens_per_block,
            "SOFTMAX_SCALE": dim**-0.5,
            "ROTARY": spec.rotary,
            "QUANTISED": quantised,
            **head_shape,
            "LEAST": splits.least,
            "SPLITS": splits.most,
            "MOST_KEYS": MOST_KEYS,
            "BLOCK_K": block_k,
            "MIXED": step.mixed,
        },
        num_warps=num_warps,
    )
    if 1 < splits.least == splits.most:
        COMBINE_SPLITS.launch(
            (heads, rows), (parts, sums), (heads,), (out,), {**head_shape, "SPLITS": splits.most}, num_warps=1
        )
