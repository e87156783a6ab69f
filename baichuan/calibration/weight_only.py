"""Weight-only integers by GPTQ or AWQ, one linear after another.

The calibration texts go through the model twice, side by side: as it is, and with the layers and linears quantised so
far.  A linear's integers by GPTQ then also make up for what those before it have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baichuan.calibration.layers import DenseOps, LayerPasses, layer_passes
from baichuan.config import ModelConfig, WeightOnly
from baichuan.parallel.comm import Solo
from baichuan.quant.awq import awq
from baichuan.quant.gptq import gptq
from baichuan.quant.grid import Grid, dequantised
from baichuan.quant.moments import InputMoments
from baichuan.records import DenseWeight
from baichuan.util.progress import Progress
from baichuan.weights.folded import Factors, fold_grids
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint

SCALE_DTYPES = {"int8": torch.float32, "int4": torch.float16}  # as the records have them; INT4's in the folder
SOLVERS = {"gptq": gptq, "awq": awq}
Write = Callable[[int, str, Tensor, Grid], None]  # (layer, one of shard.LINEARS, integers, grid) of the whole matrix


def quantise_layers(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    scratch: Path,
    device: str,
    form: WeightOnly,
    method: str,
    write: Write,
) -> list[Factors]:
    """Hand every linear's integers and their grid to `write`, layer by layer; they are those of the folded model, whose
    factors, of each layer, are returned.

    samples: token ids of each text; scratch: a folder for the hidden states, 8 * hidden_size bytes per token;
    device: "cpu" or "cuda"; method: one of SOLVERS
    """
    factors: list[Factors] = []
    with (
        layer_passes(checkpoint, model, samples, scratch, device) as quantised,
        quantised.apart(scratch / "hidden_of_floats") as floats,
        Progress("quantising", 2 * model.num_layers * (len(LINEARS) + 1) * quantised.tokens, "token") as progress,
    ):
        plain = DenseOps(quantised.spec, Solo(), quantised.longest, device)
        for index, original in quantised.layers():
            layer, found = original, {}
            for name in LINEARS:
                weight = getattr(original, name).weight
                with _tensor_cores():
                    inputs = quantised.inputs(layer, name, progress), floats.inputs(original, name, progress)
                    moments = _moments(zip(*inputs, strict=True), weight.shape[1], quantised)
                found[name] = SOLVERS[method](weight, moments, form, SCALE_DTYPES[form.precision])
                changed: dict[str, Any] = {name: DenseWeight(dequantised(*found[name]))}
                layer = replace(layer, **changed)
            grids, of_layer = fold_grids({name: grid for name, (_, grid) in found.items()})
            for name, (q, _) in found.items():
                write(index, name, q, grids[name])
            factors.append(of_layer)
            with _tensor_cores():
                quantised.run(plain, layer, progress)
                floats.run(plain, original, progress)
    return factors


def _moments(steps: Iterable[tuple[Tensor, Tensor]], in_features: int, passes: LayerPasses) -> InputMoments:
    """steps: a linear's inputs, and those in the model of floats, both [tokens of a step, in_features]"""
    squares, drift = (torch.zeros(in_features, in_features, device=passes.device) for _ in range(2))
    for x, exact in steps:
        squares.addmm_(x.t(), x)
        drift.addmm_((exact - x).t(), x)
    return InputMoments(squares.div_(passes.tokens), drift.div_(passes.tokens), passes.tokens)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products on a GPU take factors of 11 significant bits: four times as fast, and H differs by 1 / 2500 or less."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
