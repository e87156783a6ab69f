"""Activation ranges from a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from baichuan.calibration.layers import LayerPasses, layer_passes
from baichuan.calibration.ops import DenseOps
from baichuan.config import ModelConfig
from baichuan.quant.ranges import LayerRanges, LinearRange
from baichuan.records import AttentionSpec, DenseWeight, LayerCache, LayerWeights
from baichuan.util.progress import Progress
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint


def calibrate(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    scratch: Path,
    device: str | None = None,
) -> list[LayerRanges]:
    """The ranges of every layer over the samples, each a sequence of token ids.

    scratch: a folder for the hidden states, 4 * hidden_size bytes per token.  device: "cpu" or "cuda"; None = the GPU
    where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    ranges = []
    with (
        layer_passes(checkpoint, model, samples, scratch, device) as passes,
        Progress("calibrating", model.num_layers * passes.tokens, "token") as progress,
    ):
        observer = Observer(passes, progress)
        for _, layer in passes.layers():
            ranges.append(observer.run(layer))
    return ranges


class Observer:
    """Passes that note the ranges of one layer after another."""

    def __init__(self, passes: LayerPasses, progress: Progress):
        self.passes, self.progress, self._ops = passes, progress, passes.ops(_ObservingOps)

    def run(self, layer: LayerWeights) -> LayerRanges:
        """As LayerPasses.run -> the layer's ranges over all samples."""
        observed = self._ops.observed = _Observed(layer)
        self.passes.run(self._ops, layer, self.progress)
        return observed.ranges()


class _ObservingOps(DenseOps):
    """Ops that note the magnitudes that they see."""

    observed: _Observed  # running maxima of the current layer

    def linear(self, x, weight):
        y = super().linear(x, weight)
        self.observed.see_linear(weight, x, y)
        return y

    def attention(self, qkv, cache, spec, step):
        y = super().attention(qkv, cache, spec, step)
        self.observed.see_cache(cache, spec)
        return y


class _Observed:
    """Running maxima of one layer."""

    def __init__(self, layer: LayerWeights):
        self.names = {getattr(layer, name): name for name in LINEARS}
        self.x: dict[str, Tensor] = {}
        self.y: dict[str, Tensor] = {}
        self.k = self.v = torch.zeros((), device=layer.input_norm.device)

    def see_linear(self, weight: DenseWeight, x: Tensor, y: Tensor) -> None:
        name = self.names[weight]
        for maxima, values in ((self.x, x), (self.y, y)):
            absmax = values.abs().amax(0)
            maxima[name] = torch.maximum(maxima.get(name, absmax), absmax)

    def see_cache(self, cache: LayerCache, spec: AttentionSpec) -> None:
        """With RoPE a pair of dimensions is rotated by position, so the pair's length bounds both at every position."""
        k = cache.k.unflatten(-1, (2, -1)).norm(dim=-2) if spec.rotary else cache.k.abs()
        self.k, self.v = torch.maximum(self.k, k.amax()), torch.maximum(self.v, cache.v.abs().amax())

    def ranges(self) -> LayerRanges:
        linears = {name: LinearRange(self.x[name].cpu(), self.y[name].cpu()) for name in LINEARS}
        return LayerRanges(linears, self.k.item(), self.v.item())
