"""Weight-only integers by GPTQ, one linear after another: its inputs come through those before it as quantised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from baichuan.calibration.layers import DenseOps, LayerPasses, Reached, layer_passes
from baichuan.config import ModelConfig, WeightOnly
from baichuan.parallel.comm import Solo
from baichuan.quant.gptq import gptq
from baichuan.quant.grid import Grid, dequantised
from baichuan.records import DenseWeight, LayerWeights
from baichuan.util.progress import Progress
from baichuan.weights.shard import LINEARS
from baichuan.weights.source import Checkpoint

SCALE_DTYPES = {"int8": torch.float32, "int4": torch.float16}  # as the records have them; INT4's in the folder
Write = Callable[[int, str, Tensor, Grid], None]  # (layer, one of shard.LINEARS, integers, grid) of the whole matrix


def quantise_layers(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    scratch: Path,
    device: str,
    form: WeightOnly,
    write: Write,
) -> None:
    """Hand every linear's integers and their grid to `write`, layer by layer.

    samples: token ids of each text; scratch: a folder for the hidden states, 4 * hidden_size bytes per token;
    device: "cpu" or "cuda"
    """
    with (
        layer_passes(checkpoint, model, samples, scratch, device) as passes,
        Progress("quantising", model.num_layers * (len(LINEARS) + 1) * passes.tokens, "token") as progress,
    ):
        observing = _InputSquares(passes)
        plain = DenseOps(passes.spec, Solo(), passes.longest, device)
        for index, layer in passes.layers():
            for name in LINEARS:
                weight = getattr(layer, name).weight
                with _tensor_cores():
                    hessian = observing.mean_squares(layer, name, progress)
                q, grid = gptq(weight, hessian, passes.tokens, form, SCALE_DTYPES[form.precision])
                write(index, name, q, grid)
                weight.copy_(dequantised(q, grid))
            with _tensor_cores():
                passes.run(plain, layer, progress)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Products on a GPU take factors of 11 significant bits: four times as fast, and H differs by 1 / 2500 or less."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class _InputSquares(DenseOps):
    """Ops that sum x xᵀ over the inputs of one linear, and stop there."""

    def __init__(self, passes: LayerPasses):
        super().__init__(passes.spec, Solo(), passes.longest, passes.device)
        self.passes = passes

    def mean_squares(self, layer: LayerWeights, name: str, progress: Progress) -> Tensor:
        """mean(x xᵀ) over all tokens that go into the layer's linear `name`: [in_features, in_features] float32."""
        self.watched: DenseWeight = getattr(layer, name)
        width = self.watched.shape[1]
        self.total = torch.zeros(width, width, device=self.passes.device)
        self.passes.run(self, layer, progress, keep=False)
        return self.total.div_(self.passes.tokens)

    def linear(self, x, weight):
        if weight is self.watched:
            self.total.addmm_(x.t(), x)
            raise Reached
        return super().linear(x, weight)
