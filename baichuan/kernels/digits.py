"""One token's activations as integers, for the GEMVs of integer weights.

Against its largest magnitude a token is a row of fixed-point numbers, of 16 bits where its dtype has no more than 11
significant ones, of 24 in float32.  Each is two or three signed bytes, its digits to base 256, and a sum of products
with integer weights is as many exact sums of bytes by bytes, which a GPU takes four at a time: a fraction of the work
of turning the weights into floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.norm import NormInput
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2

LARGEST = {2: 32639.0, 3: 8_000_000.0}  # what so many signed digits reach, and float32 tells apart


@dataclass(frozen=True)
class Digits:
    """One token's activations, x ≈ sum over i of digit i * 256^i, times scale.

    For 8-bit weights row i of the words holds digit i of four channels a word, in their order.  For 4-bit weights
    rows 2 i and 2 i + 1 hold digit i of the even and of the odd ones of eight channels.
    """

    words: Tensor  # [digits, in_features / 4] or [2 * digits, in_features / 8] int32
    scale: Tensor  # [1] float32


@triton.jit
def _make_digits(
    x, residual, norm_weight,
    width,
    total, words, scale,
    NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EPS: tl.constexpr, DIGITS: tl.constexpr, LARGEST: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    count = width // (4 * PARTS)
    word = tl.arange(0, BLOCK)
    byte, part = tl.arange(0, 4)[None, :, None], tl.arange(0, PARTS)[None, None, :]
    k = word[:, None, None] * (4 * PARTS) + byte * PARTS + part
    mask = k < width
    if NORM:
        weight = tl.load(norm_weight + k, mask, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    value = tl.load(x + k, mask, other=0.0)
    dtype: tl.constexpr = value.dtype
    if HAS_RESIDUAL:
        value = (value.to(tl.float32) + tl.load(residual + k, mask, other=0.0).to(tl.float32)).to(dtype)
        tl.store(total + k, value, mask)
    value = value.to(tl.float32)
    if NORM:
        mean = tl.sum(tl.reshape(value * value, (BLOCK * 4 * PARTS,)), 0) / width
        value = ((value * (1.0 / tl.sqrt_rn(mean + EPS))).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)
    largest = tl.max(tl.reshape(tl.abs(value), (BLOCK * 4 * PARTS,)), 0)
    largest = tl.where(largest > 0, largest, 1.0)
    tl.store(scale, largest / LARGEST)
    number = value * (LARGEST / largest)
    number = (number + tl.where(number < 0, -0.5, 0.5)).to(tl.int32)
    outputs = tl.arange(0, PARTS)[None, :] * count + word[:, None]
    for digit in tl.static_range(DIGITS):
        low = (number << 24) >> 24
        number = (number - low) >> 8
        packed = tl.sum((low & 0xFF) << (8 * byte), 1)  # the bytes of a word do not overlap: a sum is their union
        tl.store(words + digit * PARTS * count + outputs, packed, (word < count)[:, None])


MAKE_DIGITS = KernelSpec(_make_digits, ("x", "residual", "norm_weight"), ("width",), ("total", "words", "scale"))


def make_digits(x: Tensor | NormInput, four_bit_weights: bool) -> Digits:
    """The digits of x, [1, in_features], or of the norm that is to be taken first.

    in_features is a multiple of 4, or of 8 for 4-bit weights.
    """
    norm = isinstance(x, NormInput)
    source = x.x if norm else x
    residual = x.residual if norm and x.residual is not None else source
    parts, width = 2 if four_bit_weights else 1, source.shape[1]
    count = width // (4 * parts)
    digits = 3 if source.dtype == torch.float32 else 2
    words = torch.empty(digits * parts, count, dtype=torch.int32, device=source.device)
    scale = torch.empty(1, dtype=torch.float32, device=source.device)
    block = next_power_of_2(count)
    MAKE_DIGITS.launch(
        (1,),
        (source, residual, x.weight if norm else source),
        (width,),
        (x.total if norm else source, words, scale),
        {
            "NORM": norm,
            "HAS_RESIDUAL": norm and x.residual is not None,
            "EPS": x.eps if norm else 0.0,
            "DIGITS": digits,
            "LARGEST": LARGEST[digits],
            "PARTS": parts,
            "BLOCK": block,
        },
        num_warps=min(max(block * parts // 128, 1), 16),
    )
    return Digits(words, scale)
