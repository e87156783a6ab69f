"""Weights from memory-mapped host tensors to a GPU, at the speed of several copying threads."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from baichuan.executors.memory import require_device_memory

PIECE_BYTES = 32 << 20  # what a thread copies at a time, through its own pinned memory
THREADS = 8


def load_on_gpu(record: Any, device: torch.device) -> Any:
    """The record with its tensors, and those of the records in it, on the device.

    Raises UnsupportedError where they do not fit.
    """
    require_device_memory(sum(each.nbytes for each in tensors_of(record)), "the engine's weights", device)
    local = threading.local()
    pieces: list[tuple[Tensor, Tensor]] = []  # source, target

    def on_device(tensor: Tensor) -> Tensor:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        both = (each.contiguous().view(-1).view(torch.uint8).split(PIECE_BYTES) for each in (tensor, target))
        pieces.extend(zip(*both, strict=True))
        return target

    def copy(source: Tensor, target: Tensor) -> None:
        if not hasattr(local, "pinned"):
            local.pinned = torch.empty(PIECE_BYTES, dtype=torch.uint8).pin_memory()
            local.stream = torch.cuda.Stream(device)
        staged = local.pinned[: source.shape[0]]
        staged.copy_(source)
        with torch.cuda.stream(local.stream):
            target.copy_(staged, non_blocking=True)
        local.stream.synchronize()

    loaded = map_tensors(record, on_device)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(copy, *piece) for piece in pieces]:
            done.result()
    return loaded


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A record, tuple or tensor with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(map_tensors(each, change) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: map_tensors(each, change) for name, each in fields.items()})
    return value


def tensors_of(record: Any) -> list[Tensor]:
    """Every tensor of a record and of the records in it."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(record, note)
    return found
