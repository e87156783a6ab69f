"""A small model whose checkpoint is made on the spot, for the binary folder's tests."""

from __future__ import annotations

import numpy as np
import torch

from baichuan.config import ModelConfig
from baichuan.weights.shard import hub_shapes
from baichuan.weights.source import Checkpoint, known

SIZES = dict(hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, vocab_size=50)
ROTARY = ModelConfig("v2_7b", dtype="float32", **SIZES)
ALIBI = ModelConfig("v1_13b", dtype="float32", **SIZES)


def make_tensors(model: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights by the hub's names in float32: rows of different size, columns with outliers, norms around 1."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in hub_shapes(model).items():
        if len(shape) == 1:
            tensors[name] = rng.uniform(0.5, 1.5, shape)
        else:
            rows, columns = rng.uniform(0.5, 2, (shape[0], 1)), rng.gamma(1, 1, shape[1])
            tensors[name] = rng.standard_normal(shape) * rows * columns / np.sqrt(shape[1])
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


def make_checkpoint(model: ModelConfig, seed: int = 0) -> Checkpoint:
    """The same as a checkpoint; a function of its arguments alone, so that another process can call it."""
    return {name: known(torch.from_numpy(tensor)) for name, tensor in make_tensors(model, seed).items()}


def make_samples(model: ModelConfig, count: int = 6, length: int = 20, seed: int = 0) -> list[list[int]]:
    """Token ids of sequences of different length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(model.vocab_size, size=length - index).tolist() for index in range(count)]
