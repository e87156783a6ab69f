"""GPTQ (https://arxiv.org/abs/2210.17323): integers that change a matrix's products with known inputs least.

For inputs x with H = mean(x xᵀ), a row w and its integers' values v, the error is (w - v) H (w - v)ᵀ.  Columns are
rounded one after another, and the columns still to come make up for each rounding as well as they can.  With
H⁻¹ = Uᵀ U, U upper triangular, that is

    e = (w[j] - v[j]) / U[j, j],    w[j + 1:] -= e * U[j, j + 1:]

and the error is the sum of all e².  Columns come in the order of their inputs' mean squares, largest first, while
groups of channels stay as they are, with scales found beforehand: kernels and files see no difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baichuan.config import WeightOnly
from baichuan.errors import CheckpointError
from baichuan.quant.scaled import require_finite

RANGES = {4: (-8, 7), 8: (-127, 127)}  # the integers, by their bits
DAMPING = 0.05  # times the mean of H's diagonal, added to the diagonal: for texts unlike those of the calibration
BLOCK = 128  # columns whose roundings are passed on to later blocks together
SEARCH_ELEMENTS = 1 << 22  # numbers of a matrix whose scales are searched at once

ZERO_LIMIT = 16  # largest magnitude of a zero

# The search tries scales that map a group's value of largest magnitude to one of these times the lowest integer, or
# with zeros the group's range to one of these times the range of the integers.  A factor above 1 clips.
FACTORS = {4: [0.85 + 0.05 * step for step in range(16)], 8: [1.0 + 0.04 * step for step in range(6)]}
ZERO_FACTORS = [0.95 + 0.05 * step for step in range(16)]


@dataclass(frozen=True)
class Grid:
    """The values that a matrix may have: (q - zero) * scale for each group of input channels."""

    scale: Tensor  # [out_features, groups], of either sign with 4 bits
    zero: Tensor | None = None  # [out_features, groups] int8

    def columns(self, order: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros, in float32, of the columns in this order: each [in_features, out_features]."""
        scale = self.scale.float().t()[order // group_size]
        return scale, torch.zeros_like(scale) if self.zero is None else self.zero.float().t()[order // group_size]


def gptq(weight: Tensor, hessian: Tensor, form: WeightOnly, scale_dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Integers q of `weight`, which is about (q - zero) * scale, and their grid.

    weight: [out_features, in_features] float32; hessian: [in_features, in_features] float32, mean(x xᵀ) of its inputs
    -> q [out_features, in_features] int8, grid with scales in scale_dtype
    Raises CheckpointError for a NaN or an infinity.
    """
    require_finite(weight.abs().amax(-1))
    group_size, (low, high) = form.group_size or weight.shape[1], RANGES[form.bits]
    seen = hessian.diagonal()
    grid = search_grid(weight, seen, form)
    grid = replace(grid, scale=grid.scale.to(scale_dtype))
    order = torch.argsort(seen, descending=True, stable=True)
    columns = weight.t()[order].contiguous()
    q = _round_columns(columns, *grid.columns(order, group_size), inverse_factor(hessian, order), low, high)
    return q.t()[:, torch.argsort(order)].to(torch.int8), grid


def dequantised(q: Tensor, grid: Grid) -> Tensor:
    """The values that the integers stand for: [out_features, in_features] float32."""
    groups = q.float().unflatten(-1, (grid.scale.shape[1], -1))
    if grid.zero is not None:
        groups -= grid.zero[..., None]
    return (groups * grid.scale.float()[..., None]).flatten(-2)


def inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """U of the damped H with its rows and columns in `order`: H⁻¹ = Uᵀ U.  [in_features, in_features] float32

    An input that is always zero counts as one of no consequence.  Raises CheckpointError where H is not finite.
    """
    damped = hessian.double()[order][:, order]
    mean = damped.diagonal().mean()
    if not torch.isfinite(mean):
        raise CheckpointError("an activation is not finite (NaN or infinity) on the calibration texts; check both")
    damped.diagonal().add_(DAMPING * mean if mean > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def search_grid(weight: Tensor, importance: Tensor, form: WeightOnly) -> Grid:
    """Each group's scale, and zero, that leave the least sum of importance * (w - (q - zero) * scale)².

    weight: [out_features, in_features]; importance: [in_features] -> scales in float32
    """
    group_size = form.group_size or weight.shape[1]
    importance = importance.view(1, -1, group_size) + torch.finfo(torch.float32).tiny
    blocks = [
        _best_grid(rows.unflatten(-1, (-1, group_size)), importance, form)
        for rows in weight.split(max(1, SEARCH_ELEMENTS // weight.shape[1]))
    ]
    scale, zero = (torch.cat([block[index] for block in blocks]).squeeze(-1) for index in (0, 1))
    return Grid(scale, zero.to(torch.int8) if form.zero_points else None)


def _best_grid(groups: Tensor, importance: Tensor, form: WeightOnly) -> tuple[Tensor, Tensor]:
    """groups: [n, groups, group_size]; importance: [1, groups, group_size] -> scale, zero: [n, groups, 1]

    For given integers q and zero the best scale is <w, q - zero> / <q - zero, q - zero>: each candidate gives integers,
    these give their best scale.
    """
    low, high = RANGES[form.bits]
    best, best_zero = torch.zeros_like(groups[..., :1]), torch.zeros_like(groups[..., :1])
    error = torch.full_like(best, torch.inf)
    for scale, zero in _candidates(groups, form):
        steps = _nearest(groups, scale, zero, low, high) - zero
        length = (steps.square() * importance).sum(-1, keepdim=True)
        scale = torch.where(length > 0, (groups * steps * importance).sum(-1, keepdim=True) / length, 0)
        steps = _nearest(groups, scale, zero, low, high) - zero
        left = ((groups - steps * scale).square_() * importance).sum(-1, keepdim=True)
        better = left < error
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        error = torch.minimum(left, error)
    return best, best_zero


def _candidates(groups: Tensor, form: WeightOnly) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zeros that the search tries: each [n, groups, 1]."""
    low, high = RANGES[form.bits]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if form.bits == 8:
        largest = -largest.abs()  # the integers are symmetric, and scales stay positive
    none = torch.zeros_like(largest)
    for factor in FACTORS[form.bits]:
        yield largest / (low * factor), none
    if not form.zero_points:
        return
    bottom, top = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for factor in ZERO_FACTORS:
        scale, middle = (top - bottom) / ((high - low) * factor), (top + bottom) / 2
        zero = torch.where(scale > 0, ((low + high) / 2 - middle / scale).round_(), 0)
        yield scale, zero.clamp_(-ZERO_LIMIT, ZERO_LIMIT)


def _round_columns(w: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """w, which is overwritten, scale, zero: [in_features, out_features], rows in their order; factor: U
    -> integers as floats"""
    q = torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for row in range(start, stop):
            q[row] = _nearest(w[row], scale[row], zero[row], low, high)
            error = (w[row] - (q[row] - zero[row]) * scale[row]) / factor[row, row]
            w[row + 1 : stop].addr_(factor[row, row + 1 : stop], error, alpha=-1)
            errors[row - start] = error
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return q


def _nearest(w: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The integers whose values are nearest to w; the zero where the scale is 0."""
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().add_(zero).clamp_(low, high)
