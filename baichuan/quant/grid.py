"""The values that a quantised matrix may have, and the search for those that suit it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

Product = Callable[[Tensor, Tensor], Tensor]  # <a, b> in each group: [n, groups, group_size] -> [n, groups, 1]


@dataclass(frozen=True)
class Grid:
    """The values that a matrix may have: (q - zero) * scale for each group of input channels, over the channel's
    factor where there are factors."""

    scale: Tensor  # [out_features, groups], of either sign with 4 bits
    zero: Tensor | None = None  # [out_features, groups] int8
    factor: Tensor | None = None  # [in_features] float32, positive

    def columns(self, order: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
        """Scales and zeros, in float32, of the columns in this order: each [in_features, out_features]."""
        scale = self.scale.float().t()[order // group_size]
        if self.factor is not None:
            scale = scale / self.factor[order, None]
        return scale, torch.zeros_like(scale) if self.zero is None else self.zero.float().t()[order // group_size]


def dequantised(q: Tensor, grid: Grid) -> Tensor:
    """The values that the integers stand for: [out_features, in_features] float32."""
    groups = q.float().unflatten(-1, (grid.scale.shape[1], -1))
    if grid.zero is not None:
        groups = groups - grid.zero[..., None]
    values = (groups * grid.scale.float()[..., None]).flatten(-2)
    return values if grid.factor is None else values / grid.factor


def search_grid(weight: Tensor, importance: Tensor, form: WeightOnly, clipping: Sequence[float] | None = None) -> Grid:
    """Each group's scale, and zero, that leave the least error of the group's values, d = w - (q - zero) * scale.

    weight: [out_features, in_features]; importance: [in_features], the error is sum(importance * d²), or
    [in_features, in_features], d importance dᵀ within the group; clipping: factors to try instead of all
    -> scales in float32
    """
    group_size = form.group_size or weight.shape[1]
    product = _product(importance, group_size)
    blocks = [
        _best_grid(rows.unflatten(-1, (-1, group_size)), product, form, clipping)
        for rows in weight.split(max(1, SEARCH_ELEMENTS // weight.shape[1]))
    ]
    scale, zero = (torch.cat([block[index] for block in blocks]).squeeze(-1) for index in (0, 1))
    return Grid(scale, zero.to(torch.int8) if form.zero_points else None)


def nearest(weight: Tensor, grid: Grid, form: WeightOnly) -> Tensor:
    """The integers whose values on the grid are nearest to the weight's: [out_features, in_features] float32."""
    everything = torch.arange(weight.shape[1], device=weight.device)
    scale, zero = (columns.t() for columns in grid.columns(everything, weight.shape[1] // grid.scale.shape[1]))
    return _nearest(weight, scale, zero, *RANGES[form.bits])


def _product(importance: Tensor, group_size: int) -> Product:
    """<a, b> of two vectors of a group, such that the error of d is <d, d>: see search_grid's importance."""
    tiny = torch.finfo(torch.float32).tiny  # where nothing is important, the error is still the least
    if importance.dim() == 1:
        each = importance.view(1, -1, group_size) + tiny
        return lambda a, b: (a * b * each).sum(-1, keepdim=True)
    groups = importance.unflatten(0, (-1, group_size)).unflatten(2, (-1, group_size))
    blocks = groups.diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)
    blocks.diagonal(dim1=-2, dim2=-1).add_(tiny)  # blocks: [groups, group_size, group_size]
    return lambda a, b: ((a.transpose(0, 1) @ blocks).transpose(0, 1) * b).sum(-1, keepdim=True)


def _best_grid(groups: Tensor, product: Product, form: WeightOnly, clipping) -> tuple[Tensor, Tensor]:
    """groups: [n, groups, group_size] -> scale, zero: [n, groups, 1]

    For given integers q and zero the best scale is <w, q - zero> / <q - zero, q - zero>: each candidate gives integers,
    these give their best scale.
    """
    low, high = RANGES[form.bits]
    best, best_zero = torch.zeros_like(groups[..., :1]), torch.zeros_like(groups[..., :1])
    error = torch.full_like(best, torch.inf)
    for scale, zero in _candidates(groups, form, clipping):
        steps = _nearest(groups, scale, zero, low, high) - zero
        length = product(steps, steps)
        scale = torch.where(length > 0, product(groups, steps) / length, 0)
        steps = _nearest(groups, scale, zero, low, high) - zero
        left = groups - steps * scale
        left = product(left, left)
        better = left < error
        best, best_zero = torch.where(better, scale, best), torch.where(better, zero, best_zero)
        error = torch.minimum(left, error)
    return best, best_zero


def _candidates(groups: Tensor, form: WeightOnly, clipping: Sequence[float] | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and zeros that the search tries: each [n, groups, 1]."""
    low, high = RANGES[form.bits]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if form.bits == 8:
        largest = -largest.abs()  # the integers are symmetric, and scales stay positive
    none = torch.zeros_like(largest)
    for factor in clipping or FACTORS[form.bits]:
        yield largest / (low * factor), none
    if not form.zero_points:
        return
    bottom, top = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for factor in clipping or ZERO_FACTORS:
        scale, middle = (top - bottom) / ((high - low) * factor), (top + bottom) / 2
        zero = torch.where(scale > 0, ((low + high) / 2 - middle / scale).round_(), 0)
        yield scale, zero.clamp_(-ZERO_LIMIT, ZERO_LIMIT)


def _nearest(w: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    """The integers whose values are nearest to w; the zero where the scale is 0."""
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().add_(zero).clamp_(low, high)
