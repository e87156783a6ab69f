"""`linear` in PyTorch on the CPU for every type of weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from baichuan.errors import UnsupportedError
from baichuan.parallel.comm import Communicator
from baichuan.quant.scaled import quantise
from baichuan.quant.smoothquant import int8_matmul, quantise_input
from baichuan.quant.weight_only import dequantise
from baichuan.records import DenseWeight, Fp8Weight, Int4Weight, Int8Weight, SmoothQuantWeight, Weight

BLOCK_ELEMENTS = 1 << 18  # a thread's part of a weight in float32, which stays in the second-level cache
FLOAT16_ROWS = 8  # more rows than this are faster, and exact, in float32

_ONEDNN = threading.Lock()  # its switch is the process's, and ranks may be threads


def linear(x: Tensor, weight: Weight, out_dtype: torch.dtype, comm: Communicator) -> Tensor:
    """x @ Wᵀ, accumulated in float32 and rounded once to out_dtype.

    x: [num_tokens, in_features] -> [num_tokens, out_features]
    """
    match weight:
        case DenseWeight(w):
            slow_float16 = w.dtype == torch.float16 and x.shape[0] > FLOAT16_ROWS
            if out_dtype == w.dtype == torch.float32:
                return _product(x, w)
            if out_dtype == w.dtype and not slow_float16:
                return _own_gemv(x, w) if x.shape[0] == 1 else F.linear(x, w)
            return _by_blocks(x, w.shape, _copy_of(w), out_dtype)
        case Int8Weight(q, _):
            return _by_blocks(x, q.shape, partial(dequantise, weight), out_dtype)
        case Int4Weight(packed, _):
            shape = torch.Size((packed.shape[0], 2 * packed.shape[1]))
            return _by_blocks(x, shape, partial(dequantise, weight), out_dtype)
        case SmoothQuantWeight(q, scale):
            x8, input_scale = quantise_input(x, weight, comm)
            return (int8_matmul(x8, q).float() * input_scale * scale).to(out_dtype)
        case Fp8Weight(q, scale, input_scale):
            x8 = quantise(x.float(), input_scale, q.dtype)
            y = _by_blocks(x8, q.shape, _copy_of(q), torch.float32)
            return (y * input_scale * scale).to(out_dtype)
        case _:
            raise UnsupportedError(f"the reference executor has no linear for {type(weight).__name__}")


def _own_gemv(x: Tensor, w: Tensor) -> Tensor:
    """F.linear by PyTorch's own GEMV, which reads bfloat16 weights 1.6 times as fast as oneDNN's."""
    with _ONEDNN:
        before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
        try:
            return F.linear(x, w)
        finally:
            torch.backends.mkldnn.enabled = before


def _copy_of(w: Tensor) -> Callable[[slice, Tensor], Tensor]:
    return lambda rows, out: out.copy_(w[rows])


def _by_blocks(
    x: Tensor, shape: torch.Size, write_rows: Callable[[slice, Tensor], Tensor], out_dtype: torch.dtype
) -> Tensor:
    """x @ Wᵀ where write_rows(rows, out) makes rows of W in float32; W is never in memory as a whole."""
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
    """x @ wᵀ in float32.  One row meets w in as many parts as there are threads, because a GEMV uses only one."""
    parts = torch.get_num_threads()
    if x.shape[0] == 1 and parts > 1 and w.shape[0] % parts == 0:
        return torch.bmm(w.unflatten(0, (parts, -1)), x.t().expand(parts, -1, -1)).view(1, -1)
    return F.linear(x, w)
