"""The sum over GPUs, the addition of the residual and the RMS norm in one kernel.

Decode sums a few kilobytes twice a layer.  Then latency counts, the number of messages that wait for each other.  A
program takes one row:

    one shot     send the row to every peer | receive theirs and add all up in rank order | norm
    sent         the product has sent it    | the same
    two shots    send the row to the rank that owns it, which adds all up and sends the sum back | norm

A row goes world_size - 1 times over the links of each GPU in one shot, and on average 2 (world_size - 1) / world_size
times in two.  The next product stands ready meanwhile and has asked for its first weights (primitives.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.norm import store_normed
from baichuan.kernels.operand import Form, Operand
from baichuan.kernels.peers import Slots, as_bits, own_slot, receive, send, send_to_peers, slots_at_peers, sum_of_ranks
from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, next_power_of_2
from baichuan.kernels.store_row import form_constant

TWO_SHOT_ROWS = 32  # from this many on bandwidth counts more than the latency of a second message


@triton.jit
def _sum_norm(
    x, residual, weight, scale, distances,
    width,
    total, out, out_scale, inbox,
    EPS: tl.constexpr, FORM: tl.constexpr, SENT: tl.constexpr, TWO_SHOTS: tl.constexpr,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    offsets = row.to(tl.int64) * width + columns
    w = tl.load(weight + columns, mask, other=0.0)
    targets = slots_at_peers(inbox, distances, RANK, WORLD_SIZE, SLOT_BYTES, x.dtype.element_ty)
    owner = row % WORLD_SIZE  # with TWO_SHOTS
    wait_for_inputs(OVERLAP)
    own = tl.load(x + offsets, mask, other=0.0)
    if TWO_SHOTS:
        for peer in tl.static_range(WORLD_SIZE):
            if peer != RANK:
                columns_to_peer = tl.where(owner == peer, width, 0)
                send(targets[peer] + offsets, as_bits(own), columns < columns_to_peer)
    elif not SENT:
        send_to_peers(targets, offsets, as_bits(own), mask, RANK, WORLD_SIZE)
    start_dependents(OVERLAP)
    before = tl.load(residual + offsets, mask, other=0.0)
    if TWO_SHOTS and owner != RANK:
        slot = own_slot(inbox, owner, SLOT_BYTES, own.dtype)
        s = receive((slot,), offsets, mask)[0].to(own.dtype, bitcast=True)
    else:
        s = sum_of_ranks(own, inbox, offsets, mask, RANK, WORLD_SIZE, SLOT_BYTES)
        if TWO_SHOTS:
            send_to_peers(targets, offsets, as_bits(s), mask, RANK, WORLD_SIZE)
    r = (s.to(tl.float32) + before.to(tl.float32)).to(own.dtype)
    tl.store(total + offsets, r, mask)
    store_normed(r, w, row, columns, mask, scale, out, out_scale, width, EPS, FORM)


SUM_NORM = KernelSpec(
    _sum_norm,
    ("x", "residual", "weight", "scale", "distances"),
    ("width",),
    ("total", "out", "out_scale", "inbox"),
)


def sum_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: Form, slots: Slots, sent: bool = False
) -> tuple[Operand, Tensor]:
    """add_rms_norm (norm.py) of the sum of x over the ranks, which is added up in rank order in float32 and rounded to
    x's dtype: the same bits on every rank.

    x, residual: [num_tokens, hidden_size], the slots being at least as large; sent: whether the kernels that made x
    have sent it to the peers' slots, in one shot
    """
    num_tokens, width = x.shape
    total = torch.empty_like(residual)
    out = Operand.allocate(form, x, num_tokens, width)
    scale = x if out.scale is None else out.scale
    block = next_power_of_2(width)
    SUM_NORM.launch(
        (num_tokens,),
        (x.contiguous(), residual, weight, scale, slots.distances),
        (width,),
        (total, out.values, scale, slots.inbox),
        {
            "EPS": eps,
            "FORM": form_constant(form),
            "SENT": sent,
            "TWO_SHOTS": not sent and slots.world_size > 2 and num_tokens >= max(slots.world_size, TWO_SHOT_ROWS),
            **slots.constants,
            "BLOCK": block,
        },
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, total
