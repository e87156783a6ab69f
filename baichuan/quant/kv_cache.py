"""What an 8-bit KV cache stores: k and v divided by their own static scales."""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest magnitude that is stored


def quantise_kv(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x as the cache stores it: round(x / scale), clamped to the type's range; x itself in a cache of its own dtype."""
    if dtype not in LIMITS:
        return x.to(dtype)
    scaled = (x.float() / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype)


def dequantise_kv(x: Tensor, scale: Tensor | None) -> Tensor:
    """What attention sees of the cached x, in float32."""
    return x.float() * scale if x.dtype in LIMITS else x.float()
