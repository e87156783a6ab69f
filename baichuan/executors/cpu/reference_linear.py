"""`linear` in PyTorch on the CPU for every type of weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.parallel.comm import Communicator
from baichuan.quant.fp8 import token_scale
from baichuan.quant.scaled import quantise
from baichuan.quant.smoothquant import int8_matmul, quantise_input
from baichuan.quant.weight_only import dequantise
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight
from baichuan.weights.types import product_of

BLOCK_ELEMENTS = 1 << 18  # float32 elements of a weight per thread: fits the second-level cache
FLOAT16_ROWS = 8  # more rows than this are faster, and exact, in float32

_ONEDNN = threading.Lock()  # oneDNN is switched for the whole process, and ranks may be threads


def linear(x: Tensor, weight: Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    """x @ Wᵀ, accumulated in float32 and rounded once to out_dtype.

    x: [num_tokens, in_features] -> [num_tokens, out_features]
    """
    return product_of(weight, "reference")(x, weight, out_dtype, comm)


def dense(x: Tensor, weight: DenseWeight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    w = weight.weight
    slow_float16 = w.dtype == torch.float16 and x.shape[0] > FLOAT16_ROWS
    if out_dtype == w.dtype == torch.float32:
        return _product(x, w)
    if out_dtype == w.dtype and not slow_float16:
        return _own_gemv(x, w) if x.shape[0] == 1 else F.linear(x, w)
    return _by_blocks(x, weight.shape, _copy_of(w), out_dtype)


def int8(x: Tensor, weight: Int8Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    return _by_blocks(x, weight.shape, partial(dequantise, weight), out_dtype)


def int4(x: Tensor, weight: Int4Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    return _by_blocks(x, weight.shape, partial(dequantise, weight), out_dtype)


def smooth_quant(x: Tensor, weight: SmoothQuantWeight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    x8, input_scale = quantise_input(x, weight, comm)
    return (int8_matmul(x8, weight.weight).float() * input_scale * weight.scale).to(out_dtype)


def fp8(x: Tensor, weight: Fp8Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    input_scale = token_scale(x) if weight.input_scale is None else weight.input_scale
    x8 = quantise(x.float(), input_scale, weight.weight.dtype)
    y = _by_blocks(x8, weight.shape, _copy_of(weight.weight), torch.float32)
    return (y * input_scale * weight.scale).to(out_dtype)


def _own_gemv(x: Tensor, w: Tensor) -> Tensor:
    """F.linear by PyTorch's own GEMV, which reads bfloat16 weights 1.6 times as fast as oneDNN's."""
    with _ONEDNN:
        backend: Any = torch.backends.mkldnn  # Any: its properties are unknown to type checkers
        before, backend.enabled = backend.enabled, False
        try:
            return F.linear(x, w)
        finally:
            backend.enabled = before


def _copy_of(w: Tensor) -> Callable[[slice, Tensor], Tensor]:
    return lambda rows, out: out.copy_(w[rows])


def _by_blocks(
    x: Tensor, shape: tuple[int, int], write_rows: Callable[[slice, Tensor], Tensor], out_dtype: torch.dtype
) -> Tensor:
    """x @ Wᵀ where write_rows(rows, out) writes rows of W in float32; W is never in memory as a whole."""
    out_features, in_features = shape
    step = torch.get_num_threads() * max(1, BLOCK_ELEMENTS // in_features)
    x = x.float()
    y = torch.empty(x.shape[0], out_features, dtype=out_dtype)
    block = torch.empty(min(step, out_features), in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        y[:, rows] = _product(x, write_rows(rows, block[: rows.stop - start]))
    return y


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x @ wᵀ in float32.  For one row, w is split into a part per thread, because a GEMV uses one thread."""
    parts = torch.get_num_threads()
    if x.shape[0] == 1 and parts > 1 and w.shape[0] % parts == 0:
        return torch.bmm(w.unflatten(0, (parts, -1)), x.t().expand(parts, -1, -1)).view(1, -1)
    return F.linear(x, w)
