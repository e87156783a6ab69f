"""How kernels on several GPUs pass numbers to each other: through memory that every rank maps, without a barrier.

Each rank has an inbox with a slot for every rank.  A sender writes its numbers straight into its slot of the peer's
inbox; the receiver looks at its own memory until they are there.  No flag says so: a place that is still empty holds
EMPTY, all bits set, which no number is sent as (a NaN of these bits is sent as another NaN).

    sender      x -> slot at the peer
    receiver    read the slot until nothing in it is EMPTY | write EMPTY again | go on with the numbers

A number is at most 32 bits and arrives whole, so that the order in which they arrive does not matter, nor which of them
are there at a look.

A slot is empty again when its receiver's kernel has ended.  A sender may use it for the next message only then: it does
when it has received, through other slots, something that the same peer sent in a later kernel.  So consecutive
messages need different slots, and two used in turn are enough (executors/cuda/peer_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

EMPTY = tl.constexpr(-1)


@dataclass(frozen=True)
class Slots:
    """The slots of one message, which every rank sends to every other."""

    rank: int
    inbox: Tensor  # [world_size, bytes] uint8, this rank's: what each rank has sent
    distances: Tensor  # [world_size] int64, bytes from this rank's inbox to every rank's, multiples of 16

    @property
    def world_size(self) -> int:
        return self.inbox.shape[0]

    @property
    def constants(self) -> dict[str, int]:
        """Constants of a kernel that sends or receives the message.  SLOT_BYTES is a multiple of 16."""
        return {"RANK": self.rank, "WORLD_SIZE": self.world_size, "SLOT_BYTES": self.inbox.shape[1]}


def constants_of(slots: Slots | None) -> dict[str, int]:
    """Constants of a kernel that sends to the slots, or, without slots, to nobody."""
    return slots.constants if slots else {"RANK": 0, "WORLD_SIZE": 1, "SLOT_BYTES": 0}


@triton.jit
def own_slot(inbox, rank, SLOT_BYTES: tl.constexpr, dtype: tl.constexpr):
    """Where the numbers that `rank` sends arrive, as a pointer to the integers of as_bits."""
    place = inbox + rank * SLOT_BYTES
    if dtype.primitive_bitwidth == 16:
        return place.to(tl.pointer_type(tl.int16))
    else:
        return place.to(tl.pointer_type(tl.int32))


@triton.jit
def slots_at_peers(inbox, distances, RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr,
                   dtype: tl.constexpr):  # fmt: skip
    """This rank's slot in every rank's inbox.

    Pointers are made by adding to one, which Triton knows the alignment of: a store then writes 16 bytes at a time.
    """
    places = ()
    for peer in tl.static_range(WORLD_SIZE):
        distance = tl.multiple_of(tl.load(distances + peer), 16)
        places = places + (own_slot(inbox + distance, RANK, SLOT_BYTES, dtype),)
    return places


@triton.jit
def as_bits(x):
    """The bits of x as integers of its size, none of them EMPTY.  x: float16, bfloat16 or float32"""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True)
        return tl.where(bits == EMPTY, 0x7FFF, bits).to(tl.int16)
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits == EMPTY, 0x7FFFFFFF, bits).to(tl.int32)


@triton.jit
def send(place, bits, mask):
    """Write what as_bits gave to these places in a peer's inbox."""
    tl.store(place, bits, mask)


@triton.jit
def send_to_peers(targets, offsets, bits, mask, RANK: tl.constexpr, WORLD_SIZE: tl.constexpr):
    """Write what as_bits gave at these offsets of every peer's slot.  targets: of slots_at_peers"""
    for peer in tl.static_range(WORLD_SIZE):
        if peer != RANK:
            send(targets[peer] + offsets, bits, mask)


@triton.jit
def slots_of_peers(inbox, RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr, dtype: tl.constexpr):
    """Where the numbers arrive that the other ranks send, in rank order."""
    places = ()
    for peer in tl.static_range(WORLD_SIZE):
        if peer != RANK:
            places = places + (own_slot(inbox, peer, SLOT_BYTES, dtype),)
    return places


@triton.jit
def look(slots, offsets, mask):
    """(the numbers in each of the slots, how many are still missing at one of the offsets)"""
    found, missing = (), tl.zeros(mask.shape, tl.int32)
    for slot in tl.static_range(len(slots)):
        bits = tl.load(slots[slot] + offsets, mask, other=0, volatile=True)
        found = found + (bits,)
        missing += (bits == EMPTY).to(tl.int32)
    return found, tl.max(missing, 0)


@triton.jit
def receive(slots, offsets, mask):
    """Wait for the numbers at these offsets of the slots, empty them, and return each slot's.

    One look is at all slots: looking at one after the other would wait for memory as many times.
    """
    found, missing = look(slots, offsets, mask)
    while missing != 0:
        found, missing = look(slots, offsets, mask)
    tl.debug_barrier()  # several warps read one number where there are fewer than threads: none must find it emptied
    for slot in tl.static_range(len(slots)):
        tl.store(slots[slot] + offsets, tl.full(mask.shape, EMPTY, found[slot].dtype), mask)
    return found


@triton.jit
def sum_of_ranks(x, inbox, offsets, mask, RANK: tl.constexpr, WORLD_SIZE: tl.constexpr, SLOT_BYTES: tl.constexpr):
    """The ranks' numbers added up in rank order in float32, rounded once: the same bits on every rank.

    x: this rank's numbers, which have been sent to the others
    """
    found = receive(slots_of_peers(inbox, RANK, WORLD_SIZE, SLOT_BYTES, x.dtype), offsets, mask)
    total = tl.zeros(x.shape, tl.float32)
    for peer in tl.static_range(WORLD_SIZE):
        if peer == RANK:
            total += x.to(tl.float32)
        else:
            total += found[peer if peer < RANK else peer - 1].to(x.dtype, bitcast=True).to(tl.float32)
    return total.to(x.dtype)
