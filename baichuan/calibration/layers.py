"""All calibration tokens through one layer after another: one layer's weights are in memory at a time.

Between layers the hidden states wait in the memory of the GPU or in a file.  Everything is computed in float32 and in a
fixed order, so that the same texts give the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from baichuan.calibration.ops import OpsUpTo, Reached
from baichuan.config import ModelConfig
from baichuan.executors.cpu.reference import ReferenceOps
from baichuan.model.decoder import attention_spec, decoder_layer
from baichuan.parallel.comm import Solo
from baichuan.records import AttentionSpec, DenseWeight, LayerCache, LayerWeights, Step
from baichuan.util.progress import Progress
from baichuan.weights.shard import LINEARS, NORMS
from baichuan.weights.source import Checkpoint, TensorSource

AnyOps = TypeVar("AnyOps", bound=ReferenceOps)

TOKENS_PER_STEP = {"cpu": 1024, "cuda": 8192}  # bounds the activations' memory
GPU_SHARE = 0.25  # largest share of the free GPU memory that hidden states may take
READ_BYTES = 64 << 20  # how much of a weight is read at a time, in float32


@dataclass(frozen=True)
class LayerPasses:
    """The model's layers, and passes of all samples through one of them."""

    model: ModelConfig
    spec: AttentionSpec
    device: str  # "cpu" or "cuda"
    longest: int  # tokens of the longest sample
    tokens: int  # tokens of all samples
    hidden: Tensor  # [tokens, hidden_size] float32, what goes into the layer that is next
    steps: Sequence[tuple[int, Step]]  # the samples, with the number of tokens before each step
    buffers: _Buffers

    def ops(self, kind: type[AnyOps]) -> AnyOps:
        """Ops that these passes can go through."""
        return kind(self.spec, Solo(), self.longest, self.device)

    def layers(self) -> Iterator[tuple[int, LayerWeights]]:
        """Each layer's number and weights, which are valid until the next one."""
        for index in range(self.model.num_layers):
            yield index, self.buffers.load(index)

    def run(self, ops: ReferenceOps, layer: LayerWeights, progress: Progress) -> None:
        """All samples through the layer, whose output replaces `hidden`.  Progress is in tokens."""
        for first, step in self.steps:
            output = self._step(ops, layer, first, step, progress)
            self.hidden[first : first + len(output)] = output.to(self.hidden.device)

    def output(self, ops: ReferenceOps, layer: LayerWeights, progress: Progress) -> Tensor:
        """What the layer makes of `hidden`, which stays: [tokens, hidden_size] on the device"""
        return torch.cat([self._step(ops, layer, first, step, progress) for first, step in self.steps])

    def inputs(self, layer: LayerWeights, name: str, progress: Progress) -> Iterator[Tensor]:
        """What goes into the layer's linear `name`, step by step: [tokens of the step, in_features] float32."""
        ops = self.ops(OpsUpTo)
        ops.last = getattr(layer, name)
        for first, step in self.steps:
            try:
                self._step(ops, layer, first, step, progress)
            except Reached as reached:
                yield reached.x

    def _step(self, ops: ReferenceOps, layer: LayerWeights, first: int, step: Step, progress: Progress) -> Tensor:
        """The step's tokens, whose first one is `first` among all, after the layer: [tokens, hidden_size]."""
        progress.advance(len(step.tokens))
        cache = LayerCache.whole_rows(step.batch_size, step.max_context_length, self.spec, torch.float32, self.device)
        x = self.hidden[first : first + len(step.tokens)].to(self.device)
        x, residual = decoder_layer(ops, x, None, layer, cache, self.spec, step, self.model.rms_norm_eps)
        return x + residual

    @contextmanager
    def apart(self, path: Path) -> Iterator[LayerPasses]:
        """The same passes, whose hidden states begin as these are now and go a way of their own.

        path: a file for them, as layer_passes() has one
        """
        with _hidden_states(path, self.tokens, self.model.hidden_size, self.device) as hidden:
            yield replace(self, hidden=hidden.copy_(self.hidden))

    def of_others(
        self, samples: Sequence[Sequence[int]], path: Path, tokens_per_step: int | None = None
    ) -> AbstractContextManager[LayerPasses]:
        """Passes of other samples through the same layers, whose weights are loaded once for all.

        path: as for apart(); tokens_per_step: None = as suits the device
        """
        return _passes(self.buffers, self.model, samples, path, tokens_per_step)


@contextmanager
def layer_passes(
    checkpoint: Checkpoint,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    scratch: Path,
    device: str,
) -> Iterator[LayerPasses]:
    """Passes of the samples, each a sequence of token ids, through the checkpoint's layers.

    scratch: a folder for the hidden states, 4 * hidden_size bytes per token
    """
    with torch.inference_mode(), _passes(_Buffers(checkpoint, device), model, samples, scratch / "hidden") as passes:
        yield passes


@contextmanager
def _passes(
    buffers: _Buffers,
    model: ModelConfig,
    samples: Sequence[Sequence[int]],
    path: Path,
    tokens_per_step: int | None = None,
) -> Iterator[LayerPasses]:
    longest, tokens, device = max(map(len, samples)), sum(map(len, samples)), buffers.device
    with _hidden_states(path, tokens, model.hidden_size, device) as hidden:
        _embed(buffers.checkpoint["model.embed_tokens.weight"], torch.tensor(list(chain(*samples))), hidden)
        steps = list(_steps(samples, tokens_per_step or TOKENS_PER_STEP[device], device))
        yield LayerPasses(model, attention_spec(model, 0, 1), device, longest, tokens, hidden, steps, buffers)


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
                hidden[some] = rows[tokens[some] - start].float().to(hidden.device)


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


@contextmanager
def _hidden_states(path: Path, tokens: int, hidden_size: int, device: str) -> Iterator[Tensor]:
    """[tokens, hidden_size] float32: on the GPU where that leaves most of its memory free, else in a file that is
    deleted afterwards, so that host memory stays free."""
    size = tokens * hidden_size
    if device == "cuda" and 4 * size < torch.cuda.mem_get_info()[0] * GPU_SHARE:
        yield torch.empty(tokens, hidden_size, device=device)
        return
    try:
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)  # a full disk is an error now, not a crash later
        mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.float32, device="cpu")
        yield mapped.view(tokens, hidden_size)
    finally:
        path.unlink(missing_ok=True)
