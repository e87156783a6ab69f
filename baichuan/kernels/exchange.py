"""Messages between GPUs that are not followed by a norm: logits side by side, and scales by every rank's channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.operand import Int8PerToken, Operand
from baichuan.kernels.peers import Slots, as_bits, receive, send_to_peers, slots_at_peers, slots_of_peers
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.silu import gated
from baichuan.kernels.spec import KernelSpec, cdiv, next_power_of_2
from baichuan.kernels.store_row import divide, load_smoother, quantise

GATHER_BLOCK = 2048


@triton.jit
def _all_gather(
    x, distances,
    width,
    out, inbox,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    offsets = row * width + columns
    targets = slots_at_peers(inbox, distances, RANK, WORLD_SIZE, SLOT_BYTES, x.dtype.element_ty)
    wait_for_inputs(OVERLAP)
    own = tl.load(x + offsets, mask, other=0.0)
    send_to_peers(targets, offsets, as_bits(own), mask, RANK, WORLD_SIZE)
    start_dependents(OVERLAP)
    out_row = out + row * width * WORLD_SIZE + columns
    tl.store(out_row + RANK * width, own, mask)
    found = receive(slots_of_peers(inbox, RANK, WORLD_SIZE, SLOT_BYTES, own.dtype), offsets, mask)
    for slot in tl.static_range(WORLD_SIZE - 1):
        place = out_row + (slot if slot < RANK else slot + 1) * width
        tl.store(place, found[slot].to(own.dtype, bitcast=True), mask)


ALL_GATHER = KernelSpec(_all_gather, ("x", "distances"), ("width",), ("out", "inbox"))


def all_gather(x: Tensor, slots: Slots) -> Tensor:
    """The ranks' x side by side, in rank order.

    x: [rows, width] of a float type of 16 or 32 bits, the slots being at least as large -> [rows, world_size * width]
    """
    x, (rows, width) = x.contiguous(), x.shape
    out = torch.empty(rows, slots.world_size * width, dtype=x.dtype, device=x.device)
    block = min(next_power_of_2(width), GATHER_BLOCK)
    constants = {**slots.constants, "BLOCK": block}
    ALL_GATHER.launch((cdiv(width, block), rows), (x, slots.distances), (width,), (out, slots.inbox), constants)
    return out


@triton.jit
def _quantise_over_ranks(
    x, smoother, distances,
    width,
    out, out_scale, inbox,
    GATED: tl.constexpr,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    divisor, reciprocal = load_smoother(smoother, columns, mask)
    targets = slots_at_peers(inbox, distances, RANK, WORLD_SIZE, SLOT_BYTES, tl.float32)
    wait_for_inputs(OVERLAP)
    source = x + row.to(tl.int64) * (2 * width if GATED else width) + columns
    value = tl.load(source, mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(source + width, mask, other=0.0).to(tl.float32)
        value = gated(value, up, x.dtype.element_ty).to(tl.float32)
    value = divide(value, divisor, reciprocal)
    largest = tl.max(tl.abs(value), 0)
    places = row + tl.arange(0, 1)
    everywhere = places >= 0
    send_to_peers(targets, places, as_bits(largest + tl.zeros((1,), tl.float32)), everywhere, RANK, WORLD_SIZE)
    start_dependents(OVERLAP)
    theirs = receive(slots_of_peers(inbox, RANK, WORLD_SIZE, SLOT_BYTES, tl.float32), places, everywhere)
    for slot in tl.static_range(WORLD_SIZE - 1):
        largest = tl.maximum(largest, tl.max(theirs[slot].to(tl.float32, bitcast=True), 0))
    s = tl.where(largest > 0, tl.div_rn(largest, 127.0), 1.0)
    tl.store(out_scale + row, s)
    tl.store(out + row.to(tl.int64) * width + columns, quantise(value, s, tl.int8), mask)


QUANTISE_OVER_RANKS = KernelSpec(
    _quantise_over_ranks, ("x", "smoother", "distances"), ("width",), ("out", "out_scale", "inbox")
)


def quantise_over_ranks(x: Tensor, smoother: Tensor, slots: Slots, activates: bool = False) -> Operand:
    """x, or if it activates silu_mul of x (silu.py), in the form Int8PerToken(smoother, over_ranks=True).

    x: [num_tokens, width], or [num_tokens, 2 * width], this rank's channels, the slots holding a float32 for each
    token; smoother: [width] float32
    """
    num_tokens, width = x.shape[0], smoother.shape[0]
    out, block = Operand.allocate(Int8PerToken(smoother, True), x, num_tokens, width), next_power_of_2(width)
    QUANTISE_OVER_RANKS.launch(
        (num_tokens,),
        (x.contiguous(), smoother, slots.distances),
        (width,),
        (*out.scaled, slots.inbox),
        {"GATED": activates, **slots.constants, "BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),
    )
    return out
