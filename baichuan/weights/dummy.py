"""Dummy weights: a checkpoint of any size that takes no disk, for engines whose speed matters and text does not."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
from torch import Tensor

from baichuan.config import ModelConfig
from baichuan.weights.shard import hub_shapes
from baichuan.weights.source import Checkpoint, TensorSource

POOL_SIZE = 16_777_259  # a prime, so that rows of any width begin at different places of the pool
SCALE_AT_ONCE = 1 << 20  # numbers; all at once would take another 134 MB for a moment


def dummy_checkpoint(config: ModelConfig, seed: int = 0) -> Checkpoint:
    """Every tensor of the model, in config.dtype.

    Element i of a tensor is number (offset + i) mod POOL_SIZE of one pool of normally distributed numbers, scaled
    for the tensor; offset is a hash of its name.  Activations and logits stay finite and of order 1.
    """
    pool = _Pool(seed, getattr(torch, config.dtype))
    return {name: _source(pool, config, name, shape) for name, shape in hub_shapes(config).items()}


class _Pool:
    """Normally distributed numbers, kept once per mean and deviation that is asked for."""

    def __init__(self, seed: int, dtype: torch.dtype):
        self.seed, self.dtype = seed, dtype
        self.scaled: dict[tuple[float, float], Tensor] = {}

    @cached_property
    def numbers(self) -> Tensor:
        return torch.randn(POOL_SIZE, generator=torch.Generator().manual_seed(self.seed))

    def read(self, start: int, count: int, mean: float, deviation: float) -> Tensor:
        """`count` numbers from `start` on, wrapping around the pool; a view where they do not wrap."""
        if (mean, deviation) not in self.scaled:
            self.scaled[mean, deviation] = self._scale(mean, deviation)
        numbers, pieces = self.scaled[mean, deviation], []
        while count > 0:
            start %= POOL_SIZE
            pieces.append(numbers[start : start + count])
            start, count = start + len(pieces[-1]), count - len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [numbers[:0]])

    def _scale(self, mean: float, deviation: float) -> Tensor:
        scaled = torch.empty_like(self.numbers, dtype=self.dtype)
        for target, numbers in zip(scaled.split(SCALE_AT_ONCE), self.numbers.split(SCALE_AT_ONCE), strict=True):
            target.copy_(numbers * deviation + mean)
        return scaled


def _source(pool: _Pool, config: ModelConfig, name: str, shape: tuple[int, ...]) -> TensorSource:
    mean, deviation = _distribution(config, name, shape)
    offset = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    width = torch.Size(shape[1:]).numel()

    def read(start: int, stop: int) -> Tensor:
        numbers = pool.read(offset + start * width, (stop - start) * width, mean, deviation)
        return numbers.view(stop - start, *shape[1:])

    return TensorSource(shape, pool.dtype, read)


def _distribution(config: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's elements."""
    if len(shape) == 1:
        return 1.0, 0.1  # a norm's weight
    if name == "model.embed_tokens.weight":
        return 0.0, 1.0
    deviation = shape[1] ** -0.5  # keeps the variance from input to output
    if name.endswith((".o_proj.weight", ".down_proj.weight")):
        deviation *= (2 * config.num_layers) ** -0.5  # so that the sum over all layers keeps it too
    return 0.0, deviation
