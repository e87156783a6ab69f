"""Seeded random tensors for tests."""

from __future__ import annotations

import torch


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0, device="cpu") -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)
