"""The cases of bench_kernels.py: kernels as the CUDA executor launches them, beside the reference's results.

A product runs the kernel that the executor chooses for that weight and number of rows, and includes the quantisation
of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baichuan.config import ModelConfig
from baichuan.errors import counted
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.executors.cpu.reference_linear import linear
from baichuan.executors.cuda.ops import CudaOps, Switches
from baichuan.executors.memory import KV_DTYPES
from baichuan.kernels.argmax import argmax
from baichuan.kernels.kv_store import store_kv
from baichuan.kernels.norm import add_rms_norm
from baichuan.kernels.operand import PLAIN, E4m3PerToken, Form, Int8PerToken, Int16, Operand, StaticScale
from baichuan.kernels.rows import quantise_rows
from baichuan.kernels.silu import silu_mul
from baichuan.model.decoder import attention_spec
from baichuan.parallel.comm import Solo
from baichuan.quant.fp8 import token_scale
from baichuan.quant.kv_cache import dequantise_kv
from baichuan.quant.scaled import quantise, scale_for
from baichuan.records import AttentionSpec, LayerCache, Step
from benchmarks.random_weights import PRECISIONS, RandomWeights

# Bounds of ‖result - reference‖ / ‖reference‖.  One or two roundings to the dtype: a unit in the last place.
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
NEIGHBOUR = 1e-2  # an 8-bit number next to the reference's, where a quotient is halfway between two
FLOAT32_SUMS = 1e-4  # tensor cores truncate float32 sums instead of rounding them, some hundred times per row
E4M3_SUMS = 5e-3  # tensor cores keep about 14 bits of a block's sum of e4m3 products
INT16_STEPS = 1e-4  # a rounding to multiples of max|row| / 32639
KV_SCALES = {"none": None, "int8": 0.04, "fp8": 0.01}
EPS = 1e-6


def _plain(raw: Any, *operands) -> Tensor:
    return raw


@dataclass(frozen=True)
class Case:
    name: str  # kernel, then what distinguishes the case
    make: Callable[[int], tuple]  # seed -> operands
    run: Callable[..., Any]  # the kernels, as the executor launches them
    expected: Callable[..., Tensor]  # the reference executor's result; operands are not changed
    tolerance: float  # largest ‖result - expected‖ / ‖expected‖
    flops: int = 0
    rate: str = "float16"  # the type whose matrix products are the ceiling
    result: Callable[..., Tensor] = _plain  # (what run returned, *operands) -> the tensor to check
    num_bytes: int = 0  # bytes that a run reads and writes; 0 = all of its operands and results


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    model: ModelConfig
    rows: tuple[int, ...]  # numbers of rows of the products
    tokens: tuple[int, ...]  # numbers of tokens of the kernels between products
    decode: tuple[tuple[int, int], ...]  # (batch size, context length)
    prefill: tuple[tuple[int, int], ...]  # (batch size, prompt length)


def full_sizes(model: ModelConfig) -> Sizes:
    decode = ((1, 256), (1, 4096), (64, 256), (256, 256))
    return Sizes(model, (1, 16, 64, 256), (1, 64, 1024), decode, ((1, 1024), (8, 256)))


def small_sizes(model: ModelConfig) -> Sizes:
    """Shapes that Triton's interpreter computes in seconds."""
    small = replace(model, hidden_size=128, num_heads=2, intermediate_size=128, vocab_size=66, num_layers=1)
    return Sizes(small, (1, 16), (1, 3), ((1, 200), (3, 20)), ((2, 40),))


def cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """Every kernel family's cases, products first."""
    for precision in PRECISIONS:
        yield from _products(sizes, device, precision)
    yield from _norms(sizes, device)
    yield from _activations(sizes, device)
    yield from _rows(sizes, device)
    yield from _attention(sizes, device)


def _normal(shape: tuple[int, ...], device: torch.device, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _products(sizes: Sizes, device: torch.device, precision: str) -> Iterator[Case]:
    """One layer's products at one row, and at more rows for one precision per kernel."""
    model, quant = sizes.model, PRECISIONS[precision]
    if precision in ("smooth_quant", "fp8_per_token"):
        return  # the same products as with the other scales of tokens; the cases of the norms have both
    names = [name for name in matrices(model) if name != "head" or quant.weights == "none"]
    for rows in sizes.rows if precision != "bfloat16" else sizes.rows[:1]:
        for name in names:
            if name != "head" or rows == 1 or device.type == "cuda":  # PyTorch has no such product on the CPU
                yield product_case(model, device, precision, name, rows)


def matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out_features, in_features] of a layer's matrices and the head"""
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return {
        "qkv": (3 * hidden, hidden),
        "o_proj": (hidden, hidden),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (model.vocab_size, hidden),
    }


def product_case(model: ModelConfig, device: torch.device, precision: str, name: str, rows: int) -> Case:
    """x @ Wᵀ, with silu(gate) * up for one row of gate_up, where it is part of the kernel; the head in float32."""
    quant, (out_features, in_features) = PRECISIONS[precision], matrices(model)[name]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    model = replace(model, dtype=str(dtype).removeprefix("torch."))
    ops = CudaOps(attention_spec(model, 0, 1), Solo(), 1, device, Switches())
    by_gemv = rows == 1 and precision != "fp8"
    gated, out_dtype = name == "gate_up" and by_gemv, torch.float32 if name == "head" else dtype

    def make(seed: int) -> tuple:
        absorbed = name in ("qkv", "gate_up")  # as in SmoothQuant's weights after a norm
        weight = RandomWeights(model, quant, device, seed).linear(out_features, in_features, absorbed)
        return _normal((rows, in_features), device, seed, dtype), weight

    def run(x, weight):
        chosen = ops.kernel(weight, x)
        return (chosen.run_gated if gated else chosen.run)(ops.operand(x, chosen.form), out_dtype)

    def expected(x, weight):
        with torch.device(device):  # the reference, written for the CPU, allocates its result there
            y = linear(x, weight, torch.float32, Solo())
            return ReferenceOps.silu_mul(None, y) if gated else y

    kernel = "gemv" if by_gemv else "gemm"
    tolerance = FLOAT32_SUMS if name == "head" else E4M3_SUMS if precision == "fp8" else ROUNDED[dtype]
    if gated:
        tolerance *= 2  # gate and up are rounded, then their product
    return Case(
        name=f"{kernel} {precision} {name} {out_features}x{in_features}, {counted(rows, 'row')}",
        make=make,
        run=run,
        expected=expected,
        tolerance=tolerance,
        flops=2 * rows * out_features * in_features,
        rate={"smooth_quant": "int8", "fp8": "fp8"}.get(quant.weights, "float16"),
    )


def _norms(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width = sizes.model.hidden_size
    static = torch.full((1,), 0.03, device=device)
    kinds = {
        "float16": (PLAIN, ROUNDED[torch.float16]),
        "to int8, a scale per token": (Int8PerToken(), NEIGHBOUR),
        "to int8, one scale": (StaticScale(torch.int8, static), NEIGHBOUR),
        "to e4m3": (StaticScale(torch.float8_e4m3fn, static), NEIGHBOUR),
        "to e4m3, a scale per token": (E4m3PerToken(), NEIGHBOUR),
        "to int16": (Int16(), INT16_STEPS + ROUNDED[torch.float16]),
    }

    def make(tokens: int, seed: int) -> tuple:
        return tuple(_normal(shape, device, seed + n) for n, shape in enumerate([(tokens, width)] * 2 + [(width,)]))

    for tokens in sizes.tokens:
        for kind, (form, tolerance) in kinds.items():
            yield Case(
                name=f"add_rms_norm {kind}, {counted(tokens, 'token')}",
                make=partial(make, tokens),
                run=lambda x, residual, weight, form=form: add_rms_norm(x, residual, weight, EPS, form),
                expected=lambda x, residual, weight, form=form: torch.cat(
                    _quantised_sum(ReferenceOps.add_rms_norm(None, x, residual, weight, EPS), form)
                ),
                tolerance=tolerance,
                result=lambda raw, *_: torch.cat((_dequantised(raw[0]), raw[1].float())),
            )


def _quantised_sum(pair: tuple[Tensor, Tensor], form: Form) -> tuple[Tensor, Tensor]:
    return _rounded(pair[0], form), pair[1].float()


def _rounded(x: Tensor, form: Form) -> Tensor:
    """x rounded to the given form, in float32; 16-bit integers are exact within the tolerance of these cases."""
    match form:
        case Int8PerToken():
            scale, dtype = scale_for(x.abs().amax(-1, keepdim=True), torch.int8), torch.int8
        case E4m3PerToken():
            scale, dtype = token_scale(x), torch.float8_e4m3fn
        case StaticScale(dtype, scale):
            pass
        case _:
            return x.float()
    return quantise(x, scale, dtype).float() * scale


def _dequantised(x: Operand, *_) -> Tensor:
    """The output of a kernel that ends in store_row, in float32."""
    values = x.values.float()
    if isinstance(x.form, Int16):
        high, low = values.unflatten(0, (-1, 2)).unbind(1)
        values = 256 * high + low
    return values if x.scale is None else values * x.scale.view(-1, 1)


def _activations(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width = sizes.model.intermediate_size
    kinds = {
        "float16": (PLAIN, ROUNDED[torch.float16]),
        "to int8, a scale per token": (Int8PerToken(), NEIGHBOUR),
        "to int16": (Int16(), INT16_STEPS + ROUNDED[torch.float16]),
    }
    for tokens in sizes.tokens:
        for kind, (form, tolerance) in kinds.items():
            yield Case(
                name=f"silu_mul {kind}, {counted(tokens, 'token')}",
                make=lambda seed, tokens=tokens: (_normal((tokens, 2 * width), device, seed),),
                run=lambda x, form=form: silu_mul(x, form),
                expected=lambda x, form=form: _rounded(ReferenceOps.silu_mul(None, x), form),
                tolerance=tolerance,
                result=_dequantised,
            )


def _rows(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    width, vocab_size = sizes.model.hidden_size, sizes.model.vocab_size
    for tokens in sizes.tokens:
        for kind, form, tolerance in (("int8", Int8PerToken(), NEIGHBOUR), ("int16", Int16(), INT16_STEPS)):
            yield Case(
                name=f"quantise_rows to {kind}, {counted(tokens, 'token')}",
                make=lambda seed, tokens=tokens: (_normal((tokens, width), device, seed),),
                run=lambda x, form=form: quantise_rows(x, form),
                expected=lambda x, form=form: _rounded(x, form),
                tolerance=tolerance,
                result=_dequantised,
            )
    for rows in sizes.tokens[:2]:
        yield Case(
            name=f"argmax of {vocab_size} logits, {counted(rows, 'row')}",
            make=lambda seed, rows=rows: (_normal((rows, vocab_size), device, seed, torch.float32),),
            run=argmax,
            expected=lambda logits: (
                logits.argmax(-1).float() + 1
            ),  # from 1: the relative error of an index 0 is undefined
            tolerance=0.0,
            result=lambda raw, _: raw.float() + 1,
        )


def _attention(sizes: Sizes, device: torch.device) -> Iterator[Case]:
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
    qkv = _normal((step.tokens.shape[0], 3 * width), device, seed)
    scales = [None if scale is None else torch.full((1,), scale, device=device) for _ in range(2)]
    dtype = KV_DTYPES[kv_cache] or torch.float16
    cache = LayerCache.whole_rows(
        step.batch_size, step.max_context_length, spec, dtype, device, scales, tokens_per_block=64
    )
    cache.tables.copy_(torch.randperm(cache.tables.numel(), device=device).view_as(cache.tables))
    for kept, n in ((cache.k, 1), (cache.v, 2)):
        values = _normal(kept.shape, device, seed + n)
        kept.copy_(values if scale is None else quantise(values, scales[0], dtype))
    return qkv, cache


def _copy(cache: LayerCache) -> LayerCache:
    return replace(cache, k=cache.k.clone(), v=cache.v.clone())


def _cached(raw: None, qkv: Tensor, cache: LayerCache) -> Tensor:
    return torch.stack((dequantise_kv(cache.k, cache.k_scale), dequantise_kv(cache.v, cache.v_scale)))


def _position(spec: AttentionSpec) -> str:
    return "RoPE" if spec.rotary else "ALiBi"


def _cache(kv_cache: str) -> str:
    return "float16" if kv_cache == "none" else kv_cache
