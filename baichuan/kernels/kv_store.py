"""New keys and values, with RoPE rotated, written to the KV cache before prefill_attention reads them there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import quantise
from baichuan.records import AttentionSpec, LayerCache, Step

BLOCK_TOKENS = 16


@triton.jit
def as_cached(x, scale, dtype: tl.constexpr):
    """x, float32, as a KV cache of this dtype stores it.  scale: read for int8 and e4m3"""
    if dtype == tl.int8 or dtype == tl.float8e4nv:
        return quantise(x, tl.load(scale), dtype)
    else:
        return x.to(dtype)


@triton.jit
def _store_kv(
    qkv, cos, sin, num_singles, cu_seqlens, context_lengths, tables, k_scale, v_scale,
    num_heads, blocks_per_row,
    q_out, k_cache, v_cache,
    TOKENS_PER_BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, HALF_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    head, row = tl.program_id(1), tl.program_id(2) + tl.load(num_singles)
    first = tl.load(cu_seqlens + row)
    new = tl.load(cu_seqlens + row + 1) - first
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if tl.program_id(0) * BLOCK_T < new:
        positions = tl.load(context_lengths + row) - new + tokens
        half = tl.arange(0, HALF_BLOCK)
        mask = (tokens < new)[:, None] & (half < HEAD_DIM // 2)[None, :]
        source = (first + tokens).to(tl.int64)[:, None] * (3 * num_heads * HEAD_DIM) + head * HEAD_DIM + half[None, :]
        entries = tables + row * blocks_per_row + positions // TOKENS_PER_BLOCK
        blocks = tl.load(entries, tokens < new, other=0).to(tl.int64)
        places = (blocks * num_heads + head) * TOKENS_PER_BLOCK + positions % TOKENS_PER_BLOCK
        target = places[:, None] * HEAD_DIM + half[None, :]
        k_source = qkv + source + num_heads * HEAD_DIM
        v_source = k_source + num_heads * HEAD_DIM
        k1 = tl.load(k_source, mask, other=0.0)
        k2 = tl.load(k_source + HEAD_DIM // 2, mask, other=0.0)
        v1 = tl.load(v_source, mask, other=0.0).to(tl.float32)
        v2 = tl.load(v_source + HEAD_DIM // 2, mask, other=0.0).to(tl.float32)
        dtype = k1.dtype
        if ROTARY:
            angle = positions[:, None] * (HEAD_DIM // 2) + half[None, :]
            c, s = tl.load(cos + angle, mask, other=0.0), tl.load(sin + angle, mask, other=0.0)
            x1, x2 = k1.to(tl.float32), k2.to(tl.float32)
            k1, k2 = (x1 * c - x2 * s).to(dtype), (x2 * c + x1 * s).to(dtype)
            x1 = tl.load(qkv + source, mask, other=0.0).to(tl.float32)
            x2 = tl.load(qkv + source + HEAD_DIM // 2, mask, other=0.0).to(tl.float32)
            tl.store(q_out + source, (x1 * c - x2 * s).to(dtype), mask)
            tl.store(q_out + source + HEAD_DIM // 2, (x2 * c + x1 * s).to(dtype), mask)
        cached: tl.constexpr = k_cache.dtype.element_ty
        tl.store(k_cache + target, as_cached(k1.to(tl.float32), k_scale, cached), mask)
        tl.store(k_cache + target + HEAD_DIM // 2, as_cached(k2.to(tl.float32), k_scale, cached), mask)
        tl.store(v_cache + target, as_cached(v1, v_scale, cached), mask)
        tl.store(v_cache + target + HEAD_DIM // 2, as_cached(v2, v_scale, cached), mask)


STORE_KV = KernelSpec(
    _store_kv,
    ("qkv", "cos", "sin", "num_singles", "cu_seqlens", "context_lengths", "tables", "k_scale", "v_scale"),
    ("num_heads", "blocks_per_row"),
    ("q_out", "k_cache", "v_cache"),
)


def store_kv(qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, spec: AttentionSpec, step: Step) -> None:
    """Store the step's k and v in the cache, quantised where it is.  With RoPE q and k are rotated first, q in place.

    The step's first sequences, with a single new token each, are left to decode_attention.
    qkv: [num_tokens, 3 * num_heads * head_dim]; cos, sin: [capacity, head_dim / 2] float32, unread without RoPE.
    """
    assert step.num_singles is not None, "a step with prompts"
    k_scale, v_scale = (qkv if scale is None else scale for scale in (cache.k_scale, cache.v_scale))
    STORE_KV.launch(
        (cdiv(step.max_new_tokens, BLOCK_TOKENS), spec.num_heads, step.batch_size - step.singles),
        (qkv, cos, sin, step.num_singles, step.cu_seqlens, step.context_lengths, cache.tables, k_scale, v_scale),
        (spec.num_heads, cache.tables.shape[1]),
        (qkv, cache.k, cache.v),
        {
            "TOKENS_PER_BLOCK": cache.tokens_per_block,
            "HEAD_DIM": spec.head_dim,
            "ROTARY": spec.rotary,
            "HALF_BLOCK": next_power_of_2(spec.head_dim // 2),
            "BLOCK_T": BLOCK_TOKENS,
        },
    )
