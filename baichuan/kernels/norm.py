"""Residual addition and RMS norm, quantising the result where the next GEMM wants integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.kernels.store_row import NONE, row_output, store_row


@dataclass(frozen=True)
class NormInput:
    """What is still to be made: norm(x + residual) * weight, x + residual being kept."""

    x: Tensor  # [num_tokens, in_features]
    residual: Tensor | None
    weight: Tensor  # [in_features]
    eps: float
    total: Tensor  # as x, x + residual is written here; x itself without a residual


@triton.jit
def _add_rms_norm(
    x, residual, weight, scale,
    width,
    total, out, out_scale,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, QUANTISE: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    offsets = row.to(tl.int64) * width + columns
    w = tl.load(weight + columns, mask, other=0.0)
    # the weights that a GEMV of floats asks for at first are too few to delay this kernel's own inputs
    if EARLY:
        start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    if not EARLY:
        start_dependents(OVERLAP)
    r = tl.load(x + offsets, mask, other=0.0)
    if HAS_RESIDUAL:
        r = (r.to(tl.float32) + tl.load(residual + offsets, mask, other=0.0).to(tl.float32)).to(r.dtype)
        tl.store(total + offsets, r, mask)
    r = r.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(r * r, 0) / width + EPS)
    normed = (r * inverse_rms).to(w.dtype).to(tl.float32) * w.to(tl.float32)
    normed = normed.to(w.dtype).to(tl.float32)
    store_row(normed, row, columns, mask, scale, out, out_scale, width, QUANTISE, False)


ADD_RMS_NORM = KernelSpec(
    _add_rms_norm, ("x", "residual", "weight", "scale"), ("width",), ("total", "out", "out_scale")
)


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    quantised: torch.dtype | None = None,
    input_scale: Tensor | None = None,
    total: Tensor | None = None,
    even_odd: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(norm of x + residual, x + residual, scale) as ops.Ops.add_rms_norm says.

    x, residual: [num_tokens, hidden_size]; quantised, input_scale [1], even_odd: see row_output.
    x + residual is written to `total` if given.
    """
    num_tokens, width = x.shape
    if total is None:
        total = x if residual is None else torch.empty_like(x)
    out, scale, mode = row_output(x, num_tokens, width, quantised, input_scale, even_odd)
    block, early = next_power_of_2(width), mode == NONE and num_tokens == 1
    ADD_RMS_NORM.launch(
        (num_tokens,),
        (x, x if residual is None else residual, weight, x if scale is None else scale),
        (width,),
        (total, out, x if scale is None else scale),
        {"EPS": eps, "HAS_RESIDUAL": residual is not None, "QUANTISE": mode, "EARLY": early, "BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, total, scale
