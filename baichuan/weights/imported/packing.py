"""Integers of 4 or 8 bits in words of 32, as the tools that quantise checkpoints store them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Each word's values, its lowest bits first: [..., n] int32 -> [..., n * 32 / bits] uint8.  bits: 4 or 8."""
    octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a view of one row would not do
    return octets if bits == 8 else torch.stack((octets & 0xF, octets >> 4), dim=-1).flatten(-2)


def columns_unpacked(
    read: Callable[[int, int], Tensor], bits: int, start: int, stop: int, places: Sequence[int] | None = None
) -> Tensor:
    """Columns start to stop of rows whose values are packed along them: [n, stop - start] uint8.

    read(first, last): those columns of the words, [n, last - first] int32.  places: where a word holds its columns, in
    their order, counted from the lowest bits; None = in that order.
    """
    per_word = 32 // bits
    first = start // per_word
    values = unpacked(read(first, -(-stop // per_word)), bits)
    if places is not None:
        values = values.unflatten(1, (-1, per_word))[..., places].flatten(1)
    return values[:, start - first * per_word : stop - first * per_word]
