"""Matrix products by PyTorch's libraries (cuBLAS, cuBLASLt) on a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.quant.smoothquant import int8_matmul

INT_MM_ROWS = 17  # torch._int_mm refuses fewer


def product(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x @ weightᵀ.  x: [num_tokens, in_features]; weight: [out_features, in_features] -> [num_tokens, out_features]"""
    if out_dtype == x.dtype:
        return torch.mm(x, weight.t())
    return torch.mm(x, weight.t(), out_dtype=out_dtype)


def int8_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(x @ weightᵀ) * x_scale * scale for int8 matrices, summed exactly.

    x: [num_tokens, in_features]; x_scale: [1] or [num_tokens]; weight: [out_features, in_features];
    scale: [out_features]
    """
    rows = x.shape[0]
    if x.shape[1] % 8 or weight.shape[0] % 8:  # what torch._int_mm asks for
        total = int8_matmul(x, weight)
    else:
        total = torch._int_mm(F.pad(x, (0, 0, 0, max(INT_MM_ROWS - rows, 0))), weight.t())[:rows]
    return (total.float() * x_scale.view(-1, 1) * scale).to(out_dtype)


def fp8_product(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """(x @ weightᵀ) * x_scale * scale for e4m3 matrices.

    x: [num_tokens, in_features]; x_scale: [1] or [num_tokens]; weight: [out_features, in_features];
    scale: [out_features]
    """
    return (fp8_sums(x, weight) * x_scale.view(-1, 1) * scale).to(out_dtype)


def fp8_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weightᵀ in float32 for e4m3 matrices."""
    if not fp8_in_library(weight):
        return x.float() @ weight.float().t()
    one = _one(x.device)
    return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.float32)


def fp8_in_library(weight: Tensor) -> bool:
    """Whether cuBLASLt takes this e4m3 matrix."""
    return weight.shape[0] % 16 == weight.shape[1] % 16 == 0


@lru_cache
def _one(device: torch.device) -> Tensor:
    return torch.ones((), device=device)
