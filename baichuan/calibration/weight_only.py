"""Weight-only integers by GPTQ or AWQ, one linear after another, and the activations' ranges.

The calibration texts go through the model twice, side by side: as it is, which shows the ranges, and with the layers
and linears quantised so far.  A linear's integers by GPTQ then also make up for what those before it have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baichuan.calibration.calibrate import Observer
from baichuan.calibration.layers import LayerPasses, layer_passes
from baichuan.calibration.ops import DenseOps
from baichuan.config import ModelConfig, WeightOnly
from baichuan.quant.awq import awq
from baichuan.quant.gptq import gptq
from baichuan.quant.grid import Grid, dequantised
from baichuan.quant.moments import InputMoments
from baichuan.quant.ranges import LayerRanges
from baichuan.records import DenseWeight
from baichuan.util.progress import Progress
from baichuan.util.tensor_cores import tensor_cores
from baichuan.weights.folded import Factors, fold_grids, fold_ranges
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint

SCALE_DTYPES = {"int8": torch.float32, "int4": torch.float16}  # as the records have them; INT4's in the folder
Write = Callable[[int, str, Tensor, Grid], None]  # (layer, one of shard.LINEARS, integers, grid) of the whole matrix


@dataclass(frozen=True)
class _Method:
    """A way to find a matrix's integers."""

    solve: Callable[[Tensor, InputMoments, WeightOnly, torch.dtype], tuple[Tensor, Grid]]
    drifts: bool  # it asks for InputMoments.drift


_METHODS = {"gptq": _Method(gptq, drifts=True), "awq": _Method(awq, drifts=False)}


def quantise_layers(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    scratch: Path,
    device: str,
    form: WeightOnly,
    method: str,
    write: Write,
) -> tuple[list[Factors], list[LayerRanges]]:
    """Hand every linear's integers and their grid to `write`, layer by layer; they are those of the folded model, whose
    factors and ranges, of each layer, are returned.

    samples: token ids of each text; scratch: a folder for the hidden states, 8 * hidden_size bytes per token;
    device: "cpu" or "cuda"; method: one of request.METHODS
    """
    how, factors, ranges = _METHODS[method], [], []
    passes = (len(LINEARS) + 1) * (1 + how.drifts) + (not how.drifts)
    with (
        layer_passes(checkpoint, model, samples, scratch, device) as quantised,
        quantised.apart(scratch / "hidden_of_floats") as floats,
        Progress("quantising", model.num_layers * passes * quantised.tokens, "token") as progress,
    ):
        observer, plain = Observer(floats, progress), quantised.ops(DenseOps)
        for index, original in quantised.layers():
            layer, found = original, {}
            for name in LINEARS:
                weight = getattr(original, name).weight
                with tensor_cores():
                    inputs = quantised.inputs(layer, name, progress)
                    exact = floats.inputs(original, name, progress) if how.drifts else None
                    moments = _moments(inputs, exact, weight.shape[1], quantised)
                found[name] = how.solve(weight, moments, form, SCALE_DTYPES[form.precision])
                changed: dict[str, Any] = {name: DenseWeight(dequantised(*found[name]))}
                layer = replace(layer, **changed)
            grids, of_layer = fold_grids({name: grid for name, (_, grid) in found.items()})
            for name, (q, _) in found.items():
                write(index, name, q, grids[name])
            factors.append(of_layer)
            with tensor_cores():
                quantised.run(plain, layer, progress)
            ranges.append(fold_ranges(observer.run(original), of_layer))
    return factors, ranges


def _moments(
    inputs: Iterable[Tensor], exact: Iterable[Tensor] | None, in_features: int, passes: LayerPasses
) -> InputMoments:
    """inputs: a linear's, step by step; exact: those in the model of floats; both [tokens of a step, in_features]"""
    squares = torch.zeros(in_features, in_features, device=passes.device)
    if exact is None:
        for x in inputs:
            squares.addmm_(x.t(), x)
        return InputMoments(squares.div_(passes.tokens), None, passes.tokens)
    drift = torch.zeros_like(squares)
    for x, e in zip(inputs, exact, strict=True):
        squares.addmm_(x.t(), x)
        drift.addmm_((e - x).t(), x)
    return InputMoments(squares.div_(passes.tokens), drift.div_(passes.tokens), passes.tokens)
