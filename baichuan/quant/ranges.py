"""What calibration saw of one layer: the largest magnitudes of its linears' inputs and outputs, and of k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearRange:
    """One linear's ranges over all calibration tokens."""

    x: Tensor  # [in_features] float32, max|input| of each channel
    y: Tensor  # [out_features] float32, max|output| of each channel
    alpha: float | None = None  # SmoothQuant's strength, where it was to be chosen


@dataclass(frozen=True)
class LayerRanges:
    linears: Mapping[str, LinearRange]  # by shard.LINEARS' names; qkv and gate_up as one matrix of merged rows
    k: float  # max|k| as the cache stores it; with RoPE, a bound for every position
    v: float  # max|v|
