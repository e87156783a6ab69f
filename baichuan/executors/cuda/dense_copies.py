"""Dequantised copies of weight-only matrices in memory that is spare: many tokens then cost what dense weights cost."""

from __future__ import annotations

import math

import torch

from baichuan.kernels.dequantise import dequantise_to
from baichuan.records import DenseWeight, Int4Weight, Int8Weight, ModelWeights

# From this many tokens on a product with a copy is faster than the kernel that reads the integers
# (docs/performance.md).
COPY_ROWS = {Int8Weight: 65, Int4Weight: 129}
COPY_ROWS_WITH_ZEROS = 65


def copy_rows(weight: Int8Weight | Int4Weight) -> int:
    """The number of tokens from which on a product of this weight takes its copy."""
    if isinstance(weight, Int4Weight) and weight.zero is not None:
        return COPY_ROWS_WITH_ZEROS
    return COPY_ROWS[type(weight)]


class DenseCopies:
    """Each weight's copy, made when a product first asks for it and kept, within `budget` bytes of GPU memory.

    An example: a budget of 1 GB holds copies of the first five matrices of 200 MB that a prefill meets.  Later
    prefills find those five here, and the executor dequantises the others at each product.
    """

    def __init__(self, budget: int = 0):
        self._left = budget
        self._kept: dict[Int8Weight | Int4Weight, DenseWeight] = {}

    def get(self, weight: Int8Weight | Int4Weight, dtype: torch.dtype, num_tokens: int) -> DenseWeight | None:
        """The copy, in dtype; None where a product of num_tokens needs none, or the budget has no room for it."""
        if num_tokens < copy_rows(weight):
            return None
        if weight not in self._kept:
            size = math.prod(weight.shape) * dtype.itemsize
            if size > self._left:
                return None
            self._left -= size
            self._kept[weight] = DenseWeight(dequantise_to(weight, dtype))
        return self._kept[weight]


def bytes_of_copies(weights: ModelWeights) -> int:
    """GPU memory that copies of all weights take that can have one."""
    layers = (
        weight for layer in weights.layers for weight in (layer.qkv, layer.o_proj, layer.gate_up, layer.down_proj)
    )
    numbers = sum(math.prod(each.shape) for each in (*layers, weights.lm_head) if type(each) in COPY_ROWS)
    return numbers * weights.embedding.dtype.itemsize
