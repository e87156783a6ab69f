"""Work on whole rows: gathering them, and writing them in the form that a GEMM takes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import divide, load_smoother, row_output, store_row


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
    QUANTISE: tl.constexpr, SMOOTH: tl.constexpr, ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    if SMOOTH:
        divisor, reciprocal = load_smoother(smoother, columns, mask)
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    value = tl.load(x + row.to(tl.int64) * width + columns, mask, other=0.0).to(tl.float32)
    if SMOOTH:
        value = divide(value, divisor, reciprocal)
    store_row(value, row, columns, mask, scale, out, out_scale, width, QUANTISE, ROW_SCALES)


QUANTISE_ROWS = KernelSpec(_quantise_rows, ("x", "smoother", "scale"), ("width",), ("out", "out_scale"))


def quantise_rows(
    x: Tensor,
    dtype: torch.dtype | None,
    scale: Tensor | None = None,
    smoother: Tensor | None = None,
    even_odd: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """quantise(x / smoother, scale) of quant/scaled.py and the scale, or what else row_output says.

    x: [num_tokens, width]; smoother: [width] float32, for 8-bit numbers; dtype, scale [1] or [num_tokens],
    even_odd: see row_output.
    """
    num_tokens, width = x.shape
    row_scales = scale is not None and scale.numel() > 1
    out, scale, mode = row_output(x, num_tokens, width, dtype, scale, even_odd)
    block = next_power_of_2(width)
    unread = x if scale is None else scale
    QUANTISE_ROWS.launch(
        (num_tokens,),
        (x, unread if smoother is None else smoother, unread),
        (width,),
        (out, unread),
        {
            "QUANTISE": mode,
            "SMOOTH": smoother is not None,
            "ROW_SCALES": row_scales,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, scale
