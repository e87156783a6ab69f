"""A checkpoint's files straight to a GPU, shard by shard, where from_pretrained would fill the host's memory first."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from baichuan.errors import CheckpointError

SINGLES = ("model.safetensors", "pytorch_model.bin")  # the first that a folder holds, whole or in shards, is read


def fill(model: nn.Module, folder: Path, dtype: torch.dtype, device: torch.device, ignored: list[str]) -> None:
    """Give the model, made on the device meta, the folder's weights.

    ignored: patterns of names that the model has no use for.  Raises CheckpointError for an unreadable or incomplete
    checkpoint.
    """
    try:
        state = _read(folder, dtype, device)
        state = {name: tensor for name, tensor in state.items() if not any(re.search(p, name) for p in ignored)}
        found = model.load_state_dict(state, strict=False, assign=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be loaded ({error}); is the download complete?") from None
    for kind in ("missing_keys", "unexpected_keys"):
        if names := sorted(getattr(found, kind)):
            raise CheckpointError(f"{folder} has {kind.replace('_', ' ')}: {', '.join(names[:3])}; download it again")


def _read(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    from baichuan.executors.cuda.load import load_on_gpu

    state: dict[str, Tensor] = {}
    for file in _files(folder):
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        moved = load_on_gpu(tuple(tensors.values()), device)
        state |= {name: tensor.to(dtype) for name, tensor in zip(tensors, moved, strict=True)}
    return state


def _files(folder: Path) -> list[Path]:
    for single in SINGLES:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    raise OSError("no weights are there")
