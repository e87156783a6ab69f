"""Attention of many new tokens a sequence to the KV cache, which holds their keys and values already (kv_store.py).

A program takes BLOCK_Q new tokens of one head and walks over their keys, BLOCK_K at a time, or over a split of them, a
contiguous share, where few programs would walk over many keys.  Blocks of keys that all its queries see need no mask.
For 6 tokens, of which the last 4 are new, in blocks of 2 queries and 2 keys:

    positions          keys 0 1    keys 2 3    keys 4 5
    queries 2 3          all        masked
    queries 4 5          all         all        masked
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.combine_splits import COMBINE_SPLITS, parts_of
from baichuan.kernels.primitives import start_dependents, to_dtype, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.records import AttentionSpec, LayerCache, Step

LOG2_E = tl.constexpr(1.4426950408889634)
PROGRAMS, MIN_SPLITS, MAX_SPLITS = 256, 4, 8  # two splits gain less than combining them takes


@triton.jit
def _block_of(key, table, blocks_per_row, TOKENS_PER_BLOCK: tl.constexpr):
    """The number of the cache's block that holds the key; of a key after the row's last block, that block's."""
    return tl.load(table + tl.minimum(key // TOKENS_PER_BLOCK, blocks_per_row - 1))


@triton.jit
def _attend_block(
    q, acc, total, largest, k_start, q_positions, context, slope, scale, k_cache, v_cache, number, num_heads, head,
    TOKENS_PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIBI: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(acc, total, largest) with one more block of keys, by online softmax (Milakov and Gimelshein, 2018).

    number: of the cache's block that the keys lie in; largest: the largest score so far; total, acc: the sums of
    exp2(score - largest) and of that times v.  Scores are multiplied by log2(e), so that exp2 does for exp.
    """
    keys = k_start + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, DIM_BLOCK)
    base = ((number.to(tl.int64) * num_heads + head) * TOKENS_PER_BLOCK + k_start % TOKENS_PER_BLOCK) * HEAD_DIM
    k_base, v_base = k_cache + base, v_cache + base
    offsets = tl.arange(0, BLOCK_K)[:, None] * HEAD_DIM + dims[None, :]
    if MASKED or DIM_BLOCK != HEAD_DIM:
        inside = (keys < context)[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_base + offsets, inside, other=0.0)
        v = tl.load(v_base + offsets, inside, other=0.0)
    else:
        k = tl.load(k_base + offsets)
        v = tl.load(v_base + offsets)
    scores = tl.dot(q, tl.trans(to_dtype(k, q.dtype)), input_precision=PRECISION) * scale
    if ALIBI:
        scores += slope * (keys[None, :] - q_positions[:, None]).to(tl.float32)
    if MASKED:
        scores = tl.where(keys[None, :] <= q_positions[:, None], scores, -1e30)
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    p = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(q.dtype), to_dtype(v, q.dtype), acc, input_precision=PRECISION)
    return acc, total, new_largest


@triton.jit
def _prefill_attention(
    qkv, slopes, num_singles, cu_seqlens, context_lengths, tables, k_cache, v_cache, k_scale, v_scale,
    num_heads, blocks_per_row,
    out, parts, part_sums,
    TOKENS_PER_BLOCK: tl.constexpr, SOFTMAX_SCALE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    ALIBI: tl.constexpr, QUANTISED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Writes out where one split has all keys, else each split's result to parts and its peak and total to part_sums.

    The lengths alone decide, so that a captured step serves prompts with and without older keys.
    """
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    head, row = tl.program_id(1), tl.program_id(2) + tl.load(num_singles)
    first = tl.load(cu_seqlens + row)
    new = tl.load(cu_seqlens + row + 1) - first
    split = tl.program_id(0) % SPLITS
    block = tl.cdiv(new, BLOCK_Q) - 1 - tl.program_id(0) // SPLITS  # the last queries, which see most keys, start first
    if block >= 0:
        context = tl.load(context_lengths + row)
        tokens = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        dims = tl.arange(0, DIM_BLOCK)
        q_mask = (tokens < new)[:, None] & (dims < HEAD_DIM)[None, :]
        places = (first + tokens).to(tl.int64)[:, None] * (num_heads * HEAD_DIM)
        columns = head * HEAD_DIM + dims[None, :]
        q = tl.load(qkv + 3 * places + columns, q_mask, other=0.0)
        q_positions = context - new + tokens
        table = tables + row * blocks_per_row
        scale = SOFTMAX_SCALE * LOG2_E
        if QUANTISED:
            scale = scale * tl.load(k_scale)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + head) * LOG2_E
        acc = tl.zeros((BLOCK_Q, DIM_BLOCK), tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        largest = tl.full((BLOCK_Q,), -1e30, tl.float32)
        seen_by_all = (context - new + block * BLOCK_Q + 1) // BLOCK_K * BLOCK_K
        end = tl.minimum(context - new + (block + 1) * BLOCK_Q, context)
        share = tl.maximum(tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_K), 2) * BLOCK_K
        alone = SPLITS == 1 or share >= end
        start = 0
        if SPLITS > 1:
            start = split * share
            end = tl.minimum(end, start + share)
            seen_by_all = tl.maximum(tl.minimum(seen_by_all, end), start)
        # BLOCK_K keys lie in one block, whose number is loaded a turn ahead, so that loading the keys does not wait.
        number = _block_of(start, table, blocks_per_row, TOKENS_PER_BLOCK)
        for k_start in range(start, seen_by_all, BLOCK_K):
            following = _block_of(k_start + BLOCK_K, table, blocks_per_row, TOKENS_PER_BLOCK)
            acc, total, largest = _attend_block(
                q, acc, total, largest, k_start, q_positions, context, slope, scale,
                k_cache, v_cache, number, num_heads, head, TOKENS_PER_BLOCK,
                HEAD_DIM, DIM_BLOCK, BLOCK_K, ALIBI, False, PRECISION,
            )  # fmt: skip
            number = following
        for k_start in range(seen_by_all, end, BLOCK_K):
            following = _block_of(k_start + BLOCK_K, table, blocks_per_row, TOKENS_PER_BLOCK)
            acc, total, largest = _attend_block(
                q, acc, total, largest, k_start, q_positions, context, slope, scale,
                k_cache, v_cache, number, num_heads, head, TOKENS_PER_BLOCK,
                HEAD_DIM, DIM_BLOCK, BLOCK_K, ALIBI, True, PRECISION,
            )  # fmt: skip
            number = following
        if QUANTISED:
            acc = acc * tl.load(v_scale)
        if alone:
            if split == 0:
                acc = acc / total[:, None]
                tl.store(out + places + columns, acc.to(out.dtype.element_ty), q_mask)
            total = tl.zeros((BLOCK_Q,), tl.float32)  # nothing to combine
        if SPLITS > 1:
            part = ((first + tokens).to(tl.int64) * num_heads + head) * SPLITS + split
            tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc, q_mask & (total > 0)[:, None])
            tl.store(part_sums + part * 2, largest, tokens < new)
            tl.store(part_sums + part * 2 + 1, total, tokens < new)


PREFILL_ATTENTION = KernelSpec(
    _prefill_attention,
    (
        "qkv",
        "slopes",
        "num_singles",
        "cu_seqlens",
        "context_lengths",
        "tables",
        "k_cache",
        "v_cache",
        "k_scale",
        "v_scale",
    ),
    ("num_heads", "blocks_per_row"),
    ("out", "parts", "part_sums"),
)


def choose_prefill_splits(programs: int) -> int:
    """Into how many splits the keys are cut; a power of two.  programs: of all blocks of queries and heads"""
    splits = min(next_power_of_2(PROGRAMS // programs + 1) // 2, MAX_SPLITS)
    return splits if splits >= MIN_SPLITS else 1


def prefill_attention(
    qkv: Tensor, slopes: Tensor, cache: LayerCache, spec: AttentionSpec, step: Step, out: Tensor, split: bool = False,
    block_q: int = 64, block_k: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """Causal attention of the step's q, as store_kv left it, to the cache, into `out`.

    The step's first sequences, with a single new token each, are left to decode_attention.  split: whether the keys
    may be cut into splits, where there are few programs otherwise; only in steps without single tokens
    qkv: [num_tokens, 3 * num_heads * head_dim]; slopes: [num_heads] float32, unread with RoPE;
    out: [num_tokens, num_heads * head_dim]
    """
    if qkv.dtype == torch.float32:  # a tile of it has twice the bytes
        block_k, num_stages = 32, 1
    block_k = min(block_k, cache.tokens_per_block)
    block_q = min(block_q, max(16, next_power_of_2(step.max_new_tokens)))
    quantised = cache.k_scale is not None
    assert step.num_singles is not None, "a step with prompts"
    heads, dim, tokens = spec.num_heads, spec.head_dim, qkv.shape[0]
    blocks, rows = cdiv(step.max_new_tokens, block_q), step.batch_size - step.singles
    splits = choose_prefill_splits(blocks * heads * rows) if split else 1
    dim_block = max(16, next_power_of_2(dim))
    parts, sums = parts_of(tokens, heads, splits, dim, out)
    PREFILL_ATTENTION.launch(
        (blocks * splits, heads, rows),
        (qkv, slopes, step.num_singles, step.cu_seqlens, step.context_lengths, cache.tables, cache.k, cache.v,
         cache.k_scale if quantised else qkv, cache.v_scale if quantised else qkv),
        (heads, cache.tables.shape[1]),
        (out, parts, sums),
        {
            "TOKENS_PER_BLOCK": cache.tokens_per_block,
            "SOFTMAX_SCALE": dim**-0.5,
            "HEAD_DIM": dim,
            "DIM_BLOCK": dim_block,
            "ALIBI": not spec.rotary,
            "QUANTISED": quantised,
            "PRECISION": "ieee",
            "BLOCK_Q": block_q,
            "BLOCK_K": block_k,
            "SPLITS": splits,
        },
        num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip
    if splits > 1:
        COMBINE_SPLITS.launch(
            (heads, tokens),
            (parts, sums),
            (heads,),
            (out,),
            {"HEAD_DIM": dim, "DIM_BLOCK": dim_block, "SPLITS": splits},
            num_warps=1,
        )
