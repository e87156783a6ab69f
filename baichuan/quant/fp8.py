"""FP8 (e4m3, https://arxiv.org/abs/2209.05433) with a scale for each row: tokens' at run time, channels' of a weight.

e4m3 is a floating-point type with three bits of mantissa.  A scale that is a power of two changes no mantissa, only
the exponent, so that all such scales give the same numbers as long as none is below the smallest exponent.  A token's
scale is such a power: ranks that hold a share of its channels each need not agree on one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.quant.scaled import LIMITS, quantise, require_finite, scale_for

E4M3 = torch.float8_e4m3fn
LARGEST = LIMITS[E4M3] / 2**9  # the mantissa, 0.5 to 1, of e4m3's largest number
SMALLEST_EXPONENT = -100  # of a token's scale: far above that of the smallest float32


def quantise_channels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """scale = max|row| / 448,  q = e4m3(row / scale).

    rows: [n, in_features] of any floating type -> q [n, in_features] float8_e4m3fn, scale [n] float32.
    Raises CheckpointError for a NaN or an infinity.
    """
    scale = scale_for(require_finite(rows.abs().amax(-1)), E4M3)
    return quantise(rows, scale[:, None], E4M3), scale


def token_scale(x: Tensor) -> Tensor:
    """The least power of two that is at least max|x| / 448, and at least 2^-100.  [..., n] -> [..., 1] float32"""
    mantissa, exponent = torch.frexp(x.float().abs().amax(-1, keepdim=True))
    exponent = torch.where(mantissa > 0, exponent - 9 + (mantissa > LARGEST), SMALLEST_EXPONENT)
    return torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=SMALLEST_EXPONENT))
