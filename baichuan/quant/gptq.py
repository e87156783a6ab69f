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

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.quant.scaled import require_finite

RANGES = {4: (-8, 7), 8: (-127, 127)}  # the integers, by their bits
DAMPING = 0.01  # times the mean of H's diagonal, added to the diagonal
BLOCK = 128  # columns whose roundings are passed on to later blocks together
SEARCH_ELEMENTS = 1 << 22  # numbers of a matrix whose scales are searched at once

# The search tries scales that map a group's value of largest magnitude to one of these times the lowest integer; a
# factor above 1 clips it.
FACTORS = {4: [0.85 + 0.05 * step for step in range(16)], 8: [1.0 + 0.04 * step for step in range(6)]}


def gptq(
    weight: Tensor, hessian: Tensor, group_size: int, bits: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Integers q and scales of `weight`, which is about q * scale.

    weight: [out_features, in_features] float32; hessian: [in_features, in_features] float32, mean(x xᵀ) of its inputs;
    group_size: input channels that share a scale, 0 = all; bits: 4 or 8
    -> q [out_features, in_features] int8, scale [out_features, groups] in scale_dtype, of either sign with 4 bits
    Raises CheckpointError for a NaN or an infinity.
    """
    require_finite(weight.abs().amax(-1))
    group_size = group_size or weight.shape[1]
    seen = hessian.diagonal()
    scale = search_scales(weight, seen, group_size, bits).to(scale_dtype)
    order = torch.argsort(seen, descending=True, stable=True)
    values = scale.float()[:, order // group_size]
    q = _round_columns(weight[:, order], values, inverse_factor(hessian, order), *RANGES[bits])
    return q[:, torch.argsort(order)].to(torch.int8), scale


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


def search_scales(weight: Tensor, importance: Tensor, group_size: int, bits: int) -> Tensor:
    """The scale of each group that leaves the least sum of importance * (w - q * scale)².

    weight: [out_features, in_features]; importance: [in_features] -> [out_features, groups] float32
    """
    importance = importance.view(1, -1, group_size) + torch.finfo(torch.float32).tiny
    found = [_best_scales(rows.unflatten(-1, (-1, group_size)), importance, bits) for rows in _row_blocks(weight)]
    return torch.cat(found)


def _best_scales(groups: Tensor, importance: Tensor, bits: int) -> Tensor:
    """groups: [n, groups, group_size]; importance: [1, groups, group_size] -> [n, groups]

    For given integers q the best scale is <w, q> / <q, q>: each candidate gives integers, these give their best scale.
    """
    low, high = RANGES[bits]
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if bits == 8:
        largest = largest.abs() * -1  # the range is symmetric, and scales stay positive
    unit = torch.where(largest == 0, 0, low / largest)
    best, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    weighted = groups * importance
    for factor in FACTORS[bits]:
        q = (groups * (unit * factor)).round_().clamp_(low, high)
        q_q = (q.square() * importance).sum(-1, keepdim=True)
        scale = torch.where(q_q > 0, (weighted * q).sum(-1, keepdim=True) / q_q, 0)
        q = _nearest(groups, scale, low, high)
        left = ((groups - q * scale).square_() * importance).sum(-1, keepdim=True)
        best, error = torch.where(left < error, scale, best), torch.minimum(left, error)
    return best.squeeze(-1)


def _round_columns(weight: Tensor, scale: Tensor, factor: Tensor, low: int, high: int) -> Tensor:
    """weight, scale: [out_features, in_features], columns in their order; factor: U -> integers as floats"""
    w, scale = weight.t().contiguous(), scale.t().contiguous()  # a column is contiguous
    q = torch.empty_like(w)
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        errors = torch.empty_like(w[start:stop])
        for column in range(start, stop):
            q[column] = _nearest(w[column], scale[column], low, high)
            error = (w[column] - q[column] * scale[column]) / factor[column, column]
            w[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
            errors[column - start] = error
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return q.t()


def _nearest(w: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(low, high)


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    yield from weight.split(max(1, SEARCH_ELEMENTS // weight.shape[1]))
