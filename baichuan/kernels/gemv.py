"""One token times a matrix.  Each weight is read once and used once, so memory bandwidth is the limit: plain
multiply-adds in float32 beside many loads in flight, with the neighbouring small operations folded in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.silu import silu
from baichuan.kernels.spec import KernelSpec, cdiv


@dataclass(frozen=True)
class NormInput:
    """A GEMV's input that is still to be made: norm(x + residual) * weight, x + residual being kept."""

    x: Tensor  # [1, in_features]
    residual: Tensor | None
    weight: Tensor  # [in_features]
    eps: float
    total: Tensor  # [1, in_features], x + residual is written here; x itself without a residual


@triton.jit
def load_input(x, residual, norm_weight, total, k, mask, NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """(x, x * norm weight), float32, of the input channels k; the first program keeps x + residual."""
    value = tl.load(x + k, mask, other=0.0)
    if NORM:
        if HAS_RESIDUAL:
            value = (value.to(tl.float32) + tl.load(residual + k, mask, other=0.0).to(tl.float32)).to(value.dtype)
            if tl.program_id(0) == 0:
                tl.store(total + k, value, mask)
        value = value.to(tl.float32)
        return value, value * tl.load(norm_weight + k, mask, other=0.0).to(tl.float32)
    else:
        value = value.to(tl.float32)
        return value, value


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of GEMV sums, each rounded to the dtype before."""
    return (silu(gate.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _gemv(
    x, residual, norm_weight, weight,
    in_features, out_features,
    total, y,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * in_features
    w = tl.load(rows + columns[None, :], (columns < in_features)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up_rows = rows + out_features.to(tl.int64) * in_features
        w_up = tl.load(up_rows + columns[None, :], (columns < in_features)[None, :], other=0.0)
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    wait_for_inputs(OVERLAP)
    for start in range(0, in_features, BLOCK_K):
        k = start + columns
        later = (k + BLOCK_K < in_features)[None, :]
        now = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, other=0.0)
        value, factor = load_input(x, residual, norm_weight, total, k, k < in_features, NORM, HAS_RESIDUAL)
        acc += now.to(tl.float32) * factor[None, :]
        if GATED:
            now = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, other=0.0)
            acc_up += now.to(tl.float32) * factor[None, :]
        if NORM:
            squares += value * value
    sums = tl.sum(acc, 1)
    inverse_rms = 1.0
    if NORM:
        inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / in_features + EPS)
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:
        result = gated(sums * inverse_rms, tl.sum(acc_up, 1) * inverse_rms, dtype)
    else:
        result = (sums * inverse_rms).to(dtype)
    tl.store(y + n, result, n < out_features)


GEMV = KernelSpec(_gemv, ("x", "residual", "norm_weight", "weight"), ("in_features", "out_features"), ("total", "y"))


def norm_arguments(x: Tensor | NormInput) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, dict]:
    """The inputs (x, residual, norm_weight), the output total and the constants that stand for x."""
    if isinstance(x, NormInput):
        residual = x.x if x.residual is None else x.residual
        constants = {"NORM": True, "HAS_RESIDUAL": x.residual is not None, "EPS": x.eps}
        return (x.x, residual, x.weight), x.total, constants
    return (x, x, x), x, {"NORM": False, "HAS_RESIDUAL": False, "EPS": 0.0}


def gemv(
    x: Tensor | NormInput,
    weight: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    block_n: int = 2,
    block_k: int = 1024,
    num_warps: int = 4,
) -> Tensor:
    """y = x @ weightᵀ for one row x; gated: silu(first half of y) * second half.

    x: [1, in_features], or the norm that is to be taken first, whose roundings to the dtype are left out;
    weight: [out_features, in_features] -> [1, out_features], or half of it if gated.
    """
    inputs, total, constants = norm_arguments(x)
    out_features = weight.shape[0] // (2 if gated else 1)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV.launch(
        (cdiv(out_features, block_n),),
        (*inputs, weight),
        (weight.shape[1], out_features),
        (total, y),
        {**constants, "GATED": gated, "BLOCK_N": block_n, "BLOCK_K": block_k},
        num_warps=num_warps,
    )
    return y
