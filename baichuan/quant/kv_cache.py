"""What an 8-bit KV cache stores: k and v divided by their own static scales."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.quant.scaled import LIMITS, quantise


def quantise_kv(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x as the cache stores it: quantise(x, scale), or x itself in a cache of its own dtype."""
    if dtype not in LIMITS:
        return x.to(dtype)
    assert scale is not None, "an 8-bit cache has scales"
    return quantise(x, scale, dtype)


def dequantise_kv(x: Tensor, scale: Tensor | None) -> Tensor:
    """The cached x as attention reads it, in float32."""
    if x.dtype not in LIMITS:
        return x.float()
    assert scale is not None, "an 8-bit cache has scales"
    return x.float() * scale
