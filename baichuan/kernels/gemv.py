"""One token times a matrix.

Each weight is read and used once, so that memory bandwidth is the limit: multiply-adds in float32, and many loads in
flight.  A program computes BLOCK_N outputs.  It loads its first BLOCK_K columns before it waits for x, and then always
the columns after those that it multiplies:

    load columns 0 | wait for x | load 1, multiply 0 | load 2, multiply 1 | ... | add up each row's products, store
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.peers import Slots, as_bits, constants_of, send_to_peers, slots_at_peers
from baichuan.kernels.primitives import prefetch_beginning, start_dependents, wait_for_inputs
from baichuan.kernels.silu import gated
from baichuan.kernels.spec import GemvBlock, KernelSpec, cdiv


@triton.jit
def _gemv(
    x, weight, distances,
    in_features, out_features,
    y, inbox,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_dependents(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * in_features
    w = tl.load(rows + columns[None, :], (columns < in_features)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if GATED:
        up_rows = rows + out_features.to(tl.int64) * in_features
        w_up = tl.load(up_rows + columns[None, :], (columns < in_features)[None, :], other=0.0)
        acc_up = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    prefetch_beginning(weight, out_features.to(tl.int64) * in_features, GATED, OVERLAP)
    if WORLD_SIZE > 1:
        targets = slots_at_peers(inbox, distances, RANK, WORLD_SIZE, SLOT_BYTES, y.dtype.element_ty)
    wait_for_inputs(OVERLAP)
    for start in range(0, in_features, BLOCK_K):
        k = start + columns
        later = (k + BLOCK_K < in_features)[None, :]
        current = w
        w = tl.load(rows + (k + BLOCK_K)[None, :], later, other=0.0)
        x_block = tl.load(x + k, k < in_features, other=0.0).to(tl.float32)
        acc += current.to(tl.float32) * x_block[None, :]
        if GATED:
            current = w_up
            w_up = tl.load(up_rows + (k + BLOCK_K)[None, :], later, other=0.0)
            acc_up += current.to(tl.float32) * x_block[None, :]
    dtype: tl.constexpr = y.dtype.element_ty
    inside = n < out_features
    result = tl.sum(acc, 1)
    if GATED:
        result = gated(result, tl.sum(acc_up, 1), dtype)
    tl.store(y + n, result.to(dtype), inside)
    if WORLD_SIZE > 1:
        send_to_peers(targets, n, as_bits(result.to(dtype)), inside, RANK, WORLD_SIZE)


GEMV = KernelSpec(_gemv, ("x", "weight", "distances"), ("in_features", "out_features"), ("y", "inbox"))


# What measures fastest on an H200: (largest out_features, block), None for all larger ones.
BLOCKS = {
    "gated": ((None, GemvBlock(1, 1024, 4)),),
    "plain": ((5119, GemvBlock(4, 1024, 4)), (None, GemvBlock(8, 512, 4))),
}


def choose_block(out_features: int, gated: bool) -> GemvBlock:
    """The table's block.  out_features: of the result, half the matrix's if gated"""
    blocks = BLOCKS["gated" if gated else "plain"]
    return next(block for limit, block in blocks if limit is None or out_features <= limit)


def gemv(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    gated: bool = False,
    block: GemvBlock | None = None,
    slots: Slots | None = None,
) -> Tensor:
    """y = x @ weightᵀ for one row x; gated: silu(first half of y) * second half; slots: y goes to them, too.

    x: [1, in_features]; weight: [out_features, in_features], both of a float type; block: None = the table's
    -> [1, out_features], or half of it if gated
    """
    out_features = weight.shape[0] // (2 if gated else 1)
    block = block or choose_block(out_features, gated)
    y = torch.empty(1, out_features, dtype=out_dtype, device=weight.device)
    GEMV.launch(
        (cdiv(out_features, block.block_n),),
        (x, weight, slots.distances if slots else x),
        (weight.shape[1], out_features),
        (y, slots.inbox if slots else y),
        {"GATED": gated, "BLOCK_N": block.block_n, "BLOCK_K": block.block_k, **constants_of(slots)},
        num_warps=block.num_warps,
    )
    return y
