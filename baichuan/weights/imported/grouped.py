"""Matrices of integers with a scale, and mostly a zero, per output channel and group of input channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baichuan.errors import CheckpointError
from baichuan.quant.scaled import require_finite
from baichuan.quant.weight_only import pack_int4
from baichuan.weights.source import TensorSource

Rows = Callable[[int, int], Tensor]  # (start, stop) -> those output channels


@dataclass(frozen=True)
class Grouped:
    """w[o, i] = (integers[o, i] - zeros[o, g]) * scales[o, g] for the group g of input channel i."""

    name: str  # the matrix's name, for messages
    shape: tuple[int, int]  # (out_features, in_features)
    bits: int  # 4 or 8
    group_size: int  # 0 = the whole row
    integers: Rows  # [n, in_features] uint8
    scales: Rows  # [n, groups] in scale_dtype
    scale_dtype: torch.dtype
    zeros: Rows | None = None  # [n, groups] of an integer type; None = 2^(bits - 1), the middle
    symmetric: bool = False  # every zero must be in the middle
    groups: Tensor | None = None  # [in_features] int64, each input channel's group; None = in their order

    def source(self) -> TensorSource:
        """The dense matrix in float32, with its 4-bit integers where their groups are in order."""
        return TensorSource(self.shape, torch.float32, self._dense, self._int4())

    def _int4(self) -> dict[str, TensorSource] | None:
        """Fields of records.Int4Weight, the scale in its own type."""
        rows, columns = self.shape
        if self.bits != 4 or self.groups is not None or columns % 2:
            return None
        grouped = rows, group_count(columns, self.group_size)
        scale = TensorSource(grouped, self.scale_dtype, lambda a, b: require_finite(self.scales(a, b)))
        fields = {"packed": TensorSource((rows, columns // 2), torch.uint8, self._packed), "scale": scale}
        if self.zeros is not None and not self.symmetric:
            fields["zero"] = TensorSource(grouped, torch.int8, lambda a, b: self._signed_zeros(a, b).to(torch.int8))
        return fields

    def _packed(self, start: int, stop: int) -> Tensor:
        self._signed_zeros(start, stop)  # are in the middle where they should be
        return pack_int4(self.integers(start, stop).to(torch.int8) - self._middle())

    def _dense(self, start: int, stop: int) -> Tensor:
        scales = require_finite(self.scales(start, stop).float())
        zeros = self._signed_zeros(start, stop)
        q = (self.integers(start, stop).to(torch.int16) - self._middle()).float()  # [n, in_features]
        if self.groups is not None:
            groups = self.groups.to(q.device)
            return (q if zeros is None else q - zeros.float()[:, groups]) * scales[:, groups]
        q = q.unflatten(1, (scales.shape[1], -1))
        return ((q if zeros is None else q - zeros.float()[:, :, None]) * scales[:, :, None]).flatten(1)

    def _signed_zeros(self, start: int, stop: int) -> Any:  # None where all are 0
        if self.zeros is None:
            return None
        zeros = self.zeros(start, stop).to(torch.int16) - self._middle()
        if self.symmetric and zeros.count_nonzero():
            raise CheckpointError(f"{self.name} has zeros and its quantization_config says sym; correct config.json")
        return None if self.symmetric else zeros

    def _middle(self) -> int:
        return 1 << (self.bits - 1)


def group_count(in_features: int, group_size: int) -> int:
    """Groups of a row, whose last may be shorter.  group_size: 0 = the whole row."""
    return -(-in_features // group_size) if group_size else 1


def channel_groups(where: str, g_idx: Tensor, in_features: int, group_size: int) -> Tensor | None:
    """Each input channel's group; None where the groups are in the channels' order.

    Raises CheckpointError for a group that there is not, and for groups in order that do not fill the row.
    """
    groups = g_idx.long()
    count = group_count(in_features, group_size)
    if tuple(groups.shape) != (in_features,) or groups.min() < 0 or groups.max() >= count:
        raise CheckpointError(f"{where} has a g_idx that does not name a group of each of {in_features} input channels")
    in_order = torch.arange(in_features) // (group_size or in_features)
    if groups.equal(in_order) and in_features % (group_size or in_features) == 0:
        return None
    return groups
