"""A checkpoint's tensors to a GPU, a few GB at a time, without filling the host's memory first."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from baichuan.weights.source import Checkpoint

GROUP_BYTES = 4 << 30  # copied together; for a conversion, a group is on the GPU in both dtypes


def read_on_gpu(tensors: Checkpoint, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The tensors in dtype on the device.  Raises UnsupportedError where they do not fit."""
    from baichuan.executors.cuda.load import load_on_gpu

    weights: dict[str, Tensor] = {}
    for group in _groups(tensors):
        mapped = tuple(tensors[name].read(0, tensors[name].shape[0]) for name in group)
        moved = load_on_gpu(mapped, device)
        weights |= {name: tensor.to(dtype) for name, tensor in zip(group, moved, strict=True)}
    return weights


def _groups(tensors: Checkpoint) -> Iterator[list[str]]:
    """The names in groups of at least GROUP_BYTES; the last group may be smaller."""
    group: list[str] = []
    size = 0
    for name, source in tensors.items():
        group.append(name)
        size += torch.Size(source.shape).numel() * source.dtype.itemsize
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group
