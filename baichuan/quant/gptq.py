"""Integers that change a matrix's products with known inputs least.

For inputs x with H = mean(x xᵀ), a row w and its integers' values v, the error is (w - v) H (w - v)ᵀ.  Two methods
one after another make it small.

Where x comes through linears that are quantised themselves, it is not the input e that the model of floats has here.
The row whose products with x are closest to w e is w + w D H⁻¹, D = mean((e - x) xᵀ); the middle between both takes
the place of w (https://arxiv.org/abs/2504.02692).

GPTQ (https://arxiv.org/abs/2210.17323): columns are rounded one after another, and the columns still to come make up
for each rounding as well as they can.  With H⁻¹ = Uᵀ U, U upper triangular, that is

    e = w[j] - v[j],    w[j + 1:] -= e * U[j, j + 1:] / U[j, j]

Columns come in the order of their inputs' mean squares, largest first, while groups of channels stay as they are, with
scales found beforehand: kernels and files see no difference.

Coordinate descent: with all other columns as they are, column j had best be v[j] + ((w - v) H)[j] / H[j, j], and is
rounded from there; a group's scale had best change by <q, (w - v) H> / <q, q H> over its channels.  All groups and then
all columns have their turns, SWEEPS times.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baichuan.config import WeightOnly
from baichuan.quant.grid import RANGES, Grid, dequantised, search_grid
from baichuan.quant.moments import InputMoments
from baichuan.quant.scaled import require_finite
from baichuan.util.cuda_graph import replayed

DAMPING = 0.1  # times the mean of H's diagonal, added to the diagonal: for texts unlike those of the calibration
COMPENSATED = 0.5  # share of the inputs' change that is made up for; all of it would fit other texts worse
SWEEPS = 2  # four leave 1 % less error, eight 1.3 %
BLOCK = 128  # columns whose roundings are passed on to later blocks together


def gptq(weight: Tensor, inputs: InputMoments, form: WeightOnly, scale_dtype: torch.dtype) -> tuple[Tensor, Grid]:
    """Integers q of `weight`, which is about (q - zero) * scale, and their grid.

    weight: [out_features, in_features] float32 -> q [out_features, in_features] int8, grid with scales in scale_dtype
    Raises CheckpointError for a NaN or an infinity.
    """
    require_finite(weight.abs().amax(-1))
    hessian = shrunk(inputs.squares, inputs.num_tokens)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    weight = compensating(weight, inputs, inverse)
    grid = search_grid(weight, inverse.diagonal().reciprocal().float(), form)
    grid = replace(grid, scale=grid.scale.to(scale_dtype))
    q = rounded(weight, hessian, inverse, grid, form)
    for _ in range(SWEEPS):
        grid = rescaled(weight, hessian, q, grid)
        q = descended(weight, hessian, q, grid, form)
    return q.to(torch.int8), grid


def shrunk(hessian: Tensor, num_tokens: int) -> Tensor:
    """The H of other texts, as far as these can tell: [in_features, in_features] float32.

    The more inputs there are for each token, the less is known of how two of them go together: the products of
    different inputs, off the diagonal, are made smaller.  The damping keeps H invertible where an input is always zero.
    """
    mean = hessian.diagonal().mean()
    in_features = len(hessian)
    result = hessian * _kept(num_tokens, in_features)
    result.diagonal().copy_(hessian.diagonal() + (DAMPING * mean if mean > 0 else 1))
    return result


def _kept(num_tokens: int, in_features: int) -> float:
    """By what the means of products of two different inputs are multiplied, to hold for other texts."""
    return num_tokens / (num_tokens + in_features)


def compensating(weight: Tensor, inputs: InputMoments, inverse: Tensor) -> Tensor:
    """The float matrix, shaped like weight, that makes up for half of its inputs' change from e to x.

    inverse: that of shrunk(inputs.squares), in float64
    """
    assert inputs.drift is not None
    drift = inputs.drift * COMPENSATED * _kept(inputs.num_tokens, len(inverse))
    return weight + ((weight @ drift).double() @ inverse).float()


def rounded(weight: Tensor, hessian: Tensor, inverse: Tensor, grid: Grid, form: WeightOnly) -> Tensor:
    """GPTQ's integers on the grid, as floats [out_features, in_features].  inverse: that of hessian, in float64"""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = torch.linalg.cholesky(inverse[order][:, order], upper=True)
    coupling = (factor / -factor.diagonal()[:, None]).float()
    columns = weight.t()[order].contiguous()
    scale, zero = grid.columns(order, weight.shape[1] // grid.scale.shape[1])
    return _sweep(columns, None, coupling, scale, zero, form)[torch.argsort(order)].t()


def rescaled(weight: Tensor, hessian: Tensor, q: Tensor, grid: Grid) -> Grid:
    """The grid with each group's best scale for these integers, one group after another."""
    scales, groups = grid.scale.float(), grid.scale.shape[1]
    slope = hessian @ (weight - dequantised(q, grid)).t()  # [in_features, out_features]
    found = []
    for group, channels in enumerate(torch.arange(len(hessian), device=q.device).chunk(groups)):
        first, last = int(channels[0]), int(channels[-1]) + 1
        steps = q[:, first:last].t()  # [group_size, out_features]
        if grid.zero is not None:
            steps = steps - grid.zero[:, group]
        curvature = (steps * (hessian[first:last, first:last] @ steps)).sum(0)
        change = torch.where(curvature > 0, (steps * slope[first:last]).sum(0) / curvature, 0)
        found.append((scales[:, group] + change).to(grid.scale.dtype))
        slope -= hessian[:, first:last] @ (steps * (found[-1].float() - scales[:, group]))
    return replace(grid, scale=torch.stack(found, 1))


def descended(weight: Tensor, hessian: Tensor, q: Tensor, grid: Grid, form: WeightOnly) -> Tensor:
    """Integers, as floats, each the best for those before and after it as they are."""
    values = dequantised(q, grid)
    best = (values + ((weight - values) @ hessian) / hessian.diagonal()).t().contiguous()
    coupling = hessian / hessian.diagonal()
    everything = torch.arange(len(hessian), device=q.device)
    scale, zero = grid.columns(everything, weight.shape[1] // grid.scale.shape[1])
    return _sweep(best, values.t().contiguous(), coupling, scale, zero, form).t()


def _sweep(best: Tensor, before: Tensor | None, coupling: Tensor, scale: Tensor, zero: Tensor, form: WeightOnly):
    """Round one column after another; what is best for those after it changes by its error times the coupling.

    best: [in_features, out_features], overwritten; before: the values that errors are measured from, None = best
    itself; coupling: [in_features, in_features]; scale, zero: as best -> integers as floats, as best
    """
    q, low_high = torch.empty_like(best), RANGES[form.bits]
    steps = torch.where(scale == 0, 0, 1 / scale)
    blocks = [slice(start, start + BLOCK) for start in range(0, len(best), BLOCK)]

    def inputs(block: slice) -> list[Tensor]:
        columns = [best[block], steps[block], scale[block], zero[block], coupling[block, block]]
        return columns + ([] if before is None else [before[block]])

    def settle(best, steps, scale, zero, coupling, before=None) -> tuple[Tensor, Tensor]:
        return _settle(best, steps, scale, zero, coupling, before, *low_high)

    whole = replayed(settle, inputs(blocks[0])) if best.is_cuda and len(best) > 2 * BLOCK else settle
    for block in blocks:
        each = whole if block.stop <= len(best) else settle
        q[block], errors = each(*inputs(block))
        best[block.stop :].addmm_(coupling[block, block.stop :].t(), errors)
    return q


def _settle(best, steps, scale, zero, coupling, before, low: int, high: int) -> tuple[Tensor, Tensor]:
    """The columns of one block, as in _sweep -> their integers, and their errors"""
    q, errors = torch.empty_like(best), torch.empty_like(best)
    before = best if before is None else before
    for column in range(len(best)):
        q[column] = (best[column] * steps[column]).round_().add_(zero[column]).clamp_(low, high)
        torch.addcmul(before[column], q[column] - zero[column], scale[column], value=-1, out=errors[column])
        best[column + 1 :].addr_(coupling[column, column + 1 :], errors[column])
    return q, errors
