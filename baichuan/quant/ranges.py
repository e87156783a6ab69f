"""What calibration saw of one layer: the largest magnitudes of its linears' inputs and outputs, and of k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from baichuan.quant.smoothquant import Mode


@dataclass(frozen=True)
class LinearRange:
    """One linear's ranges over all calibration tokens."""

    x: Tensor  # [in_features] float32, max|input| of each channel
    y: Tensor  # [out_features] float32, max|output| of each channel
    alphas: Mapping[Mode, float] | None = None  # SmoothQuant's strength in each mode, where they were to be chosen


@dataclass(frozen=True)
class LayerRanges:
    linears: Mapping[str, LinearRange]  # by shard.LINEARS' names; qkv and gate_up as one matrix of merged rows
    k: float  # max|k| as the cache stores it; with RoPE, a bound for every position
    v: float  # max|v|


def joined(one: LayerRanges, other: LayerRanges) -> LayerRanges:
    """The ranges over the tokens of both."""
    linears = {
        name: LinearRange(torch.maximum(seen.x, other.linears[name].x), torch.maximum(seen.y, other.linears[name].y))
        for name, seen in one.linears.items()
    }
    return LayerRanges(linears, max(one.k, other.k), max(one.v, other.v))
