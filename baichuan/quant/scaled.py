"""8-bit numbers with a scale: x ≈ q * scale, where q is int8 or e4m3."""

from __future__ import annotations

import torch
from torch import Tensor

from baichuan.errors import CheckpointError

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # largest magnitude that is stored


def scale_for(absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """absmax / limit, in float32: the scale that maps absmax to the type's largest value; 1 where absmax is 0."""
    absmax = absmax.float()
    return torch.where(absmax > 0, divided(absmax, LIMITS[dtype]), 1)


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, rounded to even on every device: a GPU would multiply by a number's reciprocal."""
    return x / torch.full((), number, dtype=x.dtype, device=x.device)


def quantise(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, clamped to the type's range and rounded to nearest even.  scale broadcasts against x -> x's shape."""
    limit = LIMITS[dtype]
    q = (x.float() / scale.to(x.device)).clamp_(-limit, limit)  # e4m3 has no infinity: a larger value would become NaN
    return (q.round_() if dtype == torch.int8 else q).to(dtype)


def require_finite(absmax: Tensor) -> Tensor:
    """absmax, unchanged.  Raises CheckpointError where a weight was NaN or infinite."""
    if not torch.isfinite(absmax).all():
        raise CheckpointError("a weight is not finite (NaN or infinity) and cannot be quantised; check the checkpoint")
    return absmax
