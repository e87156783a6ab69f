"""`linear` in PyTorch on the CPU for every type of weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.comm import Communicator
from baichuan.errors import UnsupportedError
from baichuan.records import DenseWeight, Weight

BLOCK_ELEMENTS = 1 << 20  # a float32 block of a weight stays in the second-level cache
FLOAT16_ROWS = 8  # more rows than this are faster, and exact, in float32


def linear(x: Tensor, weight: Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    """x @ Wᵀ, accumulated in float32 and rounded once to out_dtype.

    x: [num_tokens, in_features] -> [num_tokens, out_features]
    """
    match weight:
        case DenseWeight(w):
            slow_float16 = w.dtype == torch.float16 and x.shape[0] > FLOAT16_ROWS
            if out_dtype == w.dtype and not slow_float16:
                return F.linear(x, w)
            return _by_blocks(x, w.shape, lambda rows: w[rows].float(), out_dtype)
        case _:
            raise UnsupportedError(f"the reference executor has no linear for {type(weight).__name__}")


def _by_blocks(x: Tensor, shape: torch.Size, dense_rows: Callable[[slice], Tensor], out_dtype: torch.dtype) -> Tensor:
    """x @ Wᵀ where dense_rows gives rows of W in float32; W is never in memory as a whole."""
    out_features, in_features = shape
    rows = max(1, BLOCK_ELEMENTS // in_features)
    x = x.float()
    y = torch.empty(x.shape[0], out_features, dtype=out_dtype)
    for start in range(0, out_features, rows):
        block = slice(start, min(start + rows, out_features))
        y[:, block] = F.linear(x, dense_rows(block))
    return y
