"""How the ranks of one engine communicate: one rank alone, as threads of one process, or by MPI."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from baichuan.errors import UnsupportedError
from baichuan.parallel.launcher import launch

LEAVE_TIMEOUT_S = 5.0
LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")
THREADS_TIMEOUT_S = 1800.0  # enough for threads that answer one short prompt with weights on a slow disk


class Communicator(Protocol):
    rank: int  # which share of the model this process holds
    world_size: int
    local_rank: int  # this process's index on its machine, and its GPU's index
    local_size: int
    capturable: bool  # whether a CUDA graph can hold its collectives

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over the ranks, added in rank order in float32 and rounded once: the same bits on each rank."""

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The elementwise maximum over the ranks."""

    def all_gather(self, x: Tensor) -> Tensor:
        """The ranks' tensors side by side along the last dimension, in rank order."""

    def end_step(self) -> None:
        """Called on every rank after the last message of a model step."""

    def gather_objects(self, value: Any) -> list:
        """Every rank's value, in rank order, on every rank."""

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""

    def leave_failed(self) -> None:
        """Called by a rank that is about to exit with an error.  Returns when every rank does so; ends all of them
        with exit code 2 when others are still running after LEAVE_TIMEOUT_S."""


class Solo:
    """A world of one rank; on its machine there may be others, of other worlds."""

    rank, world_size = 0, 1
    capturable = True

    def __init__(self, local_rank: int = 0, local_size: int = 1):
        self.local_rank, self.local_size = local_rank, local_size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    all_reduce_max = all_gather = all_reduce

    def end_step(self) -> None:
        pass

    def gather_objects(self, value: Any) -> list:
        return [value]

    def broadcast_object(self, value: Any) -> Any:
        return value

    def leave_failed(self) -> None:
        pass


class _Gathering:
    """The collectives, built on `_gather`, which stacks the ranks' tensors in rank order in host memory."""

    capturable = False

    def _gather(self, x: Tensor) -> Tensor:  # [world_size, *x.shape]
        raise NotImplementedError

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._gather(x).sum(0, dtype=torch.float32).to(x.dtype)

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return self._gather(x).amax(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._gather(x).unbind(0), dim=-1)

    def end_step(self) -> None:
        pass


class Threads(_Gathering):
    """One of several ranks that run as threads of this process, for self-checks and tests.  Made by run_ranks."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier):
        self.rank = self.local_rank = rank
        self.world_size = self.local_size = len(board)
        self._board, self._barrier = board, barrier

    def gather_objects(self, value: Any) -> list:
        self._board[self.rank] = value
        self._barrier.wait()
        values = list(self._board)
        self._barrier.wait()  # no rank writes the next value before all have read this one
        return values

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def _gather(self, x: Tensor) -> Tensor:
        return torch.stack([each.to(x.device) for each in self.gather_objects(x)])  # ranks may be on several GPUs

    def leave_failed(self) -> None:
        self._barrier.abort()


def run_ranks(world_size: int, body: Callable[[Communicator], Any], timeout_s: float = THREADS_TIMEOUT_S) -> list:
    """body's results on each of world_size ranks, run as threads.  A rank's exception ends all and is raised here.

    Raises UnsupportedError when they are not done after timeout_s; a thread that hangs outside Python is left behind.
    """
    barrier = threading.Barrier(world_size)
    board, results, errors = [None] * world_size, [None] * world_size, []

    def run(rank: int) -> None:
        comm = Threads(rank, board, barrier)
        try:
            results[rank] = body(comm)
        except BaseException as error:
            errors.append(error)
            comm.leave_failed()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    late = [thread for thread in threads if thread.is_alive()]
    barrier.abort()
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # the first cause, not the barrier that it broke
    if late:
        raise UnsupportedError(
            f"{len(late)} of {world_size} ranks, run as threads, were not done after {timeout_s:g} s; use fewer ranks"
        )
    return results


class Mpi(_Gathering):
    """The ranks that mpirun started, or some of them, exchanging host memory."""

    def __init__(self, comm: Any, local_rank: int, local_size: int):
        """comm: an mpi4py communicator of the ranks.  local_rank, local_size: as in Communicator."""
        self.mpi = comm
        self.rank, self.world_size = comm.Get_rank(), comm.Get_size()
        self.local_rank, self.local_size = local_rank, local_size

    @staticmethod
    def world() -> Mpi:
        from mpi4py import MPI

        machines = machines_of(MPI.COMM_WORLD.allgather((socket.gethostname(), _local_rank(MPI))))
        own = next(ranks for ranks in machines if MPI.COMM_WORLD.Get_rank() in ranks)
        return Mpi(MPI.COMM_WORLD, own.index(MPI.COMM_WORLD.Get_rank()), len(own))

    @property
    def machines(self) -> list[list[int]]:
        """The ranks of each machine.  Every rank calls it."""
        return machines_of(self.gather_objects((socket.gethostname(), self.local_rank)))

    def _gather(self, x: Tensor) -> Tensor:  # [world_size, *x.shape]
        x = x.contiguous()
        gathered = torch.empty(self.world_size, *x.shape, dtype=x.dtype)
        self.mpi.Allgather(_as_bytes(x), _as_bytes(gathered))
        return gathered

    def gather_objects(self, value: Any) -> list:
        return self.mpi.allgather(value)

    def broadcast_object(self, value: Any) -> Any:
        return self.mpi.bcast(value, root=0)

    def leave_failed(self) -> None:
        request, deadline = self.mpi.Ibarrier(), time.monotonic() + LEAVE_TIMEOUT_S
        while not request.Test():
            if time.monotonic() > deadline:
                self.mpi.Abort(2)
            time.sleep(0.05)


def machines_of(places: Sequence[tuple[str, int]]) -> list[list[int]]:
    """The ranks of each machine, by their machines' names and their places there.

    Machines of one name, such as containers, are told apart by places that occur twice.
    """
    machines: dict[tuple[str, int], list[int]] = {}
    for rank, place in enumerate(places):
        machines.setdefault((place[0], places[:rank].count(place)), []).append(rank)
    return list(machines.values())


def _local_rank(MPI) -> int:
    """This process's index on its machine: the launcher's word, or else by who shares memory."""
    said = next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), None)
    return int(said) if said is not None else MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()


def _as_bytes(x: Tensor):
    return x.view(-1).view(torch.uint8).numpy()


def world_of_this_process() -> Communicator:
    """MPI when mpirun (or another launcher) started several processes, else a world of one."""
    return Mpi.world() if launch().world_size > 1 else Solo()
