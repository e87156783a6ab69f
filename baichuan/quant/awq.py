"""AWQ (https://arxiv.org/abs/2306.00978): integers of a matrix whose columns grow with their inputs.

x Wᵀ = (x / f) (W f)ᵀ for any f > 0 per input channel, and what comes before the linear can divide x by f.  Rounding W f
leaves a column an error of 1 / f, so the channels that carry most had better have a large f.  With r the size of x,

    f = r ** a,    a the one of EXPONENTS that leaves the least mean |(W - V) x|²,  V the integers' values

and then each group's scale is searched, which clips, by the error of the group's own products.  r is the root mean
square, where the paper has the mean magnitude: both leave the same error, and H = mean(x xᵀ) has the squares.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baichuan.config import WeightOnly
from baichuan.quant.grid import Grid, dequantised, nearest, search_grid
from baichuan.quant.moments import InputMoments
from baichuan.quant.scaled import require_finite

EXPONENTS = [step / 20 for step in range(20)]  # 0: all factors are 1
CLIPPING = [1.1]  # the one factor while exponents are compared: the whole search would leave 0.6 % less error
SMALLEST = 0.01  # lower bound of r, in means of r: other texts may use a channel that these do not


def awq(weight: Tensor, inputs: InputMoments, form: WeightOnly, scale_dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Integers q of `weight`, which is about (q - zero) * scale / factor, and their grid.

    weight: [out_features, in_features] float32 -> q [out_features, in_features] int8, grid with scales in scale_dtype
    Raises CheckpointError for a NaN or an infinity.
    """
    require_finite(weight.abs().amax(-1))
    tried = [factors(inputs, exponent) for exponent in EXPONENTS]
    errors = [inputs.error(weight - dequantised(*_rounded(weight, inputs, factor, form, CLIPPING))) for factor in tried]
    factor = tried[errors.index(min(errors))]
    q, grid = _rounded(weight, inputs, factor, form, None, scale_dtype)
    return q.to(torch.int8), grid


def factors(inputs: InputMoments, exponent: float) -> Tensor:
    """r ** exponent, whose largest times the smallest is 1: [in_features] float32."""
    size = inputs.squares.diagonal().double().sqrt()
    size = size.clamp(min=SMALLEST * size.mean())
    factor = size**exponent if size.any() else torch.ones_like(size)
    return (factor / (factor.max() * factor.min()).sqrt()).float()


def _rounded(weight, inputs: InputMoments, factor: Tensor, form: WeightOnly, clipping, scale_dtype=torch.float32):
    """Integers nearest to weight * factor, as floats, and their grid."""
    importance = inputs.squares / (factor * factor[:, None])
    grid = search_grid(weight * factor, importance, form, clipping)
    grid = replace(grid, scale=grid.scale.to(scale_dtype), factor=factor)
    return nearest(weight, grid, form), grid
