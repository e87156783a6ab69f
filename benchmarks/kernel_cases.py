"""What a case of bench_kernels.py is: its record, the shapes of a run, and the bounds that cases have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from baichuan.config import ModelConfig

# Bounds of ‖result - reference‖ / ‖reference‖.  One or two roundings to the dtype: a unit in the last place.
ROUNDED = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
NEIGHBOUR = 1e-2  # an 8-bit number next to the reference's, where a quotient is halfway between two


def _plain(raw: Any, *operands) -> Tensor:
    return raw


@dataclass(frozen=True)
class Case:
    """Kernels that are checked and timed together, on operands from a seed."""

    name: str  # kernel, then what distinguishes the case
    make: Callable[[int], tuple]  # seed -> operands
    run: Callable[..., Any]  # the kernels, as the executor launches them
    expected: Callable[..., Tensor]  # the reference executor's result; operands are not changed
    tolerance: float  # largest ‖result - expected‖ / ‖expected‖
    flops: int = 0
    rate: str = "float16"  # the type whose matrix products are the ceiling
    result: Callable[..., Tensor] = _plain  # (what run returned, *operands) -> the tensor to check
    num_bytes: int = 0  # bytes that a run reads and writes; 0 = all of its operands and results


@dataclass(frozen=True)
class Sizes:
    """The shapes of a run."""

    model: ModelConfig
    rows: tuple[int, ...]  # numbers of rows of the products
    tokens: tuple[int, ...]  # numbers of tokens of the kernels between products
    decode: tuple[tuple[int, int], ...]  # (batch size, context length)
    prefill: tuple[tuple[int, int], ...]  # (batch size, prompt length)


def full_sizes(model: ModelConfig) -> Sizes:
    decode = ((1, 256), (1, 4096), (64, 256), (256, 256))
    return Sizes(model, (1, 16, 64, 256), (1, 64, 1024), decode, ((1, 1024), (8, 256)))


def small_sizes(model: ModelConfig) -> Sizes:
    """Shapes that Triton's interpreter computes in seconds."""
    small = replace(model, hidden_size=128, num_heads=2, intermediate_size=128, vocab_size=66, num_layers=1)
    return Sizes(small, (1, 16), (1, 3), ((1, 200), (3, 20)), ((2, 40),))


def normal(shape: tuple[int, ...], device: torch.device, seed: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)
