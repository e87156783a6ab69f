"""One table of op cases for every executor: inputs, the expected result by ops.py in float64, and the tolerance.

A case is a function of an executor's ops; it returns (result, expected).  `run(ops, value)` takes ops made by
make_ops(spec, capacity) and `value`, which turns what an op returned into a CPU tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from drawn import normal
from kernel_device import to_device
from scattered import scattered
from weight_formulas import weights

from baichuan.model.position import alibi_slopes
from baichuan.quant.scaled import LIMITS
from baichuan.records import AttentionSpec, DenseWeight, Step

EPS = 1e-6
CAPACITY = 40
ROUNDING = 2e-6  # float32: sums of a few hundred terms, relative to the largest result
HALF_ROUNDING = 2e-3  # float16: two roundings of 2^-11 in a row, and some room
NEIGHBOUR = 2e-2  # an 8-bit number may be the neighbour of float64's where a quotient is halfway between two


@dataclass(frozen=True)
class Case:
    name: str
    spec: AttentionSpec
    run: Callable  # (ops, value, device) -> (result, expected)
    tolerance: float  # largest max|result - expected| / max|expected|
    dtype: torch.dtype = torch.float32


def rope(total_heads=4, first=0, heads=4):
    return AttentionSpec(heads, first, total_heads, 16, True)


def alibi(total_heads=5, first=0, heads=5):
    return AttentionSpec(heads, first, total_heads, 16, False)


def embedding(ops, value, device):
    tokens, weight = torch.tensor([3, 0, 9, 3]), normal(10, 32)
    return value(ops.embedding(tokens.to(device), weight.to(device))), weight[tokens].double()


def norm_inputs(tokens, with_residual, dtype):
    """(x, residual, norm), their add_rms_norm in float64, and the sum of x and residual."""
    x, norm = normal(tokens, 64, dtype=dtype), normal(64, seed=1, dtype=dtype)
    residual = normal(tokens, 64, seed=2, dtype=dtype) if with_residual else None
    r = (x if residual is None else x + residual).double()
    return (x, residual, norm), r / torch.sqrt(r.square().mean(-1, keepdim=True) + EPS) * norm.double(), r


def add_rms_norm(with_residual, dtype):
    def run(ops, value, device):
        given, n, r = norm_inputs(5, with_residual, dtype)
        normed, total = ops.add_rms_norm(*to_device(tuple(given), device), EPS)
        return torch.cat((value(normed), value(total))), torch.cat((n, r))

    return run


def norm_linear(kind, tokens, with_residual, dtype=torch.float32):
    def run(ops, value, device):
        given, n, r = norm_inputs(tokens, with_residual, dtype)
        record, formula = weights(kind, dtype=dtype)
        y, total = ops.norm_linear(*to_device(tuple(given), device), to_device(record, device), EPS)
        return scaled_together(value(y), value(total), formula(n), r)

    return run


def gated_mlp(kind, tokens, dtype=torch.float32):
    def run(ops, value, device):
        given, n, r = norm_inputs(tokens, True, dtype)
        gate_up, to_gate_up = weights(kind, 256, 64, dtype=dtype)
        down, to_down = weights(kind + " smoother" * (kind == "smooth_quant"), 64, 128, seed=6, dtype=dtype)
        y, total = ops.gated_mlp(
            *to_device(tuple(given), device), to_device(gate_up, device), to_device(down, device), EPS
        )
        gate, up = to_gate_up(n).chunk(2, -1)
        return scaled_together(value(y), value(total), to_down(gate / (1 + torch.exp(-gate)) * up), r)

    return run


def norm_head(tokens, rows):
    def run(ops, value, device):
        given, n, _ = norm_inputs(tokens, True, torch.float32)
        weight = normal(12, 64, seed=3)
        logits = ops.norm_head(
            *to_device(tuple(given), device), DenseWeight(weight.to(device)), torch.tensor(rows, device=device), 10, EPS
        )
        return value(logits), (n[rows] @ weight.double().T)[:, :10]

    return run


def scaled_together(y, total, expected_y, expected_total):
    """Both results of an op in one tensor, each divided by its largest expected value."""
    y_scale, total_scale = expected_y.abs().max(), expected_total.abs().max()
    result = torch.cat((y.double() / y_scale, total.double() / total_scale), 1)
    return result, torch.cat((expected_y / y_scale, expected_total / total_scale), 1)


def linear(kind, tokens):
    def run(ops, value, device):
        record, formula = weights(kind)
        x = normal(tokens, 64, seed=5)
        return value(ops.partial_linear(x.to(device), to_device(record, device))), formula(x.double())

    return run


def head(ops, value, device):
    weight, x = normal(12, 32), normal(3, 32, seed=1)
    expected = x.double() @ weight.double().T
    return value(ops.head(x.to(device), DenseWeight(weight.to(device)), 10)), expected[:, :10]


def silu_mul(ops, value, device):
    x = normal(4, 64) * 3
    gate, up = x.double().chunk(2, -1)
    return value(ops.silu_mul(x.to(device))), gate / (1 + torch.exp(-gate)) * up


def select_rows(ops, value, device):
    x, rows = normal(6, 32), torch.tensor([5, 0, 2])
    return value(ops.select_rows(x.to(device), rows.to(device))), x[rows].double()


def stored(x, scale, dtype):
    """A key or value as a cache of this type holds it, in float64."""
    if dtype not in LIMITS:
        return x
    q = (x / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (q.round() if dtype == torch.int8 else q.float().to(dtype).double()) * scale


def attention(spec, cache_dtype):
    """A ragged prefill of lengths 5, 1, 9; a chunk that appends 3, 2, 1, one of 0, 1, 0; a decode step of one each."""

    def run(ops, value, device):
        scale = 0.03 if cache_dtype in LIMITS else None
        scales = [None if scale is None else torch.tensor([scale], device=device) for _ in range(2)]
        cache = scattered(3, CAPACITY, spec, cache_dtype, device, scales)
        past, keys, results, expected = [0, 0, 0], [[], [], []], [], []
        for seed, lengths in enumerate(([5, 1, 9], [3, 2, 1], [0, 1, 0], [1, 1, 1])):
            step = Step.of([[0] * n for n in lengths], past)
            qkv = normal(sum(lengths), 3 * spec.num_heads * spec.head_dim, seed=seed)
            given = qkv.clone().to(device)  # a copy, because the op may overwrite it
            results.append(value(ops.attention(given, cache, spec, on_device(step, device))))
            q, k, v = qkv.double().unflatten(-1, (3, spec.num_heads, spec.head_dim)).unbind(1)
            if spec.rotary:
                q, k = (turned(each, step.positions) for each in (q, k))
            for row, part in enumerate(torch.arange(sum(lengths)).split(lengths)):
                keys[row] += [(stored(k[t], scale, cache_dtype), stored(v[t], scale, cache_dtype)) for t in part]
                expected += [attended(q[t], keys[row], int(step.positions[t]), spec) for t in part]
            past = [a + b for a, b in zip(past, lengths, strict=True)]
        return torch.cat(results), torch.stack(expected)

    return run


def turned(x, positions):
    angle = positions.double()[:, None] * 10000.0 ** -(torch.arange(0, 16, 2).double() / 16)
    pairs = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat((pairs.real, pairs.imag), -1)


def attended(q, keys, position, spec):
    k, v = (torch.stack(each[: position + 1]) for each in zip(*keys, strict=True))  # [context, heads, dim]
    scores = torch.einsum("hd,chd->hc", q, k) / spec.head_dim**0.5
    if not spec.rotary:
        slopes = alibi_slopes(spec.total_heads)[spec.first_head : spec.first_head + spec.num_heads].double()
        scores += slopes[:, None] * (torch.arange(position + 1) - position)
    return torch.einsum("hc,chd->hd", scores.softmax(-1), v).flatten()


def on_device(step, device):
    return type(step)(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in vars(step).items()})


CACHES = {"the dtype": (torch.float32, ROUNDING), "int8": (torch.int8, NEIGHBOUR), "fp8": (torch.float8_e4m3fn, 0.05)}
SPECS = {"RoPE": rope(), "RoPE, second rank": rope(8, 4, 4), "ALiBi": alibi(), "ALiBi, second rank": alibi(10, 5, 5)}
KINDS = {
    "dense": ROUNDING,
    "int8": ROUNDING,
    "int4": 1e-4,  # a kernel may sum integers with an offset, which costs a few bits of float32
    "int4 group": 1e-4,
    "int4 zero": 1e-4,
    "int4 group zero": 1e-4,
    "smooth_quant": NEIGHBOUR,
    "smooth_quant static": NEIGHBOUR,
    "smooth_quant smoother": NEIGHBOUR,
    "fp8": 0.05,  # e4m3 has 3 bits
    "fp8 per token and channel": 0.05,
}
HALF_KINDS = ("dense", "int8", "int4", "int4 group", "int4 group zero")
CASES = [
    Case("embedding", rope(), embedding, 0.0),
    *(
        Case(f"linear {kind}, {n} rows", rope(), linear(kind, n), bound)
        for kind, bound in KINDS.items()
        for n in (1, 7)
    ),
    *(
        Case(f"norm_linear {kind}, {n} rows", rope(), norm_linear(kind, n, n > 1), bound)
        for kind, bound in KINDS.items()
        for n in (1, 7)
    ),
    *(
        Case(f"norm_linear {kind} in float16, {n} rows", rope(), norm_linear(kind, n, True, torch.float16), 4e-3)
        for kind in HALF_KINDS
        for n in (1, 7)
    ),
    *(
        Case(f"gated_mlp {kind}, {n} rows", rope(), gated_mlp(kind, n), 2 * bound)  # two products, one after the other
        for kind, bound in KINDS.items()
        for n in (1, 7)
    ),
    *(
        Case(f"gated_mlp {kind} in float16, {n} rows", rope(), gated_mlp(kind, n, torch.float16), 8e-3)
        for kind in HALF_KINDS
        for n in (1, 7)
    ),
    Case("norm_head of the one row", rope(), norm_head(1, [0]), ROUNDING),
    Case("norm_head of some rows", rope(), norm_head(7, [6, 0, 3]), ROUNDING),
    *(
        Case(f"attention {name}, cache in {kind}", spec, attention(spec, dtype), bound)
        for name, spec in SPECS.items()
        for kind, (dtype, bound) in CACHES.items()
    ),
]
# Cases of the ops that ComposedOps builds the fused ops from.
SIMPLE_CASES = [
    Case("add_rms_norm", rope(), add_rms_norm(True, torch.float32), ROUNDING),
    Case("add_rms_norm without residual", rope(), add_rms_norm(False, torch.float32), ROUNDING),
    Case("add_rms_norm in float16", rope(), add_rms_norm(True, torch.float16), HALF_ROUNDING),
    Case("silu_mul", rope(), silu_mul, ROUNDING),
    Case("select_rows", rope(), select_rows, 0.0),
    Case("head", rope(), head, ROUNDING),
]


def error(result, expected) -> float:
    """max|result - expected| / max|expected|; infinite where the result is not a number."""
    found = float((result.double() - expected).abs().max() / expected.abs().max())
    return found if found == found else float("inf")
