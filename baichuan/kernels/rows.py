"""Work on whole rows: gathering them, and writing them in the form that a product takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import WHOLE_ROWS, Form, Operand, StaticScale, smoother_of
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import divide, form_constant, load_smoother, rows_each, store_row


@triton.jit
def _gather_rows(
    table, rows,
    width,
    out,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    value = tl.load(table + row * width + columns, mask)
    tl.store(out + tl.program_id(0).to(tl.int64) * width + columns, value, mask)


GATHER_ROWS = KernelSpec(_gather_rows, ("table", "rows"), ("width",), ("out",))


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows].  table: [n, width]; rows: [m] int64 in [0, n) -> [m, width]"""
    width = table.shape[1]
    out = torch.empty(rows.shape[0], width, dtype=table.dtype, device=table.device)
    block = min(next_power_of_2(width), 1024)
    GATHER_ROWS.launch((rows.shape[0], cdiv(width, block)), (table, rows), (width,), (out,), {"BLOCK": block})
    return out


@triton.jit
def _quantise_rows(
    x, smoother, scale,
    width,
    out, out_scale,
    FORM: tl.constexpr, SMOOTH: tl.constexpr, ROW_SCALES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    if SMOOTH:
        divisor, reciprocal = load_smoother(smoother, columns, mask)
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    for index in range(ROWS):
        row = tl.program_id(0) * ROWS + index
        value = tl.load(x + row.to(tl.int64) * width + columns, mask, other=0.0).to(tl.float32)
        if SMOOTH:
            value = divide(value, divisor, reciprocal)
        store_row(value, row, columns, mask, scale, out, out_scale, width, FORM, ROW_SCALES)


QUANTISE_ROWS = KernelSpec(_quantise_rows, ("x", "smoother", "scale"), ("width",), ("out", "out_scale"))


def quantise_rows(x: Tensor, form: Form) -> Operand:
    """x, [num_tokens, width] of a float type, in the given form."""
    num_tokens, width = x.shape
    out, smoother = Operand.allocate(form, x, num_tokens, width), smoother_of(form)
    block, rows = next_power_of_2(width), rows_each(num_tokens, smoother)
    if rows > 1 and not isinstance(form, WHOLE_ROWS):
        block = min(block, 1024)
    scale = x if out.scale is None else out.scale
    QUANTISE_ROWS.launch(
        (num_tokens // rows, cdiv(width, block)),
        (x, scale if smoother is None else smoother, scale),
        (width,),
        (out.values, scale),
        {
            "FORM": form_constant(form),
            "SMOOTH": smoother is not None,
            "ROW_SCALES": isinstance(form, StaticScale) and form.scale.numel() > 1,
            "ROWS": rows,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 16),
    )
    return out
