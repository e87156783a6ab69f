"""The values that a quantised matrix may have, and the search for those that suit it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.config import WeightOnly

RANGES = {4: (-8, 7), 8: (-127, 127)}  # the integers, by their bits
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


def dequantised(q: Tensor, grid: Grid) -> Tensor:
    """The values that the integers stand for: [out_features, in_features] float32."""
    groups = q.float().unflatten(-1, (grid.scale.shape[1], -1))
    if grid.zero is not None:
        groups = groups - grid.zero[..., None]
    return (groups * grid.scale.float()[..., None]).flatten(-2)


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


def _nearest(w: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The integers whose values are nearest to w; the zero where the scale is 0."""
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().add_(zero).clamp_(low, high)
