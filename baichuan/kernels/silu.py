"""The gated activation of the MLP, written in the form that the next product takes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import PLAIN, WHOLE_ROWS, Form, Operand, smoother_of
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import divide, form_constant, load_smoother, rows_each, store_row


@triton.jit
def silu(x):
    """x / (1 + e^-x), float32"""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in the dtype.  gate, up: float32 sums, each of which is rounded to the dtype first."""
    return (silu(gate.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _silu_mul(
    gate_up, smoother, scale,
    width,
    out, out_scale,
    FORM: tl.constexpr, SMOOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if SMOOTH:
        divisor, reciprocal = load_smoother(smoother, columns, mask)
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        source = gate_up + row.to(tl.int64) * 2 * width + columns
        gate = tl.load(source, mask, other=0.0).to(tl.float32)
        up = tl.load(source + width, mask, other=0.0).to(tl.float32)
        value = (silu(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
        if SMOOTH:
            value = divide(value, divisor, reciprocal)
        store_row(value, row, columns, mask, scale, out, out_scale, width, FORM, False)


SILU_MUL = KernelSpec(_silu_mul, ("gate_up", "smoother", "scale"), ("width",), ("out", "out_scale"))


def silu_mul(gate_up: Tensor, form: Form = PLAIN) -> Operand:
    """silu(gate) * up in the given form, with at most one scale for all tokens.

    gate_up: [num_tokens, 2 * width], all gate, all up -> [num_tokens, width]
    """
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, smoother = Operand.allocate(form, gate_up, num_tokens, width), smoother_of(form)
    block = next_power_of_2(width)
    if not isinstance(form, WHOLE_ROWS):
        block = min(block, 2048)
    scale = gate_up if out.scale is None else out.scale
    rows = rows_each(num_tokens, smoother)
    SILU_MUL.launch(
        (num_tokens // rows, cdiv(width, block)),
        (gate_up, gate_up if smoother is None else smoother, scale),
        (width,),
        (out.values, scale),
        {"FORM": form_constant(form), "SMOOTH": smoother is not None, "ROWS": rows, "BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),
    )
    return out
