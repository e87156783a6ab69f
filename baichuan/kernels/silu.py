"""The gated activation of the MLP, quantising the result where the next GEMM wants integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import divide, load_smoother, row_output, store_row


@triton.jit
def silu(x):
    """x / (1 + e^-x), float32"""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def gated(gate, up, dtype: tl.constexpr):
    """silu(gate) * up of sums, each rounded to the dtype before."""
    return (silu(gate.to(dtype).to(tl.float32)) * up.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _silu_mul(
    gate_up, smoother, scale,
    width,
    out, out_scale,
    QUANTISE: tl.constexpr, SMOOTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if SMOOTH:
        divisor, reciprocal = load_smoother(smoother, columns, mask)
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    source = gate_up + row.to(tl.int64) * 2 * width + columns
    gate = tl.load(source, mask, other=0.0).to(tl.float32)
    up = tl.load(source + width, mask, other=0.0).to(tl.float32)
    value = (silu(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
    if SMOOTH:
        value = divide(value, divisor, reciprocal)
    store_row(value, row, columns, mask, scale, out, out_scale, width, QUANTISE, False)


SILU_MUL = KernelSpec(_silu_mul, ("gate_up", "smoother", "scale"), ("width",), ("out", "out_scale"))


def silu_mul(
    gate_up: Tensor,
    quantised: torch.dtype | None = None,
    input_scale: Tensor | None = None,
    smoother: Tensor | None = None,
    even_odd: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(silu(gate) * up, scale).  gate_up: [num_tokens, 2 * width] -> [num_tokens, width]

    quantised, input_scale [1], even_odd: see row_output; 8-bit numbers are of the result divided by smoother [width],
    if any.
    """
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out, scale, mode = row_output(gate_up, num_tokens, width, quantised, input_scale, even_odd)
    block = next_power_of_2(width)
    if scale is input_scale:  # else the maximum is over the whole row
        block = min(block, 2048)
    SILU_MUL.launch(
        (num_tokens, cdiv(width, block)),
        (gate_up, gate_up if smoother is None else smoother, gate_up if scale is None else scale),
        (width,),
        (out, gate_up if scale is None else scale),
        {"QUANTISE": mode, "SMOOTH": smoother is not None, "BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, scale
