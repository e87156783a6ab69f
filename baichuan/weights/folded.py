"""Factors f of a layer's input channels, folded into what comes before them: x Wᵀ = (x / f) (W f)ᵀ.

The norms are divided by the factors of q k v and of gate and up; v's rows by those of o, as attention only takes means
of v's channels; up's rows by those of down.  The model computes what it computed before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from baichuan.quant.grid import Grid
from baichuan.quant.ranges import LayerRanges
from baichuan.weights.shard import LINEARS, NORM_BEFORE, ROWS_BEFORE
from baichuan.weights.source import Checkpoint, TensorSource

Factors = Mapping[str, np.ndarray]  # one layer's factors by LINEARS' names: [in_features] float32


def fold_grids(grids: Mapping[str, Grid]) -> tuple[dict[str, Grid], Factors]:
    """A layer's grids by LINEARS' names -> the same of the folded matrices, and the factors that were in them.

    v's and up's integers stay what they are: their scales are divided.
    """
    factors = {name: grid.factor for name, grid in grids.items() if grid.factor is not None}
    folded = {name: replace(grid, factor=None) for name, grid in grids.items()}
    for name, before in ROWS_BEFORE.items():
        if name in factors:
            scale = folded[before].scale.to(torch.float32, copy=True)
            scale[-len(factors[name]) :] /= factors[name][:, None]
            folded[before] = replace(folded[before], scale=scale.to(folded[before].scale.dtype))
    return folded, {name: factor.cpu().numpy() for name, factor in factors.items()}


def folded(checkpoint: Checkpoint, layers: Sequence[Factors]) -> Checkpoint:
    """The checkpoint of the folded model, in float32 where it differs."""
    changed = dict(checkpoint)
    for index, factors in enumerate(layers):
        for name, values in factors.items():
            factor = torch.from_numpy(values)
            modules = [f"model.layers.{index}.{module}.weight" for module in LINEARS[name].modules]
            changed |= {module: _columns_multiplied(changed[module], factor) for module in modules}
            before = NORM_BEFORE[name] if name in NORM_BEFORE else LINEARS[ROWS_BEFORE[name]].modules[-1]
            module = f"model.layers.{index}.{before}.weight"
            changed[module] = _rows_divided(changed[module], factor)
    return changed


def fold_ranges(ranges: LayerRanges, factors: Factors) -> LayerRanges:
    """A layer's ranges -> those of the folded model's layer."""
    linears = dict(ranges.linears)
    for name, factor in ((name, torch.from_numpy(values)) for name, values in factors.items()):
        linears[name] = replace(linears[name], x=linears[name].x / factor)
        if name in ROWS_BEFORE:
            before = linears[ROWS_BEFORE[name]]
            y = before.y.clone()
            y[-len(factor) :] /= factor
            linears[ROWS_BEFORE[name]] = replace(before, y=y)
    return LayerRanges(linears, ranges.k, linears["qkv"].y.chunk(3)[-1].max().item())


def _columns_multiplied(source: TensorSource, factor: Tensor) -> TensorSource:
    return TensorSource(source.shape, torch.float32, lambda start, stop: source.read(start, stop).float() * factor)


def _rows_divided(source: TensorSource, factor: Tensor) -> TensorSource:
    """The last rows of a matrix, or a norm's weight, over the factor."""
    rows = torch.ones(source.shape[0])
    rows[-len(factor) :] = factor
    rows = rows.view(-1, *[1] * (len(source.shape) - 1))
    return TensorSource(
        source.shape, torch.float32, lambda start, stop: source.read(start, stop).float() / rows[start:stop]
    )
