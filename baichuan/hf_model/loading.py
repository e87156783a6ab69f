"""A checkpoint's weights as a PyTorch module takes them; to a GPU they go a few GB at a time, without filling the
host's memory first.  They come through weights/, as an engine's do, and not through transformers' from_pretrained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from baichuan.config import ModelConfig
from baichuan.weights.hub.adapter import open_merged
from baichuan.weights.hub.checkpoint import read_model_config
from baichuan.weights.source import Checkpoint

GROUP_BYTES = 4 << 30  # copied together; for a conversion, a group is on the GPU in both dtypes

Model = TypeVar("Model", bound=nn.Module)


def read_weights(
    folder: Path, model_version: str | None, dtype: str, device: torch.device, adapters: Sequence[Path] = ()
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model in `folder` and its weights by the hub's names, in dtype on the device.

    model_version: None = what the folder proves; adapters: folders of LoRA adapters that are merged into it.
    Raises CheckpointError for an unreadable or incomplete checkpoint, ConfigError for another version's.
    """
    model = read_model_config(folder, model_version, dtype)
    checkpoint = open_merged(folder, model, adapters)
    if device.type == "cuda":
        return model, read_on_gpu(checkpoint, getattr(torch, dtype), device)
    return model, read_all(checkpoint, getattr(torch, dtype))


def with_weights(make: Callable[[], Model], weights: Mapping[str, Tensor]) -> Model:
    """The module that `make` makes, with these weights instead of its own, in eval mode."""
    with torch.device("meta"):
        module = make()
    module.load_state_dict(weights, assign=True)
    return module.eval()


def read_all(tensors: Checkpoint, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors in dtype, on the device that the checkpoint reads them to."""
    return {name: source.read(0, source.shape[0]).to(dtype) for name, source in tensors.items()}


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
