"""The cases of attention over a paged cache, for prompts and for decode steps, and of the store of keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.memory import KV_DTYPES
from baichuan.kernels.kv_store import store_kv
from baichuan.model.decoder import attention_spec
from baichuan.parallel.comm import Solo
from baichuan.quant.kv_cache import dequantise_kv, quantise_kv
from baichuan.records import AttentionSpec, LayerCache, Step
from benchmarks.kernel_cases import NEIGHBOUR, ROUNDED, Case, Sizes, normal

KV_SCALES = {"none": None, "int8": 0.04, "fp8": 0.01}


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    own = attention_spec(sizes.model, 0, 1)
    for spec in (own, replace(own, rotary=not own.rotary)):
        for batch, length in sizes.prefill:
            yield _prefill(spec, device, "none", batch, length)
            yield _store(spec, device, "none", batch, length)
    yield _store(own, device, "int8", *sizes.prefill[-1])
    yield _store(own, device, "fp8", *sizes.prefill[-1])
    for kv_cache in KV_SCALES:
        for batch, context in sizes.decode:
            yield _decode(own, device, kv_cache, batch, context)
    yield _decode(replace(own, rotary=not own.rotary), device, "none", *sizes.decode[-1])


def _decode(spec: AttentionSpec, device: torch.device, kv_cache: str, batch: int, context: int) -> Case:
    step = Step.of([[0]] * batch, [context - 1] * batch, device=device)
    name = f"decode attention {_position(spec)}, cache {_cache(kv_cache)}, {batch} x {context}"
    return _attending(name, spec, device, kv_cache, step, flops=0)


def _prefill(spec: AttentionSpec, device: torch.device, kv_cache: str, batch: int, length: int) -> Case:
    step = Step.of([[0] * length] * batch, device=device)
    name = f"prefill attention {_position(spec)} with its kv store, {batch} x {length}"
    flops = batch * spec.num_heads * spec.head_dim * 2 * length * (length + 1)  # two products over half a square
    return _attending(name, spec, device, kv_cache, step, flops)


def _attending(name: str, spec: AttentionSpec, device: torch.device, kv_cache: str, step: Step, flops: int) -> Case:
    capacity = step.max_context_length
    ops = CudaOps(spec, Solo(), capacity, device, Switches())
    reference = ReferenceOps(spec, Solo(), capacity, device)
    return Case(
        name=name,
        make=partial(_qkv_and_cache, spec, device, kv_cache, step),
        run=lambda qkv, cache: ops.attention(qkv, cache, spec, step),
        expected=lambda qkv, cache: reference.attention(qkv, _copy(cache), spec, step).float(),
        tolerance=2 * ROUNDED[torch.float16] if kv_cache == "none" else NEIGHBOUR,  # the probabilities are rounded too
        flops=flops,
    )


def _store(spec: AttentionSpec, device: torch.device, kv_cache: str, batch: int, length: int) -> Case:
    step = Step.of([[0] * length] * batch, device=device)
    ops = CudaOps(spec, Solo(), length, device, Switches())
    reference = ReferenceOps(spec, Solo(), length, device)

    def expected(qkv, cache):
        cache = _copy(cache)
        reference.attention(qkv, cache, spec, step)
        return _cached(None, qkv, cache)

    read = (6 if spec.rotary else 4) * batch * length * spec.num_heads * spec.head_dim
    element = torch.int8.itemsize if KV_SCALES[kv_cache] else torch.float16.itemsize
    written = (2 * element + (2 if spec.rotary else 0)) * batch * length * spec.num_heads * spec.head_dim
    return Case(
        name=f"kv store {_position(spec)}, cache {_cache(kv_cache)}, {batch} x {length}",
        make=partial(_qkv_and_cache, spec, device, kv_cache, step),
        run=lambda qkv, cache: store_kv(qkv, ops.cos, ops.sin, cache, spec, step),
        expected=expected,
        tolerance=ROUNDED[torch.float16] if kv_cache == "none" else NEIGHBOUR,
        result=_cached,
        num_bytes=read + written,
    )


def _qkv_and_cache(
    spec: AttentionSpec, device: torch.device, kv_cache: str, step: Step, seed: int
) -> tuple[Tensor, LayerCache]:
    width, scale = spec.num_heads * spec.head_dim, KV_SCALES[kv_cache]
    qkv = normal((step.tokens.shape[0], 3 * width), device, seed)
    k_scale, v_scale = (None if scale is None else torch.full((1,), scale, device=device) for _ in range(2))
    dtype = KV_DTYPES[kv_cache] or torch.float16
    cache = LayerCache.whole_rows(
        step.batch_size, step.max_context_length, spec, dtype, device, (k_scale, v_scale), tokens_per_block=64
    )
    cache.tables.copy_(torch.randperm(cache.tables.numel(), device=device).view_as(cache.tables))
    for kept, kept_scale, n in ((cache.k, k_scale, 1), (cache.v, v_scale, 2)):
        kept.copy_(quantise_kv(normal(kept.shape, device, seed + n), kept_scale, dtype))
    return qkv, cache


def _copy(cache: LayerCache) -> LayerCache:
    return replace(cache, k=cache.k.clone(), v=cache.v.clone())


def _cached(raw: None, qkv: Tensor, cache: LayerCache) -> Tensor:
    return torch.stack((dequantise_kv(cache.k, cache.k_scale), dequantise_kv(cache.v, cache.v_scale)))


def _position(spec: AttentionSpec) -> str:
    return "RoPE" if spec.rotary else "ALiBi"


def _cache(kv_cache: str) -> str:
    return "float16" if kv_cache == "none" else kv_cache
