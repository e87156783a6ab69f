"""A checkpoint as its readers see it: named tensors that are read block by block, never whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint, not yet read."""

    shape: tuple[int, ...]  # [rows, columns], or [rows]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]  # rows start to stop, [stop - start, ...] in dtype


Checkpoint = Mapping[str, TensorSource]  # by the hub's names: model.layers.0.self_attn.W_pack.weight, ...


def known(values: Tensor) -> TensorSource:
    """A tensor that is in memory already."""
    return TensorSource(tuple(values.shape), values.dtype, lambda start, stop: values[start:stop])


def part(source: TensorSource, first: int, rows: int) -> TensorSource:
    """Rows first to first + rows."""
    return replace(source, shape=(rows, *source.shape[1:]), read=lambda a, b: source.read(first + a, first + b))


def stacked(sources: list[TensorSource]) -> TensorSource:
    """The sources' rows one after another."""
    if len(sources) == 1:
        return sources[0]
    rows = sum(source.shape[0] for source in sources)

    def read(start: int, stop: int) -> Tensor:
        found, first = [], 0
        for source in sources:
            a, b = max(start - first, 0), min(stop - first, source.shape[0])
            if a < b:
                found.append(source.read(a, b))
            first += source.shape[0]
        return torch.cat(found)

    return TensorSource((rows, *sources[0].shape[1:]), sources[0].dtype, read)
