"""A checkpoint as its readers see it: named tensors that are read block by block, never whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Range = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class TensorSource:
    """One tensor of a checkpoint, not yet read."""

    shape: tuple[int, ...]  # [rows, columns], or [rows]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]  # rows start to stop, [stop - start, ...] in dtype
    int4: Mapping[str, TensorSource] | None = None  # fields of records.Int4Weight that the rows were dequantised from
    read_columns: Callable[[int, int], Tensor] | None = None  # columns start to stop; None = by reading every row

    def blocks(self, block_bytes: int, ranges: Sequence[Range] | None = None) -> Iterator[Range]:
        """The row ranges (None = all rows) in blocks whose rows take at most block_bytes in float32, one row at least.

        This is how every reader walks a tensor: for start, stop in source.blocks(...): source.read(start, stop)
        """
        step = max(1, block_bytes // (4 * torch.Size(self.shape[1:]).numel()))
        for start, stop in ranges if ranges is not None else [(0, self.shape[0])]:
            for first in range(start, stop, step):
                yield first, min(first + step, stop)

    def rows(self, start: int, stop: int) -> TensorSource:
        """Rows start to stop as a tensor of their own."""
        shape = (stop - start, *self.shape[1:])
        return TensorSource(shape, self.dtype, lambda a, b: self.read(start + a, start + b))

    def columns(self, start: int, stop: int) -> Tensor:
        """All rows of columns start to stop."""
        if self.read_columns:
            return self.read_columns(start, stop)
        return self.read(0, self.shape[0])[:, start:stop]


Checkpoint = Mapping[str, TensorSource]  # by the hub's names: model.layers.0.self_attn.W_pack.weight, ...


def known(values: Tensor) -> TensorSource:
    """A tensor that is in memory already."""
    return TensorSource(tuple(values.shape), values.dtype, lambda start, stop: values[start:stop])


def on_device(checkpoint: Checkpoint, device: torch.device) -> Checkpoint:
    """The same checkpoint, its rows read to a device, where they are then converted."""
    if device.type == "cpu":
        return checkpoint

    def moved(source: TensorSource) -> TensorSource:
        return replace(
            source,
            read=lambda start, stop: source.read(start, stop).to(device),
            int4={name: moved(part) for name, part in source.int4.items()} if source.int4 else None,
            read_columns=lambda start, stop: source.columns(start, stop).to(device),
        )

    return {name: moved(source) for name, source in checkpoint.items()}


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
