"""A sum over GPUs that map each other's memory, in one launch ("one-shot": every rank reads every rank's numbers).

Decode sums a few kilobytes twice a layer.  Then latency counts, the number of messages that wait for each other: one
here, 2 (world_size - 1) in a ring.  For each block of BLOCK elements a program on every rank

    1. copies its rank's part to the buffer that the others can read,
    2. sets its flag at every peer,
    3. waits for every peer's flag, and resets it,
    4. adds all buffers up in rank order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from baichuan.kernels.primitives import start_dependents, wait_for_inputs
from baichuan.kernels.spec import KernelSpec, cdiv

BLOCK = 1024  # elements of one program


@triton.jit
def _one_shot_all_reduce(
    x, buffers, flags,
    count,
    own_buffer, out,
    RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    block = tl.program_id(0)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(own_buffer + offsets, tl.load(x + offsets, mask), mask)
    tl.debug_barrier()  # every thread's stores come before the flags
    for peer in tl.static_range(WORLD_SIZE):  # a flag that is still set belongs to the call before: wait
        place = tl.load(flags + peer).to(tl.pointer_type(tl.int32)) + block * WORLD_SIZE + RANK
        while tl.atomic_cas(place, 0, 1, sem="release", scope="sys") != 0:
            pass
    for peer in tl.static_range(WORLD_SIZE):
        place = tl.load(flags + RANK).to(tl.pointer_type(tl.int32)) + block * WORLD_SIZE + peer
        while tl.atomic_cas(place, 1, 0, sem="acquire", scope="sys") != 1:
            pass
    tl.debug_barrier()
    total = tl.zeros((BLOCK,), tl.float32)
    for peer in tl.static_range(WORLD_SIZE):  # in rank order on every rank: the same bits
        peer_buffer = tl.load(buffers + peer).to(tl.pointer_type(x.dtype.element_ty))
        total += tl.load(peer_buffer + offsets, mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask)
    start_dependents(OVERLAP)


ONE_SHOT_ALL_REDUCE = KernelSpec(_one_shot_all_reduce, ("x", "buffers", "flags"), ("count",), ("own_buffer", "out"))


def one_shot_all_reduce(
    x: Tensor, buffers: Tensor, flags: Tensor, own_buffer: Tensor, rank: int, world_size: int
) -> Tensor:
    """The sum of x over the ranks, in rank order in float32, rounded once: the same bits on every rank.

    buffers, flags: [world_size] int64, the addresses, in this rank's memory, of every rank's buffer (of x's type and at
    least its size) and flags (int32 zeros, world_size for each block); own_buffer: this rank's buffer
    A rank may still read the buffers when another has begun its next call.  Consecutive calls need different buffers;
    the flags may be the same.
    """
    x, out = x.contiguous(), torch.empty_like(x)
    constants = {"RANK": rank, "WORLD_SIZE": world_size, "BLOCK": BLOCK}
    grid = (cdiv(x.numel(), BLOCK),)
    ONE_SHOT_ALL_REDUCE.launch(grid, (x, buffers, flags), (x.numel(),), (own_buffer, out), constants)
    return out
