"""What an 8-bit KV cache stores: k and v divided by their own static scales."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.quant.scaled import LIMITS, quantise


def quantise_kv(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x as the cache stores it: quantise(x, scale), or x itself in a cache of its own dtype."""
    return quantise(x, scale, dtype) if dtype in LIMITS else x.to(dtype)


def dequantise_kv(x: Tensor, scale: Tensor | None) -> Tensor:
    """What attention sees of the cached x, in float32."""
    return x.float() * scale if x.dtype in LIMITS else x.float()
