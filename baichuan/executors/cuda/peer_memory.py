"""Every rank's inbox, mapped into the other ranks' memory: where kernels/peers.py passes numbers between GPUs."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist
from torch import Tensor

from baichuan.kernels.peers import Slots
from baichuan.parallel.comm import Communicator

logger = logging.getLogger(__name__)

INBOX_BYTES = 16 << 20  # for one message from all ranks; larger messages are NCCL's, which splits them up
INBOXES = 3  # two for the messages within a step, used in turn, and one for the gather that ends it


class PeerMemory:
    """Hands out the slots of one message after the other, which every rank sends and receives in the same order.

    Consecutive messages need different inboxes (kernels/peers.py), also from one step to the next:

        message      sum  sum  sum  sum  gather | sum  sum ...
        inbox         0    1    0    1     2    |  0    1

    A captured graph keeps the inboxes that its messages had, so that each step begins with inbox 0 and must not end
    with it: end_step checks that.
    """

    def __init__(self, memory: Tensor, addresses: list[int], rank: int, mapping: object = None):
        """memory: uint8, this rank's inboxes, EMPTY; addresses: of every rank's, in this rank's memory; mapping: what
        keeps them there
        """
        self.rank, self._mapping = rank, mapping
        self._inboxes = memory.view(INBOXES, len(addresses), -1)
        self._distances = torch.tensor([each - addresses[rank] for each in addresses], device=memory.device)
        self._last: int | None = None  # inbox of this step

    @classmethod
    def map(cls, host: Communicator, device: torch.device) -> PeerMemory | None:
        """None, on every rank, where a rank cannot map the others' memory; NCCL then carries everything."""
        try:
            import torch.distributed._symmetric_memory as symmetric_memory

            slot_bytes = INBOX_BYTES // host.world_size // 16 * 16
            # symmetric_memory.empty does no more than this, and imports SymPy, which takes a second.
            make = symmetric_memory._SymmetricMemory.empty_strided_p2p
            memory = make((INBOXES * host.world_size * slot_bytes,), (1,), torch.uint8, device)
            memory.fill_(255)  # kernels.peers.EMPTY
            handle = symmetric_memory.rendezvous(memory, dist.group.WORLD)  # type: ignore[arg-type]  # joined by now
            torch.cuda.synchronize(device)
            found = cls(memory, list(handle.buffer_ptrs), host.rank, handle)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.debug("peer memory cannot be mapped: %s", error)
            found = None
        # From here on every rank's inboxes are empty.
        if all(host.gather_objects(found is not None)):
            return found
        logger.info("the GPUs cannot map each other's memory; NCCL carries every message")
        return None

    @property
    def slot_bytes(self) -> int:
        return self._inboxes.shape[2]

    def slots(self, num_bytes: int, ends_step: bool = False) -> Slots | None:
        """The next message's slots; None where it is too large for them.  num_bytes: what each rank sends"""
        if num_bytes > self.slot_bytes:
            return None
        self._last = 2 if ends_step else int(self._last == 0)
        return Slots(self.rank, self._inboxes[self._last], self._distances)

    def end_step(self) -> None:
        """Raise AssertionError where the next step's first message would use the inbox of this step's last."""
        assert self._last != 0, "a step of the model sent an odd number of messages and ended without a gather"
        self._last = None
