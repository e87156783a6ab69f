"""Dequantised copies of weight-only matrices in memory that is spare: many rows then cost what dense weights cost."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.kernels.dequantise import dequantise_to
from baichuan.records import Int4Weight, Int8Weight

# Of how many rows on a product of a copy is faster than the kernels that take the integers; see docs/performance.md.
COPY_ROWS = {Int8Weight: 129, Int4Weight: 33}


class DenseCopies:
    """Made when first asked for and kept, within `budget` bytes of GPU memory; weights must outlive them."""

    def __init__(self, budget: int = 0):
        self._left = budget
        self._kept: dict[int, Tensor] = {}

    def get(self, weight: Int8Weight | Int4Weight, dtype: torch.dtype, rows: int) -> Tensor | None:
        """weight as [out_features, in_features] of dtype; None where `rows` of a product are too few, or no room is."""
        if rows < COPY_ROWS[type(weight)]:
            return None
        if id(weight) not in self._kept:
            stored, scale = vars(weight).values()
            size = stored.numel() * (2 if isinstance(weight, Int4Weight) else 1) * dtype.itemsize
            if size > self._left:
                return None
            self._left -= size
            self._kept[id(weight)] = dequantise_to(stored, scale, dtype)
        return self._kept[id(weight)]
