"""One token's activations, laid out for the GEMVs that read several weights as one 32-bit word.

Plane j holds the input channels j, j + p, j + 2p, ... as float32, for p weights a word: a thread then reads its words
and its inputs as equal runs of four, and multiplies what lies at place j of each word by plane j.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.gemv import NormInput, load_input, norm_arguments
from baichuan.kernels.primitives import quantise, start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2


@triton.jit
def _make_planes(
    x, residual, norm_weight, input_scale,
    width,
    total, planes,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPS: tl.constexpr, TO_FP8: tl.constexpr, PLANES: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    words = width // PLANES
    word, place = tl.arange(0, BLOCK)[:, None], tl.arange(0, PLANES)[None, :]
    mask = word < words
    value, _ = load_input(x, residual, norm_weight, total, word * PLANES + place, mask, False, False)
    dtype: tl.constexpr = x.dtype.element_ty
    if NORM:
        value, _ = load_input(x, residual, norm_weight, total, word * PLANES + place, mask, NORM, HAS_RESIDUAL)
        inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(value * value, 1), 0) / width + EPS)
        weight = tl.load(norm_weight + word * PLANES + place, mask, other=0.0).to(tl.float32)
        value = ((value * inverse_rms).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    if TO_FP8:
        value = quantise(value, tl.load(input_scale), tl.float8e4nv).to(tl.float32)
    if PLANES == 8:  # see gemv_int4.py
        constant = tl.sum(value * tl.where(place % 2 == 0, 136.0, 2056.0), 1)
        words_1d = tl.arange(0, BLOCK)
        tl.store(planes + 8 * words + words_1d, constant, words_1d < words)
        value *= tl.where(place % 2 == 0, 1.0, 16.0)
    tl.store(planes + place * words + word, value, mask)


MAKE_PLANES = KernelSpec(_make_planes, ("x", "residual", "norm_weight", "input_scale"), ("width",), ("total", "planes"))


def make_planes(x: Tensor | NormInput, weights_per_word: int, fp8_scale: Tensor | None = None) -> Tensor:
    """The planes of x, [weights_per_word, in_features / weights_per_word] float32.

    x: [1, in_features], or the norm that is to be taken first; with fp8_scale [1] float32 the planes hold
    e4m3(x / fp8_scale).  For 8 weights a word the odd planes hold 16 x, and a last row holds what gemv_int4 takes from
    each word's sum.
    """
    inputs, total, constants = norm_arguments(x)
    width = inputs[0].shape[1]
    words = width // weights_per_word
    rows = weights_per_word + (weights_per_word == 8)
    planes = torch.empty(rows, words, dtype=torch.float32, device=inputs[0].device)
    block = next_power_of_2(words)
    MAKE_PLANES.launch(
        (1,),
        (*inputs, planes if fp8_scale is None else fp8_scale),
        (width,),
        (total, planes),
        {**constants, "TO_FP8": fp8_scale is not None, "PLANES": weights_per_word, "BLOCK": block},
        num_warps=min(max(block * weights_per_word // 512, 1), 16),
    )
    return planes
