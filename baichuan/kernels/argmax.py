"""The likeliest token of each row of logits, by two kernels: the winner of each block, then of each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2

BLOCK = 2048  # logits of a block


@triton.jit
def _winners_of_blocks(
    logits,
    width, stride, blocks,
    values, indices,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    row, block = tl.program_id(0), tl.program_id(1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * stride + columns, columns < width, other=-float("inf"))
    value, index = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(values + row * blocks + block, value)
    tl.store(indices + row * blocks + block, block * BLOCK + index)


@triton.jit
def _winner_of_row(
    values, indices,
    blocks,
    out,
    BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    start_dependents(OVERLAP)
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    x = tl.load(values + row * blocks + block, block < blocks, other=-float("inf"))
    _, winner = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(indices + row * blocks + winner).to(tl.int64))


WINNERS_OF_BLOCKS = KernelSpec(_winners_of_blocks, ("logits",), ("width", "stride", "blocks"), ("values", "indices"))
WINNER_OF_ROW = KernelSpec(_winner_of_row, ("values", "indices"), ("blocks",), ("out",))


def argmax(logits: Tensor) -> Tensor:
    """logits.argmax(-1), the first of equal ones.

    logits: [rows, width] float32, each row contiguous -> [rows] int64
    """
    rows, width = logits.shape
    blocks = cdiv(width, BLOCK)
    values = torch.empty(rows, blocks, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    scalars = (width, logits.stride(0), blocks)
    WINNERS_OF_BLOCKS.launch((rows, blocks), (logits,), scalars, (values, indices), {"BLOCK": BLOCK})
    WINNER_OF_ROW.launch(
        (rows,), (values, indices), (blocks,), (out,), {"BLOCKS": next_power_of_2(blocks)}, num_warps=1
    )
    return out
