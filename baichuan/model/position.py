"""Baichuan's position encodings: RoPE (7B) and ALiBi (13B), both in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baichuan.records import AttentionSpec


def rope_table(positions: int, spec: AttentionSpec, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """rope_at for the positions from 0 on, each [positions, head_dim / 2] float32 on the device."""
    cos, sin = rope_at(torch.arange(positions), spec.head_dim, spec.rope_theta, spec.rope_factor)
    return cos.to(device), sin.to(device)


def rope_at(positions: Tensor, head_dim: int, theta: float, factor: float) -> tuple[Tensor, Tensor]:
    """cos and sin of (position / factor) / theta^(2i / head_dim).

    positions: [...] int64 -> each [..., head_dim / 2] float32.  Computed in float64 and rounded once: float32 angles
    lose accuracy at large positions.  Source: Su et al., RoFormer, eq. 15; for the factor Chen et al., Extending
    Context Window of Large Language Models via Position Interpolation, eq. 4.
    """
    steps = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None].double() / factor * theta ** -(steps / head_dim)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half rotation (x1 cos - x2 sin, x2 cos + x1 sin) of the two halves x1, x2 of each head, in float32.

    x: [num_tokens, heads, head_dim]; cos, sin: [num_tokens, head_dim / 2] -> float32
    """
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # [num_tokens, 1, head_dim / 2]
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def alibi_slopes(total_heads: int) -> Tensor:
    """Each head's slope, [total_heads] float32.  Source: Press et al., Train Short, Test Long, with the authors' rule
    for a number of heads that is no power of two: the slopes of the power below, then every other one of the power
    above."""
    power = 1 << (total_heads.bit_length() - 1)
    slopes = _power_of_two_slopes(power)
    if power < total_heads:
        slopes += _power_of_two_slopes(2 * power)[0::2][: total_heads - power]
    return torch.tensor(slopes, dtype=torch.float32)


def _power_of_two_slopes(heads: int) -> list[float]:
    start = 2.0 ** -(2.0 ** -(math.log2(heads) - 3))
    return [start ** (head + 1) for head in range(heads)]
