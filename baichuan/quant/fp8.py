"""FP8 (e4m3, https://arxiv.org/abs/2209.05433) with a scale for each row: tokens' at run time, channels' of a weight.

e4m3 is a floating-point type with three bits of mantissa.  A token's few largest numbers carry most of its error, and
its scale makes the largest one exact.  Ranks that hold a share of its channels each have a scale of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.quant.scaled import LIMITS, divided, quantise, require_finite, scale_for

E4M3 = torch.float8_e4m3fn
CANDIDATES = [2 ** (step / 8) for step in range(8)]  # a channel's scales, times max|row| / 448; twice that is the same
SMALLEST_SCALE = 2.0**-100  # least scale of a token: far above the smallest float32


def quantise_channels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """q = e4m3(row / scale) with the scale of CANDIDATES that leaves the least |row - q scale|².

    rows: [n, in_features] of any floating type -> q [n, in_features] float8_e4m3fn, scale [n] float32.
    Raises CheckpointError for a NaN or an infinity.
    """
    least = scale_for(require_finite(rows.abs().amax(-1, keepdim=True)), E4M3)
    best = torch.full_like(least, torch.inf, dtype=torch.float64)
    chosen = least
    for factor in CANDIDATES:
        scale = least * factor
        left = (
            quantise(rows, scale, E4M3)
            .float()
            .mul_(scale)
            .sub_(rows)
            .square_()
            .sum(-1, keepdim=True, dtype=torch.float64)
        )
        chosen, best = torch.where(left < best, scale, chosen), torch.minimum(left, best)
    return quantise(rows, chosen, E4M3), chosen.squeeze(-1)


def token_scale(x: Tensor) -> Tensor:
    """max|x| / 448, and at least 2^-100.  [..., n] -> [..., 1] float32"""
    return divided(x.float().abs().amax(-1, keepdim=True), LIMITS[E4M3]).clamp_(min=SMALLEST_SCALE)
