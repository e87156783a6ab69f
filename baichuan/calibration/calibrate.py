"""Activation ranges from a data set, layer by layer: one layer's weights are in memory at a time.

All tokens pass through a layer before the next one is loaded; between layers the hidden states wait in a file.
Everything is computed in float32 and in a fixed order, so that the same texts give the same ranges.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.config import ModelConfig
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.model.decoder import attention_spec, decoder_layer
from baichuan.parallel.comm import Solo
from baichuan.quant.ranges import LayerRanges, LinearRange
from baichuan.records import AttentionSpec, DenseWeight, LayerCache, LayerWeights, Step
from baichuan.util.progress import Progress
from baichuan.weights.shard import LINEARS, NORMS
from baichuan.weights.source import Checkpoint, TensorSource

logger = logging.getLogger(__name__)

TOKENS_PER_STEP = {"cpu": 1024, "cuda": 8192}  # bounds the activations' memory
READ_BYTES = 64 << 20  # how much of a weight is read at a time, in float32


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
    longest, tokens = max(map(len, samples)), sum(map(len, samples))
    logger.info("calibrating on %d texts, %d tokens, with the %s", len(samples), tokens, device.upper())
    steps = list(_steps(samples, TOKENS_PER_STEP[device], device))
    ranges = []
    with (
        torch.inference_mode(),
        _HiddenStates(scratch / "hidden", tokens, model.hidden_size) as hidden,
        Progress("calibrating", model.num_layers * tokens, "token") as progress,
    ):
        _embed(checkpoint["model.embed_tokens.weight"], torch.tensor(list(chain(*samples))), hidden)
        spec = attention_spec(model, 0, 1)
        ops = _ObservingOps(spec, longest, device)
        buffers = _Buffers(checkpoint, device)
        for index in range(model.num_layers):
            layer = buffers.load(index)
            observed = ops.observe(layer)
            for first, step in steps:
                _run_layer(ops, layer, model, spec, step, hidden, first)
                progress.advance(len(step.tokens))
            ranges.append(observed.ranges())
    return ranges


def _run_layer(ops, layer: LayerWeights, model: ModelConfig, spec: AttentionSpec, step: Step, hidden, first) -> None:
    """Replace hidden's rows from `first` on, one per token of the step, by the layer's output."""
    rows = slice(first, first + len(step.tokens))
    shape = (step.batch_size, spec.num_heads, step.max_context_length, spec.head_dim)
    cache = LayerCache(*(torch.zeros(shape, device=step.tokens.device) for _ in range(2)))
    x = hidden[rows].to(step.tokens.device)
    x, residual = decoder_layer(ops, x, None, layer, cache, spec, step, model.rms_norm_eps)
    ops.observed.see_cache(cache, spec)
    hidden[rows] = (x + residual).to("cpu")


def _steps(samples: Sequence[Sequence[int]], limit: int, device: str) -> Iterator[tuple[int, Step]]:
    """The samples in steps of up to `limit` tokens, at least one sample each; with the number of tokens before each."""
    batch: list[Sequence[int]] = []
    first, size = 0, 0
    for sample in samples:
        if batch and size + len(sample) > limit:
            yield first, Step.of(batch, device=device)
            first, batch, size = first + size, [], 0
        batch.append(sample)
        size += len(sample)
    yield first, Step.of(batch, device=device)


def _embed(source: TensorSource, tokens: Tensor, hidden: Tensor) -> None:
    """hidden[i] = embedding[tokens[i]], reading the embedding once, block by block."""
    for start, stop in source.blocks(READ_BYTES):
        wanted = torch.nonzero((tokens >= start) & (tokens < stop), as_tuple=True)[0]
        if len(wanted):
            rows = source.read(start, stop)
            for some in wanted.split(stop - start):
                hidden[some] = rows[tokens[some] - start].float()


class _ObservingOps(ReferenceOps):
    """The reference's ops on dense weights, on either device; linear also notes the magnitudes that it sees."""

    def __init__(self, spec: AttentionSpec, capacity: int, device: str):
        super().__init__(spec, Solo(), capacity, device)

    def observe(self, layer: LayerWeights) -> _Observed:
        """Observe this layer's linears from now on."""
        self.observed = _Observed(layer)
        return self.observed

    def linear(self, x, weight):
        y = F.linear(x, weight.weight)  # on either device, in float32
        self.observed.see_linear(weight, x, y)
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


class _Buffers:
    """One layer's weights in float32 on the device, in buffers that all layers share."""

    def __init__(self, checkpoint: Checkpoint, device: str):
        self.checkpoint, self.device = checkpoint, device
        self.memory: dict[str, Tensor] = {}

    def load(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        fields: dict[str, Any] = {name: self._read(name, [f"{prefix}.{norm}.weight"]) for name, norm in NORMS.items()}
        fields |= {
            name: DenseWeight(self._read(name, [f"{prefix}.{module}.weight" for module in linear.modules]))
            for name, linear in LINEARS.items()
        }
        return LayerWeights(**fields)

    def _read(self, name: str, hub_names: list[str]) -> Tensor:
        sources = [self.checkpoint[hub_name] for hub_name in hub_names]
        if name not in self.memory:
            shape = sum(source.shape[0] for source in sources), *sources[0].shape[1:]
            self.memory[name] = torch.empty(shape, device=self.device)
        buffer, first = self.memory[name], 0
        for source in sources:
            for start, stop in source.blocks(READ_BYTES):
                buffer[first + start : first + stop] = source.read(start, stop).to(self.device)
            first += source.shape[0]
        return buffer


@dataclass
class _HiddenStates:
    """[tokens, hidden_size] float32 in a file that is deleted afterwards, so that memory stays free."""

    path: Path
    tokens: int
    hidden_size: int

    def __enter__(self) -> Tensor:
        size = self.tokens * self.hidden_size
        with open(self.path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)  # a full disk is an error now, not a crash later
        mapped = torch.from_file(str(self.path), shared=True, size=size, dtype=torch.float32, device="cpu")
        return mapped.view(self.tokens, self.hidden_size)

    def __exit__(self, *_) -> None:
        self.path.unlink(missing_ok=True)
