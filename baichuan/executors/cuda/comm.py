"""How ranks talk that have a GPU each: by NCCL and, for small sums, through each other's memory."""

from __future__ import annotations

import atexit
import logging
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.device import gpu_of_rank
from baichuan.kernels.all_reduce import BLOCK, one_shot_all_reduce
from baichuan.parallel.comm import Communicator, Solo, Threads

logger = logging.getLogger(__name__)

# Larger sums are NCCL's.  There bandwidth counts, and its ring sends every byte twice, whatever the number of ranks.
ONE_SHOT_BYTES = 256 << 10
BUFFERS = 2  # used in turn
MEET_TIMEOUT = timedelta(minutes=3)  # of ranks that join, or wait for each other's operations


def join_gpus(comm: Communicator) -> tuple[torch.device, Communicator]:
    """(this rank's GPU, which becomes the thread's current one, the communicator of the ranks' GPUs).

    Ranks that are threads of one process keep their communicator.
    """
    device = gpu_of_rank(comm)
    torch.cuda.set_device(device)
    return device, comm if isinstance(comm, Solo | Threads) else Nccl(comm, device)


class Nccl:
    """comm.Communicator over GPUs of one machine.  `host` joins the ranks and carries what is not a tensor."""

    capturable = True

    def __init__(self, host: Communicator, device: torch.device):
        self.rank, self.world_size, self._host = host.rank, host.world_size, host
        self.local_rank, self.local_size = host.local_rank, host.local_size
        torch.cuda.set_device(device)
        store = None
        if self.rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, self.world_size, is_master=True, wait_for_workers=False)
        port = host.broadcast_object(store.port if store else None)
        store = store or dist.TCPStore("127.0.0.1", port, self.world_size, is_master=False)
        try:
            dist.init_process_group(
                "nccl", timeout=MEET_TIMEOUT, store=store, rank=self.rank, world_size=self.world_size, device_id=device
            )
        except dist.DistError as error:
            raise UnsupportedError(
                f"rank {self.rank} could not join the others over NCCL within {MEET_TIMEOUT.seconds} s "
                f"({str(error).splitlines()[0]}); NCCL_DEBUG=INFO says more, --device cpu does without"
            ) from None
        atexit.register(self._leave)  # when the graphs that hold its operations are gone
        self._peers = _PeerMemory.map(host, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._peers and x.nbytes <= ONE_SHOT_BYTES:
            return self._peers.all_reduce(x)
        dist.all_reduce(x)  # in x's type; every rank gets the same bits
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty(self.world_size, *x.shape, dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return torch.cat(gathered.unbind(0), dim=-1)

    def end_step(self) -> None:
        if self._peers:
            self._peers.end_step()

    def gather_objects(self, value: Any) -> list:
        return self._host.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._host.broadcast_object(value)

    def leave_failed(self) -> None:
        self._host.leave_failed()

    def _leave(self) -> None:
        if hasattr(sys, "last_value"):  # a traceback keeps graphs alive, for whose end NCCL would wait
            return
        self._peers = None
        torch.cuda.synchronize()
        dist.destroy_process_group()


class _PeerMemory:
    """Every rank's buffers and flags, mapped into this rank's memory.

    kernels/all_reduce.py needs another buffer than in the call before, so that two are used in turn:

        call      0    1    2    3
        buffer    A    B    A    B

    Two are enough.  A rank writes its A in call 2 only after every peer has set its flag of call 1, and a peer does so
    after it has read everybody's A in call 0.

    A captured graph keeps the buffers that its calls had.  Replayed, it follows on a step that ended with buffer B only
    if every step makes an even number of calls, as this model's does: two a layer.  end_step checks that.
    """

    def __init__(self, memory: Tensor, handle, rank: int, world_size: int):
        self._memory, self._handle = memory, handle  # both keep the mapping alive
        self.rank, self.world_size = rank, world_size
        bases = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=memory.device)
        self._buffers = [bases + number * ONE_SHOT_BYTES for number in range(BUFFERS)]
        self._flags = bases + BUFFERS * ONE_SHOT_BYTES
        self._next = 0  # buffer

    @classmethod
    def map(cls, host: Communicator, device: torch.device) -> _PeerMemory | None:
        """None, on every rank, where a rank cannot map the others' memory; NCCL then carries small sums as well."""
        flags = host.world_size * (ONE_SHOT_BYTES // BLOCK) * torch.int32.itemsize
        try:
            import torch.distributed._symmetric_memory as symmetric_memory

            memory = symmetric_memory.empty(BUFFERS * ONE_SHOT_BYTES + flags, dtype=torch.uint8, device=device)
            memory.zero_()
            handle = symmetric_memory.rendezvous(memory, dist.group.WORLD)  # type: ignore[arg-type]  # joined by now
            torch.cuda.synchronize(device)
            found = cls(memory, handle, host.rank, host.world_size)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.debug("peer memory cannot be mapped: %s", error)
            found = None
        # From here on every rank's flags are zero.
        if all(host.gather_objects(found is not None)):
            return found
        logger.info("the GPUs cannot map each other's memory; NCCL carries every message")
        return None

    def all_reduce(self, x: Tensor) -> Tensor:
        number, self._next = self._next, (self._next + 1) % BUFFERS
        start = number * ONE_SHOT_BYTES
        own = self._memory[start : start + x.nbytes].view(x.dtype)
        return one_shot_all_reduce(x, self._buffers[number], self._flags, own, self.rank, self.world_size)

    def end_step(self) -> None:
        """Raise AssertionError where the step made an odd number of calls: a replay would then use a buffer twice."""
        assert self._next == 0, "a step of the model made an odd number of sums over the ranks"
