"""Residual addition and RMS norm, written in the form that the next product takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import PLAIN, Form, Operand, Plain
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.kernels.store_row import form_constant, store_row


@triton.jit
def store_normed(r, w, row, columns, mask, scale, out, out_scale, width, EPS: tl.constexpr, FORM: tl.constexpr):
    """Write the norm of a row r times w in the given form, as store_row.py does.  r: 0 beyond the mask"""
    r = r.to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt_rn(tl.sum(r * r, 0) / width + EPS)
    normed = (r * inverse_rms).to(w.dtype).to(tl.float32) * w.to(tl.float32)
    normed = normed.to(w.dtype).to(tl.float32)
    store_row(normed, row, columns, mask, scale, out, out_scale, width, FORM, False)


@triton.jit
def _add_rms_norm(
    x, residual, weight, scale,
    width,
    total, out, out_scale,
    EPS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, FORM: tl.constexpr, EARLY: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    offsets = row.to(tl.int64) * width + columns
    w = tl.load(weight + columns, mask, other=0.0)
    # EARLY: the first weights that a dense GEMV loads are too few to delay this kernel's own inputs.
    if EARLY:
        start_dependents(OVERLAP)
    wait_for_inputs(OVERLAP)
    if not EARLY:
        start_dependents(OVERLAP)
    r = tl.load(x + offsets, mask, other=0.0)
    if HAS_RESIDUAL:
        r = (r.to(tl.float32) + tl.load(residual + offsets, mask, other=0.0).to(tl.float32)).to(r.dtype)
        tl.store(total + offsets, r, mask)
    store_normed(r, w, row, columns, mask, scale, out, out_scale, width, EPS, FORM)


ADD_RMS_NORM = KernelSpec(
    _add_rms_norm, ("x", "residual", "weight", "scale"), ("width",), ("total", "out", "out_scale")
)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, form: Form = PLAIN
) -> tuple[Operand, Tensor]:
    """(norm of x + residual in the given form, x + residual), as ops.ComposedOps.add_rms_norm says.

    x, residual: [num_tokens, hidden_size]; weight: [hidden_size]; form: any without a smoother and with at most one
    scale for all tokens
    """
    num_tokens, width = x.shape
    total = x if residual is None else torch.empty_like(x)
    out = Operand.allocate(form, x, num_tokens, width)
    scale = x if out.scale is None else out.scale
    block, early = next_power_of_2(width), isinstance(form, Plain) and num_tokens == 1
    ADD_RMS_NORM.launch(
        (num_tokens,),
        (x, x if residual is None else residual, weight, scale),
        (width,),
        (total, out.values, scale),
        {
            "EPS": eps,
            "HAS_RESIDUAL": residual is not None,
            "FORM": form_constant(form),
            "EARLY": early,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, total
