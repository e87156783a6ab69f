"""One token's activations, laid out for the GEMVs that read several weights as one 32-bit word.

Plane j holds the input channels j, j + p, j + 2p, ... as float32, for p weights a word: a thread then reads its words
and its inputs as equal runs of four, and multiplies what lies at place j of each word by plane j.  Of eight planes the
odd ones hold 16 x, see gemv_int4.py.  The kernels whose results a GEMV reads can write planes themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import quantise, start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2


@dataclass(frozen=True)
class NormInput:
    """What is still to be made: norm(x + residual) * weight, x + residual being kept."""

    x: Tensor  # [num_tokens, in_features]
    residual: Tensor | None
    weight: Tensor  # [in_features]
    eps: float
    total: Tensor  # as x, x + residual is written here; x itself without a residual


@dataclass(frozen=True)
class Planes:
    """One token's activations as planes."""

    values: Tensor  # [weights a word, in_features / weights a word] float32
    dtype: torch.dtype  # what the activations were rounded to


@triton.jit
def store_channels(out, x, k, mask, width, PLANES: tl.constexpr):
    """Write the channels k of one row of x, float32: in their order (PLANES 0), or into the planes."""
    if PLANES == 0:
        tl.store(out + k, x.to(out.dtype.element_ty), mask)
    else:
        if PLANES == 8:
            x *= tl.where(k % 2 == 0, 1.0, 16.0)
        tl.store(out + k % PLANES * (width // PLANES) + k // PLANES, x, mask)


@triton.jit
def _make_planes(
    x, residual, norm_weight, input_scale,
    width,
    total, planes,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPS: tl.constexpr, TO_FP8: tl.constexpr, PLANES: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    k = tl.arange(0, BLOCK)
    mask = k < width
    if NORM:
        weight = tl.load(norm_weight + k, mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    value = tl.load(x + k, mask, other=0.0)
    dtype: tl.constexpr = value.dtype
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + k, mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + k, value, mask)
    value = value.to(tl.float32)
    if NORM:
        inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) / width + EPS)
        value = ((value * inverse_rms).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    if TO_FP8:
        value = quantise(tl.where(mask, value, 1.0), tl.load(input_scale), tl.float8e4nv).to(tl.float32)
    store_channels(planes, value, k, mask, width, PLANES)


MAKE_PLANES = KernelSpec(_make_planes, ("x", "residual", "norm_weight", "input_scale"), ("width",), ("total", "planes"))


def make_planes(x: Tensor | NormInput, weights_per_word: int, fp8_scale: Tensor | None = None) -> Planes:
    """The planes of x, [1, in_features], or of the norm that is to be taken first.

    With fp8_scale [1] float32 they hold e4m3(x / fp8_scale).
    """
    norm = isinstance(x, NormInput)
    source = x.x if norm else x
    residual = x.residual if norm and x.residual is not None else source
    width = source.shape[1]
    planes = torch.empty(weights_per_word, width // weights_per_word, dtype=torch.float32, device=source.device)
    block = next_power_of_2(width)
    MAKE_PLANES.launch(
        (1,),
        (source, residual, x.weight if norm else source, planes if fp8_scale is None else fp8_scale),
        (width,),
        (x.total if norm else source, planes),
        {
            "NORM": norm,
            "HAS_RESIDUAL": norm and x.residual is not None,
            "EPS": x.eps if norm else 0.0,
            "TO_FP8": fp8_scale is not None,
            "PLANES": weights_per_word,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 16),
    )
    return Planes(planes, source.dtype)


def new_output(width: int, dtype: torch.dtype, device: torch.device, weights_per_word: int) -> Tensor | Planes:
    """Room for one token's channels, as [1, width] or, for weights_per_word > 0, as planes."""
    if weights_per_word == 0:
        return torch.empty(1, width, dtype=dtype, device=device)
    shape = (weights_per_word, width // weights_per_word)
    return Planes(torch.empty(shape, dtype=torch.float32, device=device), dtype)
