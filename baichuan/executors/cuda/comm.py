"""How ranks talk that have a GPU each: by NCCL and, for short messages, through each other's memory."""

from __future__ import annotations

import atexit
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.executors.cuda.peer_memory import PeerMemory
from baichuan.executors.device import gpu_of_rank
from baichuan.kernels.exchange import all_gather
from baichuan.kernels.peers import Slots
from baichuan.parallel.comm import Communicator, Solo, Threads

MEET_TIMEOUT = timedelta(minutes=3)  # how long ranks wait for each other to join, or in an operation


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
        self.peers = PeerMemory.map(host, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)  # in x's type; every rank gets the same bits
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        slots = self.peers and self.peers.slots(x.nbytes, ends_step=True)
        if slots:
            return all_gather(x, slots)
        gathered = torch.empty(self.world_size, *x.shape, dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return torch.cat(gathered.unbind(0), dim=-1)

    def end_step(self) -> None:
        if self.peers:
            self.peers.end_step()

    def gather_objects(self, value: Any) -> list:
        return self._host.gather_objects(value)

    def broadcast_object(self, value: Any) -> Any:
        return self._host.broadcast_object(value)

    def leave_failed(self) -> None:
        self._host.leave_failed()

    def _leave(self) -> None:
        if hasattr(sys, "last_value"):  # a traceback keeps graphs alive, for whose end NCCL would wait
            return
        self.peers = None
        torch.cuda.synchronize()
        dist.destroy_process_group()


def slots_of(comm: Communicator, num_bytes: int) -> Slots | None:
    """Slots for a message of num_bytes from each rank; None where the ranks have none or it does not fit."""
    if isinstance(comm, Nccl) and comm.peers:
        return comm.peers.slots(num_bytes)
    return None
