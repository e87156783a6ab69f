"""A checkpoint as its readers see it: named tensors that are read block by block, never whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint, not yet read."""

    shape: tuple[int, ...]  # [rows, columns], or [rows]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]  # rows start to stop, [stop - start, ...] in dtype


Checkpoint = Mapping[str, TensorSource]  # by the hub's names: model.layers.0.self_attn.W_pack.weight, ...
